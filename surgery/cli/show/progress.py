"""Progress on the terminal, by rich."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from ...plain import shown
from ...progress import Reporter
from ...words import human
from .console import Told

LOG_SECONDS = 30


class TerminalReporter(Reporter):
    """Steps, bars and notes on standard error, so that standard output holds only results."""

    def __init__(self) -> None:
        self.console = Told()

    def step(self, text: str) -> None:
        self._line(f"[bold]•[/] {escape(text)}")

    def note(self, text: str) -> None:
        self._line(f"  [yellow]note[/] {escape(text)}")

    def _line(self, text: str) -> None:
        # A log has no width: only a terminal breaks lines.
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    @contextlib.contextmanager
    def bar(self, what: str, total: int | None, *, of_bytes: bool = False) -> Iterator:
        if not self.console.is_terminal:
            yield self._log_lines(total, human if of_bytes else "{:,}".format)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("  {task.description}"),
            BarColumn(),
            DownloadColumn() if of_bytes else MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count, what: progress.update(task, advance=count, description=escape(shown(what)))

    def _log_lines(self, total: int | None, shown: Callable[[int], str]):
        """For logs, which cannot redraw a bar: a line every half minute, with counts as `shown` writes them."""
        done, start, told = 0, time.monotonic(), time.monotonic()

        def advance(count: int, what: str) -> None:
            nonlocal done, told
            done += count
            if time.monotonic() - told >= LOG_SECONDS:
                told = time.monotonic()
                of = f" of {shown(total)}" if total is not None else ""
                self._line(f"  {escape(what)}: {shown(done)}{of} after {told - start:.0f} s")

        return advance
