#!/bin/sh
# Installs the peers of benchmarks/tokenizer.py and benchmarks/sampling.py into an environment of their own:
# dalle-pytorch 1.6.6, and transformers 5.23.0, which it depends on in any version.
#   benchmarks/peers/install.sh [DIR]        (default: .venv-peers)
# PYTHON names the interpreter that makes it (default: .venv/bin/python where there is one, else python3). If that one has
# torch, the peer gets the same version, so that both sides of a comparison run on the same kernels.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
directory=${1:-"$here/../../.venv-peers"}
python=${PYTHON:-"$here/../../.venv/bin/python"}
command -v "$python" > /dev/null || python=python3

torch=torch
if version=$("$python" -c 'import torch; print(torch.__version__.split("+")[0])' 2> /dev/null); then
    torch="torch==$version"
fi

"$python" -m venv "$directory"
install="$directory/bin/python -m pip install --disable-pip-version-check --no-compile"
# pkg_resources, which a dependency imports, left setuptools with version 81
$install "setuptools<81" wheel Cython
$install "$torch" torchvision "setuptools<81"
# its source distribution imports Cython without declaring it
$install --no-build-isolation youtokentome==1.0.6
$install --no-build-isolation dalle-pytorch==1.6.6 transformers==5.23.0 "$torch" "setuptools<81"

for script in dalle_pytorch_vae dalle_pytorch_prior llama_prior; do
    "$directory/bin/python" -W ignore "$here/$script.py" --check
done
