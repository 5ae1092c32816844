"""What `surgery clean` removed, and what it left alone."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from ...words import human
from .tables import new_table


def show_clean(console: Console, result: dict, dry_run: bool) -> None:
    did = "would be removed" if dry_run else "removed"
    rows = [(did, entry) for entry in result["removed"]] + [(_why(entry), entry) for entry in result["kept"]]
    if rows:
        table = new_table("Left by processes of surgery", "path", "what becomes of it", "bytes", words=2)
        for what, entry in rows:
            table.add_row(escape(entry["path"]), what, human(entry["bytes"]))
        console.print(table)
    count = len(result["removed"])
    console.print(f"{count} {'directory' if count == 1 else 'directories'} {did}, {human(result['bytes'])}")


def _why(entry: dict) -> str:
    if entry["state"] == "elsewhere":
        return escape(f"kept: clean it on {entry['host']}, which made it")
    if entry["state"] == "alive":
        return f"kept: process {entry['process']} works in it"
    return "kept: could not be removed"
