"""What `surgery clean` removed, and what it left alone."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from ...words import human
from .tables import new_table


def show_clean(console: Console, result: dict, dry_run: bool) -> None:
    did = _did(dry_run)
    rows = [(did, entry) for entry in result["removed"]] + [(_why(entry), entry) for entry in result["kept"]]
    if rows:
        table = new_table("Left by processes of surgery", "path", "what becomes of it", "bytes", words=2)
        for what, entry in rows:
            table.add_row(escape(entry["path"]), what, human(entry["bytes"]))
        console.print(table)


def cleaned(result: dict, dry_run: bool) -> str:
    """What became of it in one line."""
    count = len(result["removed"])
    return f"{count} {'directory' if count == 1 else 'directories'} {_did(dry_run)}, {human(result['bytes'])}"


def _did(dry_run: bool) -> str:
    return "would be removed" if dry_run else "removed"


def _why(entry: dict) -> str:
    if entry["state"] == "elsewhere":
        return escape(f"kept: clean it on {entry['host']}, which made it")
    if entry["state"] == "alive":
        return f"kept: process {entry['process']} works in it"
    return "kept: could not be removed"
