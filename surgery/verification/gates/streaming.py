"""Streaming: perplexity where the cache holds a window of the last tokens, and what falls out of it is gone.

Models with attention sinks break when their first token is evicted, and do not when it is kept (StreamingLLM, Xiao et
al., arXiv 2309.17453: the first four). A converted model keeps its sinks in slots, which no cache evicts. Simulated by
masks, in one pass per chunk; positions are those of the text, not renumbered within the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from ...anatomy.sites import Anatomy
from ...live.edits import Change, hidden
from ...live.likelihood import Likelihood, Score
from ...live.stream import stream

KEPT = 4  # first tokens that StreamingLLM keeps


def evicting(model: PreTrainedModel, anatomy: Anatomy, window: int, keep: int = 0) -> Change:
    """Each query sees the last `window` tokens, itself among them, and the first `keep`; slots as ever."""

    def hides(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query - key >= window) & (key >= keep)

    return hidden(model, anatomy, hides, f"a window of {window} tokens")


def measure_streaming(
    model: PreTrainedModel,
    anatomy: Anatomy,
    chunks: torch.Tensor,
    window: int,
    keeps: Sequence[int],
    progress: Callable[[str, int], None],
) -> dict[int, Score]:
    """Score `chunks` (N, T), T > `window`, for each number of first tokens kept."""
    scores = {}
    for keep in keeps:
        likelihood, what = Likelihood(), f"window of {window}, {keep} kept"
        with evicting(model, anatomy, window, keep):
            stream(model, anatomy, chunks, [likelihood], progress=lambda done, what=what: progress(what, done))
        scores[keep] = likelihood.score
    return scores
