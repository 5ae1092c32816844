"""How every table on the terminal looks."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table as RichTable

from ...table import FAILED, PASSED, Table

COLOURS = {PASSED: "green", FAILED: "red"}


def new_table(title: str, *columns: str, words: int = 1) -> RichTable:
    """`words`: how many columns hold words, and stand left."""
    table = RichTable(title=title, title_justify="left", title_style="bold", header_style="", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < words else "right", overflow="fold")
    return table


def placed(table: Table) -> RichTable:
    """A table as rich shows it, its note below; without the text, which is for readers new to it."""
    shown = new_table(escape(table.title), *map(escape, table.head), words=table.words)
    for row in table.rows:
        shown.add_row(*(f"[{COLOURS[cell]}]{cell}[/]" if cell in COLOURS else escape(cell) for cell in row))
    if table.note:
        shown.caption, shown.caption_justify = escape(table.note), "left"
    return shown
