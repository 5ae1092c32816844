"""Where results, notes and complaints are shown."""

from __future__ import annotations

import sys

from rich.console import Console


class _Output(Console):
    """Standard output; a reader that has gone away does not change how the command ends, for its work is done."""

    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()
        except SystemExit:
            pass


def output() -> Console:
    """Where results are shown; when it is not a terminal, wide enough that no table is cut."""
    return _Output(highlight=False, width=None if sys.stdout.isatty() else 180)


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Warnings as notes for a person, without the place in the code."""
    Console(stderr=True, highlight=False).print("  [yellow]note[/]", end=" ")
    print(message, file=sys.stderr)


def complain(sentence: str) -> None:
    """One sentence on standard error, as it is: a path in it may look like markup."""
    Console(stderr=True, highlight=False).print("[bold red]error[/]", end=" ")
    print(sentence if sentence.endswith(".") else f"{sentence}.", file=sys.stderr)
