"""What a command shows: all, or with --quiet its last line; on standard error where a result takes standard output."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..checkpoint.results import STDOUT
from ..progress import SILENT, Reporter
from .show.console import Told, output


class Screen:
    """`tables`: where tables and sentences go. `reporter`: who is told of progress."""

    def __init__(self, quiet: bool, *results: Path | None) -> None:
        self._lines: Console = Told() if STDOUT in results else output()
        self.tables = Console(quiet=True) if quiet else self._lines
        self.reporter: Reporter = SILENT
        if not quiet:
            from .show.progress import TerminalReporter

            self.reporter = TerminalReporter()

    def end(self, line: str) -> None:
        """The last line: what came of it."""
        self._lines.print(line, markup=False, soft_wrap=True)
