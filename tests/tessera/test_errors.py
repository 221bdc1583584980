import errno
import subprocess
import sys

import pytest

from tessera.errors import UserError, run_command


def raising(error: BaseException):
    def command(argv):
        raise error

    return command


def test_a_command_returns_its_own_code():
    assert run_command(len, ["a", "b", "c"]) == 3


def test_a_user_error_is_one_line_and_code_2(capsys):
    assert run_command(raising(UserError("wrong\n  and    right")), []) == 2
    captured = capsys.readouterr()
    assert captured.err == "tessera: wrong and right\n"
    assert captured.out == ""


def test_an_interruption_says_how_to_go_on(capsys):
    assert run_command(raising(KeyboardInterrupt()), []) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_a_full_disk_is_one_line(capsys):
    assert run_command(raising(OSError(errno.ENOSPC, "No space left on device", "out/x.png")), []) == 2
    assert capsys.readouterr().err == (
        "tessera: out/x.png: No space left on device (make room, and run the same command again to go on from here)\n"
    )


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.ENOENT, "a bug"), KeyError("a bug")])
def test_our_own_mistakes_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_command(raising(error), [])


def test_a_closed_pipe_is_quiet():
    code = "import sys, tessera.errors as e; sys.exit(e.run_command(lambda argv: print('x' * 100000) or 0, []))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert errors == b""
