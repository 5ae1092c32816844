"""How much a quantised checkpoint depends on the text that its scales are from: the recipe w8a8-vllm in vLLM's kernels.

    bench_calibrations.py [CHUNKS]     so many chunks of 512 tokens of each kind of text to read (64 unless said)

The whole recipe is run anew for every calibration set (smoothing is fitted to it too), exported, and measured in vLLM
on three kinds of text that nothing was fitted on; the original in float32 is the measure. No two sets share a text but
the last, which takes turns in three kinds as the recipe advises.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from serving import KINDS, MATERIAL, Served, chunks_of, converted, original, ratio, rounded_original

from surgery.live.loading import load_tokenizer
from surgery.live.score import Score
from surgery.live.text import split_text


def calibration_sets(scratch: Path) -> dict[str, list[Path]]:
    """Name -> its files."""
    texts = {kind: MATERIAL / kind / "calibration.txt" for kind in KINDS}
    halves = []
    for at, half in enumerate(split_text(texts["wikipedia"].read_text(encoding="utf-8"))):
        halves.append(scratch / f"half-{at}.txt")
        halves[-1].write_text(half, encoding="utf-8")
    return {
        "wikipedia, first half": halves[:1],
        "wikipedia, second half": halves[1:],
        "news": [texts["news"]],
        "technical": [texts["technical"]],
        "all three": [*texts.values()],
    }


def measured(directory: Path, chunks: dict[str, torch.Tensor]) -> dict[str, Score]:
    engine = Served(directory, eager=True)
    try:
        return {kind: engine.score(ids) for kind, ids in chunks.items()}
    finally:
        engine.close()


def main(count: int) -> None:
    title = f"SmolLM2-135M in vLLM, {count} x 512 tokens: perplexity over that of float32 (far end of 95%)"
    table = Table(title=title, title_justify="left")
    for column in ("calibrated on", *KINDS):
        table.add_column(column, justify="left" if column == "calibrated on" else "right")
    console, worst = Console(width=None if sys.stdout.isatty() else 120), 0.0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with original() as plain:
            tokenizer = load_tokenizer(plain)
            chunks = {kind: chunks_of(tokenizer, MATERIAL / kind / "evaluation.txt", count) for kind in KINDS}
            base = measured(plain, chunks)
            table.add_row("(original, float32)", *(f"{base[kind].ppl:.3f}" for kind in KINDS))
            calibration = chunks_of(tokenizer, MATERIAL / "wikipedia" / "calibration.txt", 32)
            static = measured(rounded_original(plain, scratch / "static", "w8a8_static", calibration), chunks)
            table.add_row(
                "(original, W8A8 static)", *("{:.4f} ({:.4f})".format(*ratio(static[k], base[k])) for k in KINDS)
            )
        for at, (name, files) in enumerate(calibration_sets(scratch).items()):
            out = scratch / f"converted-{at}"
            found = measured(converted(out, files), chunks)
            ratios = {kind: ratio(found[kind], base[kind]) for kind in KINDS}
            worst = max(worst, *(far for _, far in ratios.values()))
            table.add_row(name, *("{:.4f} ({:.4f})".format(*ratios[kind]) for kind in KINDS))
            console.print(name, {kind: "{:.4f} ({:.4f})".format(*ratios[kind]) for kind in KINDS})
            shutil.rmtree(out)
    console.print(table)
    console.print(f"The worst far end of all calibration sets and texts: {worst:.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
