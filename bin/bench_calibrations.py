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
        "all three in turn": [*texts.values()],
    }


def measured(directory: Path, chunks: dict[str, torch.Tensor]) -> dict[str, Score]:
    engine = Served(directory, eager=True)
    try:
        return {kind: engine.score(ids) for kind, ids in chunks.items()}
    finally:
        engine.close()


class Found:
    """Scores by kind of text, as rows of a table: over those of the original in float32, with the far end."""

    def __init__(self, base: dict[str, Score], title: str) -> None:
        self.base, self.worst = base, 0.0
        self.table = Table(title=title, title_justify="left", min_width=len(title))
        for column in ("", *KINDS):
            self.table.add_column(column, justify="right" if column else "left")
        self.table.add_row("original, float32", *(f"{base[kind].ppl:.3f}" for kind in KINDS))

    def add(self, name: str, scores: dict[str, Score], ours: bool = True) -> None:
        ratios = [ratio(scores[kind], self.base[kind]) for kind in KINDS]
        cells = [f"{mean:.4f} ({far:.4f})" for mean, far in ratios]
        self.worst = max(self.worst, *(far for _, far in ratios)) if ours else self.worst
        self.table.add_row(name, *cells)
        print(f"{name}: {', '.join(cells)}", file=sys.stderr, flush=True)


def main(count: int) -> None:
    title = f"SmolLM2-135M in vLLM, {count} x 512 tokens: perplexity over float32's (far end of its 95% interval)"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with original() as plain:
            tokenizer = load_tokenizer(plain)
            chunks = {kind: chunks_of(tokenizer, MATERIAL / kind / "evaluation.txt", count) for kind in KINDS}
            found = Found(measured(plain, chunks), title)
            calibration = chunks_of(tokenizer, MATERIAL / "wikipedia" / "calibration.txt", 32)
            static = rounded_original(plain, scratch / "static", "w8a8_static", calibration)
            found.add("original, W8A8 static", measured(static, chunks), ours=False)
        for at, (name, files) in enumerate(calibration_sets(scratch).items()):
            out = converted(scratch / f"converted-{at}", files)
            found.add(f"w8a8-vllm, calibrated on {name}", measured(out, chunks))
            shutil.rmtree(out)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(found.table)
    console.print(f"The worst far end of all calibration sets and texts: {found.worst:.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
