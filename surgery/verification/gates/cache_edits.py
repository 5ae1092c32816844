"""Editing a key/value cache: perplexity of the text behind, after tokens of the context were deleted or inserted.

The context is the first half of a chunk. A server that edits its cache keeps all other entries as they are, since
computing them again is what a cache saves:

* delete: the context was cached whole, then the entries of a span are dropped. Those behind it have seen the span.
* insert: the context was cached with the places of a span left free, then the span is computed, seeing what stands in
  front of it, and put there (the parameters of Prompt Cache, Gim et al., arXiv 2311.04934). The entries behind it have
  not seen the span.

The text behind the context sees what is then in the cache. Positions are those of the whole text: a deletion leaves a
gap, an insertion fills one. Both are simulated by masks, in one pass per chunk, on the text's own tokens; so every edit
is scored on the same targets as the unedited text, those that are predicted from behind the context.

A span lies first, where an unconverted model has its sink, or in the middle of the context. Where a model keeps its
first tokens, as in StreamingLLM, a first span begins behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from ...anatomy.sites import Anatomy
from ...live.edits import Change, hidden
from ...live.likelihood import Likelihood, Score
from ...live.stream import stream

EDITS = ("delete_first", "insert_first", "delete_middle", "insert_middle")


def editing(
    model: PreTrainedModel, anatomy: Anatomy, edit: str, tokens: int, context: int, keep: int = 0
) -> Change:  # fmt: skip
    """`edit` (one of EDITS) of `tokens` tokens in the first `context`, sparing the first `keep`; slots as ever."""
    kind, place = edit.split("_")
    start = 0 if place == "first" else (context - tokens) // 2
    first, end = max(start, keep), start + tokens

    def hides(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        blind = query >= context if kind == "delete" else (query >= end) & (query < context)
        return blind & (key >= first) & (key < end)

    return hidden(model, anatomy, hides, f"{edit} of {tokens} tokens")


def kept_edit(scores: dict[tuple[str, int], Score], edit: str) -> Score:
    """The score where the most tokens were kept: of edits in the middle, which spare the first anyhow, the only one."""
    return scores[max(key for key in scores if key[0] == edit)]


def edit_passes(keeps: Sequence[int]) -> int:
    """How many passes over the text `measure_edits` makes, for a progress bar."""
    return 1 + len(EDITS) // 2 * (1 + len(keeps))


def measure_edits(
    model: PreTrainedModel,
    anatomy: Anatomy,
    chunks: torch.Tensor,
    tokens: int,
    keeps: Sequence[int],
    progress: Callable[[str, int], None],
) -> dict[tuple[str, int], Score]:
    """Score the second halves of `chunks` (N, T) by (edit, first tokens kept); unedited is ("none", 0).

    Edits in the middle are the same whatever is kept (0), as long as they begin behind it.
    """
    context, scores = chunks.shape[1] // 2, {}

    def score(edit: str, keep: int) -> Score:
        likelihood, what = Likelihood(context + 1), f"{edit}, {keep} kept"
        stream(model, anatomy, chunks, [likelihood], progress=lambda done: progress(what, done))
        return likelihood.score

    scores["none", 0] = score("none", 0)
    for edit in EDITS:
        for keep in keeps if edit.endswith("first") else (0,):
            with editing(model, anatomy, edit, tokens, context, keep):
                scores[edit, keep] = score(edit, keep)
    return scores
