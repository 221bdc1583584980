"""The user's mistakes: one line each, never a traceback, and the exit codes of every command."""

import errno
import os
import sys
from collections.abc import Callable, Sequence

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what shells report
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

# Conditions of the machine that the user can mend and that a traceback would only bury.
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


class UserError(ValueError):
    """Something that the user can put right; the message is one line: what was wrong, and what would be right."""


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command and turns the ways in which it can be stopped into exit codes.

    Args:
        command: a command's `main`.
        argv: its arguments, without the program's name.

    Returns:
        The command's own code; 2 after a `UserError` or a full or read-only disk, 130 after Ctrl-C, 141 when the reader
        of a pipe has gone away.
    """
    try:
        code = command(argv)
        sys.stdout.flush()  # a broken pipe shows here, and not in the interpreter's shutdown
        return code
    except UserError as error:
        return _complain(str(error), EXIT_USER_ERROR)
    except KeyboardInterrupt as stop:
        return _complain(
            f"interrupted; {str(stop) or 'run the same command again to go on from here'}", EXIT_INTERRUPTED
        )
    except BrokenPipeError:
        # Python would flush stdout once more at exit and print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        cure = " (make room, and run the same command again to go on from here)" if error.errno == errno.ENOSPC else ""
        return _complain(f"{place}{error.strerror}{cure}", EXIT_USER_ERROR)


def _complain(message: str, code: int) -> int:
    print(f"tessera: {' '.join(message.split())}", file=sys.stderr)
    return code
