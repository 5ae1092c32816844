"""The verdict on the terminal: every table, and the outcome in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ...report.verdict import sentences, tables
from .tables import placed


def show_verdict(console: Console, verdict: Mapping[str, Any]) -> None:
    for table in tables(verdict).values():
        console.print(placed(table), "")
    for sentence in sentences(verdict):
        console.print(sentence, markup=False)
