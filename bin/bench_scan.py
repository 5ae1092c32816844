"""What a survey costs, against a plain forward pass with logits and against the naive way, on the same text in one run.

    bench_scan.py GGUF TEXT                     the table
    bench_scan.py GGUF TEXT VARIANT LENGTH N    peak memory of one variant on N sequences, in bytes

Each sequence goes through every variant before the next one does, so that a slow moment of the machine hits all of
them; memory is that of a process that does nothing else. The naive way asks transformers for all hidden states and all
attention weights, and computes from those.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from surgery.anatomy.sites import examine
from surgery.live.likelihood import Likelihood
from surgery.live.model import Live
from surgery.live.stream import Observer, stream
from surgery.survey.attention import AttentionStatistics
from surgery.survey.full import FullSurvey
from surgery.survey.massive import MassiveActivations

SEQUENCES = {512: 15, 2048: 5}  # `FullSurvey` takes spectra of one in 15, and in 5
LONGER = 4  # times as many, for memory


class Bench:
    """The real model, and what is timed on it: each variant takes one sequence (1, T) after the other."""

    def __init__(self, gguf: Path, text: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        self.live = Live(self.model, examine(self.model.config.to_dict()))
        words = text.read_text(encoding="utf-8")[:400_000]
        self.ids = torch.tensor(tokenizer(words)["input_ids"])

    def sequences(self, length: int, count: int) -> list[torch.Tensor]:
        repeats = -(-length * count // len(self.ids))
        return list(self.ids.repeat(repeats)[: length * count].view(count, 1, length))

    def variants(self, length: int) -> dict[str, Callable[[torch.Tensor], None]]:
        return {
            "forward with logits": self.forward,
            "massive activations and sinks": self.streamed([MassiveActivations(), AttentionStatistics(every=4)]),
            "the same and perplexity": self.streamed(
                [MassiveActivations(), AttentionStatistics(every=4), Likelihood()]
            ),
            "everything": self.streamed(FullSurvey(self.live, length).observers),
            "naive": self.naive,
        }

    def streamed(self, observers: list[Observer]) -> Callable[[torch.Tensor], None]:
        return lambda ids: stream(self.live, ids, observers)

    def forward(self, ids: torch.Tensor) -> None:
        self.model(input_ids=ids, use_cache=False)

    def naive(self, ids: torch.Tensor) -> None:
        config, before = self.model.config, self.model.config._attn_implementation
        config._attn_implementation = "eager"
        out = self.model(input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=True)
        for states in out.hidden_states:
            states[0].abs().max(), states[0].abs().median(), states[0].norm(dim=-1)
            share = torch.linalg.svdvals(states[0]).square()
            torch.special.entr(share / share.sum()).sum()
        for weights in out.attentions:
            weights[0, :, :, 0].mean(dim=1), torch.special.entr(weights[0]).sum(dim=-1)
        config._attn_implementation = before


def seconds(variants: dict[str, Callable], sequences: list[torch.Tensor]) -> dict[str, float]:
    """Of each variant on all sequences, interleaved; the first sequence is run once more before, to warm up."""
    spent = dict.fromkeys(variants, 0.0)
    for call in variants.values():
        call(sequences[0])
    for ids in sequences:
        for name, call in variants.items():
            start = time.perf_counter()
            call(ids)
            spent[name] += time.perf_counter() - start
    return spent


def peak(variant: str, length: int, count: int) -> float:
    """GiB at the peak of a process that does nothing else."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:3], variant, str(length), str(count)], check=True, capture_output=True
    )
    return int(done.stdout.split()[-1]) / 2**30


def own_peak() -> int:
    """Bytes at the peak of this process, from /proc where there is one: getrusage counts what the parent held too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def main(gguf: Path, text: Path) -> None:
    bench, few = Bench(gguf, text), 2
    table = Table(title=f"A survey of SmolLM2-135M, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("tokens", "", "s/sequence", "of forward", f"GiB, {few} sequences", f"{LONGER * few} sequences"):
        table.add_column(column, justify="left" if not column else "right")
    for length, count in SEQUENCES.items():
        with torch.inference_mode():
            variants = bench.variants(length)
            spent = seconds(variants, bench.sequences(length, count))
        base = spent["forward with logits"]
        for name, total in spent.items():
            table.add_row(
                str(length), name, f"{total / count:.2f}", f"{total / base:.2f}x", f"{peak(name, length, few):.2f}",
                f"{peak(name, length, LONGER * few):.2f}" if name == "everything" else "",
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
            run = one.variants(int(sys.argv[4]))[sys.argv[3]]
            for ids in one.sequences(*map(int, sys.argv[4:])):
                run(ids)
        print(own_peak())
