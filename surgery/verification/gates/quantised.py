"""Score text under every scheme that a recipe names: simulated, and executed too where it says so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence

import torch
from transformers import PreTrainedModel

from ...anatomy.sites import Anatomy
from ...live.executed import executing
from ...live.likelihood import Likelihood, Score
from ...live.quantised import SCHEMES, activation_ranges, quantised
from ...live.stream import stream


def quantised_passes(
    schemes: Sequence[str], executed: Collection[str], chunks: torch.Tensor, calibrating: torch.Tensor | None
) -> int:
    """How many sequences `measure_quantised` reads, for a progress bar."""
    calibrated = any(SCHEMES[name].calibrated for name in schemes)
    return (len(schemes) + len(executed)) * len(chunks) + (len(calibrating) if calibrated else 0)


def measure_quantised(
    model: PreTrainedModel,
    anatomy: Anatomy,
    schemes: Sequence[str],
    executed: Collection[str],
    chunks: torch.Tensor,
    calibrating: torch.Tensor | None,
    progress: Callable[[str, int], None],
) -> tuple[dict[str, Score], dict[str, Score]]:
    """Score `chunks` (N, T) under each of `schemes`, simulated, and under those of them that are `executed`.

    Static scales are those of `calibrating` (M, T), other text; the same for both.
    """
    ranges = None
    if any(SCHEMES[name].calibrated for name in schemes):
        ranges = activation_ranges(model, anatomy, calibrating, lambda done: progress("calibration", done))

    def score(context: contextlib.AbstractContextManager, what: str) -> Score:
        likelihood = Likelihood()
        with context:
            stream(model, anatomy, chunks, [likelihood], progress=lambda done: progress(what, done))
        return likelihood.score

    simulated, real = {}, {}
    for name in schemes:
        simulated[name] = score(quantised(model, anatomy, SCHEMES[name], ranges), name)
        if name in executed:
            real[name] = score(executing(model, anatomy, SCHEMES[name], ranges), f"{name}, executed")
    return simulated, real
