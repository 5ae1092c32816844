"""How every table on the terminal looks."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table as RichTable

from ...plain import shown
from ...table import FAILED, PASSED, Table

COLOURS = {PASSED: "green", FAILED: "red"}


class _Shown(RichTable):
    """A table whose cells hold nothing that a terminal would obey."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(shown(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def new_table(title: str, *columns: str, words: int = 1) -> RichTable:
    """`words`: how many columns hold words, and stand left."""
    table = _Shown(
        title=shown(title), title_justify="left", title_style="bold", header_style="", box=None, pad_edge=False
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < words else "right", overflow="fold")
    return table


def placed(table: Table) -> RichTable:
    """A table as rich shows it, its note below; without the text, which is for readers new to it."""
    placed = new_table(escape(table.title), *map(escape, table.head), words=table.words)
    for row in table.rows:
        placed.add_row(*(f"[{COLOURS[cell]}]{cell}[/]" if cell in COLOURS else escape(cell) for cell in row))
    if table.note:
        placed.caption, placed.caption_justify = shown(escape(table.note)), "left"
    return placed
