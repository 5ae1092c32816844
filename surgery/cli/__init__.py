"""The command line: commands, and what the screen shows of their results; `--json` gives the same to machines."""

from .entry import main

__all__ = ["main"]
