"""Imports point one way, heavy libraries stay behind their doors, and there are no drawers."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tessera.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]

BELOW = {  # package -> the packages of ours that it may import, besides itself
    "tessera": set(),
    "dvae": {"tessera"},
    "transformer": {"tessera"},
    "scorer": {"tessera"},
    "sampling": {"tessera", "dvae", "transformer", "scorer"},
    "recipes": {"tessera", "dvae", "transformer", "scorer", "sampling"},
    "benchmarks": {"tessera", "dvae", "transformer", "scorer", "sampling", "recipes"},
}
FILES = sorted(file for package in BELOW for file in (ROOT / package).rglob("*.py"))
NAMES = [str(file.relative_to(ROOT)) for file in FILES]


def imported_modules(file: Path) -> Iterator[str]:
    """Every module named in an import of a file, those inside functions and type-checking blocks included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_every_package_of_the_checkout_has_its_place_in_the_layers() -> None:
    assert {init.parent.name for init in ROOT.glob("*/__init__.py")} <= set(BELOW)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_imports_point_down(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    above = set(BELOW) - BELOW[package] - {package}
    wrong = {module for module in imported_modules(file) if module.split(".")[0] in above}
    assert not wrong, f"{package} must not import {sorted(wrong)}"


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_inside_a_package_only_train_stands_above_lit(file: Path) -> None:
    package, *_, name = file.relative_to(ROOT).with_suffix("").parts
    modules = set(imported_modules(file))
    if name != "train":
        assert not modules & {f"{package}.lit", f"{package}.train"}
    if {"kernels", "quantizers"} & set(file.parts):
        assert f"{package}.model" not in modules


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_lightning_stays_in_its_rooms(file: Path) -> None:
    place = file.relative_to(ROOT).as_posix()
    if file.name in ("lit.py", "train.py") or place.startswith("tessera/training/"):
        return
    assert not {module.split(".")[0] for module in imported_modules(file)} & {"lightning", "pytorch_lightning"}


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_triton_stays_in_the_kernels(file: Path) -> None:
    if "kernels" not in file.parts:
        assert "triton" not in {module.split(".")[0] for module in imported_modules(file)}


def test_using_a_model_needs_neither_lightning_nor_triton() -> None:
    modules = [f"sampling.{file.stem}" for file in (ROOT / "sampling").glob("[a-z]*.py")]
    code = f"""
import sys, dvae, transformer, sampling
import dvae.model, transformer.model, scorer.model, {", ".join(modules)}
print(sorted({{name.split(".")[0] for name in sys.modules}} & {{"lightning", "pytorch_lightning", "triton"}}))
"""
    assert run_python(code).strip() == "[]"


def test_tessera_help_imports_no_torch() -> None:
    code = """
import sys
from tessera.__main__ import main
assert main(["--help"]) == 0
print(sorted({"torch", "numpy", "lightning", "omegaconf"} & set(sys.modules)))
"""
    assert run_python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_main_function(name: str) -> None:
    module, function = COMMANDS[name].target.split(":")
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    definitions = [
        node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    assert function in [definition.name for definition in definitions]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_file_is_named_for_one_idea_and_says_it(file: Path) -> None:
    assert file.stem not in ("utils", "util", "helpers", "common", "misc")
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 600, "split it"
    assert ast.get_docstring(ast.parse(text)), "the first line of a file says what it is for"


def test_the_tests_are_no_packages() -> None:
    # With --import-mode=importlib, tests/transformer/__init__.py would shadow the package of that name.
    assert not list((ROOT / "tests").rglob("__init__.py"))
