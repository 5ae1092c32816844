"""The real model in vLLM: perplexity on three kinds of text, and tokens a second, side by side in one run.

    bench_serve.py [CHUNKS]     so many chunks of 512 tokens of each kind (16 unless said)

Every checkpoint is compiled and served by a process of its own, and all of them are timed in turn, so that a slow
moment of the machine hits all. Seconds are medians over rounds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from serving import KINDS, MATERIAL, Served, chunks_of, converted, original, ratio, rounded_original

from surgery.live.loading import load_tokenizer

ROUNDS = 3
PREFILL = [4, 512]  # requests at once, tokens of each
DECODE = [8, 16, 64]  # requests at once, tokens of each, tokens generated after it
FLOAT, BF16 = "original, float32", "original, bfloat16"


def served(plain: Path, tokenizer: Any, scratch: Path) -> dict[str, Served]:
    """What is compared: name -> the checkpoint in vLLM."""
    texts = [MATERIAL / kind / "calibration.txt" for kind in KINDS]
    calibration = chunks_of(tokenizer, texts[0], 32)
    dynamic, static = (
        rounded_original(plain, scratch / scheme, scheme, calibration) for scheme in ("w8a8_dynamic", "w8a8_static")
    )
    made = converted(scratch / "converted", texts)
    return {
        FLOAT: Served(plain),
        BF16: Served(plain, "bfloat16"),
        "original, W8A8 dynamic": Served(dynamic, "bfloat16"),
        "original, W8A8 static": Served(static, "bfloat16"),
        "w8a8-vllm": Served(made, "bfloat16"),
        "w8a8-vllm, the rest in float32": Served(made),
    }


def tokens_a_second(engines: dict[str, Served]) -> dict[str, dict[str, float]]:
    """What was asked -> name -> tokens a second."""
    asked = {
        "prefill": (PREFILL, PREFILL[0] * PREFILL[1]),
        "decode": (DECODE, DECODE[0] * DECODE[2]),
        "decode alone": ([1, *DECODE[1:]], DECODE[2]),
    }
    found = {}
    for what, (shape, tokens) in asked.items():
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for round_ in range(ROUNDS + 1):
            for name, engine in engines.items():
                spent = engine.ask(**{what.split()[0]: shape})
                if round_:  # the first warms up
                    seconds[name].append(spent)
        found[what] = {name: tokens / statistics.median(spent) for name, spent in seconds.items()}
    return found


def main(count: int) -> None:
    with original() as plain, tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(plain)
        engines = served(plain, tokenizer, Path(scratch))
        speeds = tokens_a_second(engines)
        scores = {
            kind: {name: engine.score(chunks) for name, engine in engines.items()}
            for kind in KINDS
            for chunks in [chunks_of(tokenizer, MATERIAL / kind / "evaluation.txt", count)]
        }
        for engine in engines.values():
            engine.close()
    title = (
        f"SmolLM2-135M in vLLM: tokens a second (over {BF16}), and perplexity over that of {FLOAT}, {count} x 512 "
        "tokens, with the far end of its 95% interval"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in (*speeds, *KINDS):
        table.add_column(column, justify="right")
    for name in engines:
        cells = [f"{found[name]:.0f} ({found[name] / found[BF16]:.2f}x)" for found in speeds.values()]
        for found in scores.values():
            if name == FLOAT:
                cells.append(f"{found[name].ppl:.3f}")
            else:
                cells.append("{:.4f} (< {:.4f})".format(*ratio(found[name], found[FLOAT])))
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
