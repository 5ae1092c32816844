"""An export on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ...words import count_of, human, number


def show_export(console: Console, exported: Mapping[str, Any], out: Path) -> None:
    """What was written, and what was found."""
    console.print(exported["proof"], markup=False)
    if (ppl := exported.get("perplexity")) is not None:
        console.print(
            f"Perplexity {number(ppl['exported']['ppl'], 9)}, of the converted checkpoint "
            f"{number(ppl['converted']['ppl'], 9)}; the largest |delta log-probability| of a token is "
            f"{exported['delta_log_probability']:.2g}, the mean {exported['mean_delta_log_probability']:.2g}.",
            markup=False,
        )
    if exported["passed"] is not False:
        for name, file in exported["files"].items():
            console.print(f"  {name}: {human(file['bytes'])}", markup=False)
        console.print(f"How to use it: {out / 'README.md'}", markup=False)


def outcome(exported: Mapping[str, Any], out: Path) -> str:
    """The last line."""
    if exported["passed"] is False:
        return f"failed: {out} was not written"
    files = exported["files"]
    size = f"{count_of(len(files), 'file')}, {human(sum(file['bytes'] for file in files.values()))}"
    return f"wrote {out} for {exported['engine']}: {size}{'' if exported['passed'] else ', not measured on text'}"
