"""Tables of text that terminal, model card and report place, each in its own way, and figures beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .words import wrapped

PASSED, FAILED = "✓ passed", "✗ failed"  # cells that are coloured, where there are colours


@dataclass(frozen=True)
class Factors:
    """For a figure: by row, times what perplexity is of one reference, as a difference in NLL with its interval.

    Each row is a name and, by series ("original", "converted"), {"mean", "low", "high"} in nats; None is the reference
    itself in "original", and nothing in "converted".
    """

    title: str
    rows: Sequence[tuple[str, Mapping[str, Mapping[str, Any] | None]]]


@dataclass(frozen=True)
class Panel:
    """One line over steps, points (step, value); with `dots`, each point is drawn."""

    title: str
    points: Sequence[tuple[int, float]]
    dots: bool = False


@dataclass(frozen=True)
class Curves:
    """For a figure: panels over the same steps, and one step that is marked, with what it is."""

    panels: Sequence[Panel]
    marked: int
    mark: str


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; the first column names the row.

    The first `words` columns hold words, and stand left; others hold figures. `note` stands below the table, `text`
    explains it to readers who are new to it, `figure` is drawn beside it where there is room for one.
    """

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    text: str = ""
    figure: Factors | Curves | None = None
    words: int = 1

    def markdown(self) -> str:
        """Heading, text, table and note, for a model card."""
        sides = ["|---"] * self.words + ["|---:"] * (len(self.head) - self.words)
        lines = [_row(self.head), f"{''.join(sides)}|", *map(_row, self.rows)]
        parts = (f"### {self.title}", wrapped(self.text), "\n".join(lines), wrapped(plain(self.note)))
        return "\n\n".join(part for part in parts if part)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(map(plain, cells))} |"


def plain(text: str) -> str:
    """Text that Markdown shows as it is: a token may look like markup, as <s> does."""
    return re.sub(r"([\\`*<|\[])", r"\\\1", text.replace("\N{NO-BREAK SPACE}", " "))
