"""Commands and Python of README.md and two pages of docs: understood, and the quick ones run on a tiny model."""

import glob
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tessera.__main__ import COMMANDS, main
from tessera.config import load

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
STAGES = {  # commands that take YAML files and key=value
    "train-dvae": "dvae.train:TrainConfig",
    "estimate": "dvae.train:TrainConfig",
    "encode": "dvae.encode:EncodeConfig",
    "train-prior": "transformer.train:TrainConfig",
    "train-scorer": "scorer.train:TrainConfig",
}
QUICK = ("generate", "rerank", "reconstruct", "codebook", "info")


def commands_in(text: str) -> list[str]:
    """The lines of fenced sh blocks that call tessera, with continuation lines joined and comments cut."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["tessera"]:
                found.append(shlex.join(words[1:]))
    return found


PAGES = (README, ROOT / "docs" / "sampling.md", ROOT / "docs" / "finetuning.md")
COMMAND_LINES = [line for page in PAGES if page.exists() for line in commands_in(page.read_text(encoding="utf-8"))]
every_command = pytest.mark.parametrize("line", COMMAND_LINES)


def test_commands_are_found_in_sh_blocks_only() -> None:
    block = "$ tessera no\ntessera fit a b=1 # why\ntessera generate \\\n  m 'a b'\n"
    text = f"tessera no\n```sh\n{block}```\n```\ntessera no\n```\n"
    assert commands_in(text) == ["fit a b=1", "generate m 'a b'"]


def test_the_readme_shows_commands() -> None:
    assert {"fit", "generate"} <= {line.split()[0] for line in COMMAND_LINES}


@every_command
def test_a_command_of_the_readme_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name, *argv = shlex.split(line)
    if name.startswith("-"):
        return  # `tessera --help`
    assert name in COMMANDS, f"there is no command {name}"
    if "--help" in argv:
        return
    if name in STAGES:
        module, config_class = STAGES[name].split(":")
        load(getattr(importlib.import_module(module), config_class), argv, prog=f"tessera {name}")
        return
    module = importlib.import_module(COMMANDS[name].target.split(":")[0])
    if hasattr(module, "_parser"):
        module._parser().parse_intermixed_args(argv)


def make_files(folder: Path, model: Path) -> None:
    """The files that the pages' examples name."""
    for name in ("my-model", "my-emoji", "my-pets"):
        (folder / name).symlink_to(model)
    photo = Image.new("RGB", (20, 16), "red")
    mask = Image.new("L", (20, 16))
    mask.paste(255, (0, 8, 10, 16))
    (folder / "pets").mkdir()
    for name, picture in (("photo.jpg", photo), ("photo.png", photo), ("mask.png", mask), ("pets/cat.jpg", photo)):
        picture.save(folder / name)
    for name, color in (("a.png", "blue"), ("b.png", "red")):
        Image.new("RGB", (16, 16), color).save(folder / name)


@pytest.mark.filterwarnings("ignore:.*pixels")  # the photo is resized, and says so
@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md"])
def test_the_python_of_a_page_runs(
    page: str, scenes_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, scenes_model)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(names["images"]) == 4 and names["images"][0].image.dtype == "uint8"


@every_command
def test_a_quick_command_of_the_readme_runs(line: str, scenes_model: Path, tmp_path: Path, monkeypatch) -> None:
    name, *argv = shlex.split(line)
    if name not in QUICK:
        pytest.skip("takes longer than a test may")
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, scenes_model)
    expanded = [path for word in argv for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    assert main([name, *expanded]) == 0
