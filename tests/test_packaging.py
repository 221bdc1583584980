"""The packages have common names: they must come from this checkout, and all that they import must be declared."""

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

import tessera

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
NOT_INSTALLED = {"benchmarks"}  # run from the checkout only
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
}  # import names that differ from those of their distributions


def test_the_list_in_pyproject_is_what_is_in_the_tree() -> None:
    in_the_tree = {init.parent.name for init in ROOT.glob("*/__init__.py")} - NOT_INSTALLED
    assert sorted(PACKAGES) == sorted(in_the_tree)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_resolves_inside_the_checkout(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} cannot be imported"
    assert Path(spec.origin).resolve().is_relative_to(ROOT), f"{package} is shadowed by {spec.origin}"


def test_no_module_hides_one_of_the_standard_library() -> None:
    hidden = {file.stem for package in PACKAGES for file in (ROOT / package).rglob("*.py")} & sys.stdlib_module_names
    assert not hidden


def test_everything_imported_is_declared() -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(item for name in extras if name != "dev" for item in extras[name])]
    declared = {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}
    imported = set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(str(node.module).split(".")[0])
    third_party = imported - sys.stdlib_module_names - set(PACKAGES)
    assert {DISTRIBUTIONS.get(name, name) for name in third_party} <= declared


def test_the_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", tessera.__version__)
