"""Measuring in tests: a reporter that keeps what it is told, and findings made by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from surgery.live.model import Live
from surgery.live.score import Score
from surgery.progress import Advance, Reporter
from surgery.survey.massive import LayerTally, MassiveActivations
from surgery.verification.gates.base import Measured, Subject


class Notes(Reporter):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def note(self, text: str) -> None:
        self.seen.append(text)


class Told(Reporter):
    """Keeps the total of the last bar, and what was told of every sequence."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.seen: list[str] = []

    @contextlib.contextmanager
    def bar(self, what: str, total: int | None) -> Iterator[Advance]:
        self.total = total
        yield lambda count, what: self.seen.extend([what] * count)


def subject(live: Live, chunks: torch.Tensor, reporter: Reporter, *, original: bool = True) -> Subject:
    """What a gate measures, without tokenizer and calibration text."""
    return Subject(live, None, original, chunks, None, reporter)


def counted(massive: int) -> MassiveActivations:
    """As if it had seen so many massive activations, on one token in dim 3 of layer 4."""
    seen = MassiveActivations()
    tally = LayerTally(sequences=1, count=massive, worst=2.0 if massive else 0.0)
    tally.dims[3], tally.tokens[5] = massive, massive
    seen.layers[4] = tally
    return seen


def measured(massive: int = 0, **scores: Score) -> Measured:
    """Scores by variant, and `massive` massive activations wherever they are counted."""
    seen = {variant: counted(massive) for variant in scores}
    return Measured(scores, {"massive_activations": seen})
