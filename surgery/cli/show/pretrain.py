"""Where each variant of a training from nothing ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from .tables import new_table


def show_curves(console: Console, result: Mapping[str, Any], out) -> None:
    table = new_table(
        "After training", "variant", "loss", "ppl", "massive", "on text", "scale-free", "ratio", "sinks"
    )  # fmt: skip
    for name, found in result["variants"].items():
        last = found["measured"][-1]
        table.add_row(
            name, f"{last['loss']:.4f}", f"{last['ppl']:.2f}", f"{last['massive']:,}", f"{last['massive_on_text']:,}",
            f"{last['auto']:,}", f"{last['ratio']:,.1f}", f"{last['sink_rate']:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"\nCurves: {out}/curves.png, {out}/curves.json", markup=False)
    console.print(f"Look inside: surgery scan {out}/VARIANT --text FILE", markup=False)
