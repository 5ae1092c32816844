"""The command line: commands, and what the screen shows of their results; `--json` gives the same to machines."""

import sys

from ..endings.signals import command_begins, command_ends

__all__ = ["main"]


def main() -> None:
    """Entry point of the `surgery` command. Signals are caught first: what is imported next takes a moment."""
    command_begins()
    from .entry import command

    sys.exit(command_ends(command()))
