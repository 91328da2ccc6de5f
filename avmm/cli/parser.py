"""What the subcommands' parsers have in common."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn, TypeAlias

from avmm.cli.exitcodes import ExitCode


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and takes options by their whole name: what is short for one may be for two."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """End with a line about bad usage."""
        self.exit(ExitCode.USAGE, f"avmm: {message}; see {self.prog} --help\n")


#: Where a subcommand declares itself.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def seconds(text: str) -> float:
    """A positive number of seconds, as an option's value."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value
