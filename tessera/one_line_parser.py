"""A command-line parser whose errors are one line, as all errors of the user's are."""

import argparse
from typing import Any, NoReturn

from tessera.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line as a UserError instead of usage plus exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the message and where to read more."""
        raise UserError(f"{message}; see `{self.prog} --help`")
