"""What a survey costs, against a plain forward pass with logits and against the naive way, on the same text in one run.

    bench_scan.py GGUF TEXT                     the table: seconds, interleaved; and peak memory, a process for each
    bench_scan.py GGUF TEXT VARIANT LENGTH N    peak memory of one variant on N sequences, in bytes

The naive way asks transformers for all hidden states and all attention weights, and computes from those.
"""

from __future__ import annotations

import functools
import resource
import subprocess
import sys
from pathlib import Path

import torch
from bench import medians
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from surgery.anatomy.sites import examine
from surgery.survey.attention import AttentionStatistics
from surgery.survey.full import survey
from surgery.survey.likelihood import Likelihood
from surgery.survey.massive import MassiveActivations
from surgery.survey.stream import stream

LENGTHS, SEQUENCES, ROUNDS = (512, 2048), 4, 3


class Bench:
    """The real model, and what is timed on it."""

    def __init__(self, gguf: Path, text: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        self.anatomy = examine(self.model.config.to_dict())
        words = text.read_text(encoding="utf-8")[:400_000]
        self.ids = torch.tensor(self.tokenizer(words)["input_ids"])

    def chunks(self, length: int, count: int) -> torch.Tensor:
        repeats = -(-length * count // len(self.ids))
        return self.ids.repeat(repeats)[: length * count].view(count, length)

    def forward(self, chunks: torch.Tensor) -> None:
        for row in chunks:
            self.model(input_ids=row[None], use_cache=False)

    def massive_and_sinks(self, chunks: torch.Tensor) -> None:
        stream(self.model, self.anatomy, chunks, [MassiveActivations(), AttentionStatistics(), Likelihood()])

    def everything(self, chunks: torch.Tensor) -> None:
        survey(self.model, self.anatomy, self.tokenizer, chunks)

    def naive(self, chunks: torch.Tensor) -> None:
        config, before = self.model.config, self.model.config._attn_implementation
        config._attn_implementation = "eager"
        for row in chunks:
            out = self.model(input_ids=row[None], use_cache=False, output_hidden_states=True, output_attentions=True)
            for states in out.hidden_states:
                states[0].abs().max(), states[0].abs().median(), states[0].norm(dim=-1)
                share = torch.linalg.svdvals(states[0]).square()
                torch.special.entr(share / share.sum()).sum()
            for weights in out.attentions:
                weights[0, :, :, 0].mean(dim=1), torch.special.entr(weights[0]).sum(dim=-1)
        config._attn_implementation = before


VARIANTS = ("forward", "massive_and_sinks", "everything", "naive")


def peak(variant: str, length: int, count: int) -> float:
    """GiB at the peak of a process that does nothing else."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:3], variant, str(length), str(count)], check=True, capture_output=True
    )
    return int(done.stdout.split()[-1]) / 2**30


def main(gguf: Path, text: Path) -> None:
    bench = Bench(gguf, text)
    table = Table(title=f"A survey of {SEQUENCES} sequences, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("tokens", "", "seconds", "of forward", "peak GiB", f"GiB at {4 * SEQUENCES} sequences"):
        table.add_column(column, justify="left" if not column else "right")
    for length in LENGTHS:
        chunks = bench.chunks(length, SEQUENCES)
        with torch.inference_mode():
            calls = {name: functools.partial(getattr(bench, name), chunks) for name in VARIANTS}
            seconds = medians(calls, ROUNDS)
        for name in VARIANTS:
            longer = f"{peak(name, length, 4 * SEQUENCES):.2f}" if name == "everything" else ""
            table.add_row(
                str(length), name.replace("_", " "), f"{seconds[name]:.2f}",
                f"{seconds[name] / seconds['forward']:.2f}x", f"{peak(name, length, SEQUENCES):.2f}", longer,
            )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if len(sys.argv) == 3:
        main(*map(Path, sys.argv[1:]))
    else:
        with torch.inference_mode():
            one = Bench(*map(Path, sys.argv[1:3]))
            getattr(one, sys.argv[3])(one.chunks(*map(int, sys.argv[4:])))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
