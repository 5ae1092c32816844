"""The verdict on the terminal: every table, and in sentences what failed and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ...report.verdict import failures, findings, tables
from .tables import placed


def show_verdict(console: Console, verdict: Mapping[str, Any]) -> None:
    for table in tables(verdict).values():
        console.print(placed(table), "")
    for sentence in [*failures(verdict), *findings(verdict)]:
        console.print(sentence, markup=False)
