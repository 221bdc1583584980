import sys
import types

import pytest

import tessera
from tessera.__main__ import COMMANDS, Command, main


@pytest.fixture
def received(monkeypatch):
    """Registers a command `probe` and returns the list of the arguments that it received."""
    calls: list[list[str]] = []
    module = types.ModuleType("probe_module")
    module.run = lambda argv: calls.append(list(argv)) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probe_module", module)
    monkeypatch.setitem(COMMANDS, "probe", Command("probe_module:run", "a probe"))
    return calls


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(argv, capsys):
    assert main(argv) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in text
        assert command.help in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tessera {tessera.__version__}\n"


def test_a_command_receives_the_other_arguments_and_gives_the_code(received):
    assert main(["probe", "a.yaml", "--help", "k=v"]) == 7
    assert received == [["a.yaml", "--help", "k=v"]]


def test_arguments_default_to_those_of_the_process(received, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tessera", "probe", "x"])
    assert main() == 7
    assert received == [["x"]]


def test_a_misspelt_command_is_corrected(capsys):
    assert main(["generte"]) == 2
    assert capsys.readouterr().err == "tessera: unknown command 'generte', did you mean 'generate'?\n"


def test_an_unknown_command_lists_them_all(capsys):
    assert main(["xyzzy"]) == 2
    assert "expected one of fit, ingest, generate" in capsys.readouterr().err


def test_errors_of_commands_become_one_line(capsys):
    assert main(["info", "/nonexistent/model"]) == 2
    assert capsys.readouterr().err == "tessera: /nonexistent/model: no such file or folder\n"
