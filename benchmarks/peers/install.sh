#!/bin/sh
# Installs dalle-pytorch 1.6.6, whose DiscreteVAE is the peer of benchmarks/tokenizer.py, into an environment of its own:
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
$install --no-build-isolation dalle-pytorch==1.6.6 "$torch" "setuptools<81"

"$directory/bin/python" -W ignore "$here/dalle_pytorch_vae.py" --check
