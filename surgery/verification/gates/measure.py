"""Measure a model on chunks of text: perplexity with and without a prefix, massive activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ...anatomy.sites import Anatomy
from ...live.likelihood import Likelihood, Score
from ...live.stream import stream
from ...survey.massive import MassiveActivations
from .tasks import TaskScores

Progress = Callable[[str, int], None]  # what is measured, sequences done since the last call


@dataclass(frozen=True)
class Measurement:
    """What one pass found. `massive` is None where it was not asked for.

    And, where a recipe asks for it (of the bare original and of the converted model): `quantised` by scheme,
    simulated, and `executed` in int8, `streaming` through a window, by how many first tokens are kept.
    """

    score: Score
    massive: dict | None = None
    quantised: dict[str, Score] = field(default_factory=dict)
    executed: dict[str, Score] = field(default_factory=dict)
    streaming: dict[int, Score] = field(default_factory=dict)
    edits: dict[tuple[str, int], Score] = field(default_factory=dict)
    tasks: TaskScores = field(default_factory=dict)


@dataclass(frozen=True)
class Original:
    """The source model on the evaluation text: bare, behind BOS (None where it has none), behind the folded prefix.

    Where nothing was folded, the last is the first.
    """

    bare: Measurement
    bos: Measurement | None
    control: Measurement


def measure(
    model: PreTrainedModel, anatomy: Anatomy, chunks: torch.Tensor, what: str, progress: Progress,
    prefix: Sequence[int] = (), massive: bool = False,
) -> Measurement:  # fmt: skip
    """Score `chunks` (N, T) behind `prefix`; every variant is scored on the same tokens."""
    likelihood, found = Likelihood(), MassiveActivations()
    observers = [likelihood, found] if massive else [likelihood]
    stream(model, anatomy, chunks, observers, prefix=prefix, progress=lambda done: progress(what, done))
    return Measurement(likelihood.score, found.summary() if massive else None)


def baseline_passes(prefix: Sequence[int], bos: int | None) -> int:
    """How many passes over the text `measure_original` makes, for a progress bar."""
    return 1 + len({tuple(prefix), () if bos is None else (bos,)} - {()})


def measure_original(
    model: PreTrainedModel,
    anatomy: Anatomy,
    chunks: torch.Tensor,
    prefix: Sequence[int],
    bos: int | None,
    progress: Progress,
) -> Original:
    """The three baselines of the unchanged model; without a prefix, the control is the bare model."""
    bare = measure(model, anatomy, chunks, "bare original", progress, massive=True)
    control = measure(model, anatomy, chunks, "original + prefix", progress, prefix) if prefix else bare
    if bos is None:
        return Original(bare, None, control)
    same = tuple(prefix) == (bos,)  # then the control is the BOS baseline, and need not run twice
    return Original(
        bare, control if same else measure(model, anatomy, chunks, "original + BOS", progress, (bos,)), control
    )
