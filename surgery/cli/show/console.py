"""Where results, notes and complaints are shown: what a terminal would obey in them is escaped here."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from rich.console import Console

from ...errors import LONGEST_SENTENCE, OutputError
from ...plain import cut, shown


class _Output(Console):
    """Standard output; a reader that has gone away does not change how the command ends, for its work is done."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*map(_safe, objects), **options)
        except OSError as error:
            raise OutputError(f"standard output cannot be written ({error.strerror})") from error

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class Told(Console):
    """Standard error: what cannot be told there does not stop the work."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*map(_safe, objects), **options)


def output() -> Console:
    """Where results are shown; when it is not a terminal, wide enough that no table is cut. OutputError if closed."""
    if sys.stdout is None:
        raise OutputError("standard output is closed, so results cannot be shown; open it, or send it to /dev/null")
    return _Output(highlight=False, width=None if sys.stdout.isatty() else 180)


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Warnings as notes for a person, without the place in the code."""
    Told().print("  [yellow]note[/]", end=" ")
    _line(str(message))


def complain(sentence: str) -> None:
    """One sentence on standard error, as it is: a path in it may look like markup."""
    Told().print("[bold red]error[/]", end=" ")
    _line(f"{cut(shown(sentence), LONGEST_SENTENCE).rstrip('.')}.")


def _line(text: str) -> None:
    with contextlib.suppress(OSError):
        print(shown(text), file=sys.stderr)


def _safe(shown_object: Any) -> Any:
    """Text with what a terminal would obey escaped, but for one line break before it, which is ours."""
    if not isinstance(shown_object, str):
        return shown_object
    text = shown_object.removeprefix("\n")
    return shown_object[: len(shown_object) - len(text)] + shown(text)
