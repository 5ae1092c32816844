"""The negative log-likelihood of text, per chunk, in nats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..progress import Advance, unseen
from .model import Live
from .score import Score
from .stream import Batch, Observer, stream

ROWS = 32  # of logits at a time


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits (R, V), targets (R,) -> NLL of each target (R,) in nats, in float32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    # A few rows at a time: what log_softmax writes down of them stays in the cache, and takes a third of the time.
    return torch.cat(
        [
            F.cross_entropy(part.to(wide), target.to(part.device), reduction="none")
            for part, target in zip(logits.split(ROWS), targets.split(ROWS), strict=True)
        ]
    )


class Likelihood(Observer):
    """Sums the NLL of tokens first..T-1 of every chunk, in float64.

    The first token of a chunk is never a target, with or without a prefix: every variant is scored on the same tokens.
    """

    def __init__(self, first: int = 1) -> None:
        self.first = first
        self.nll: list[float] = []  # per chunk, summed over its targets
        self.targets = 0  # per chunk

    def logits(self, logits: torch.Tensor, batch: Batch) -> None:
        start = batch.lead + self.first
        self.targets = batch.tokens.shape[1] - start
        for tokens, row in zip(batch.tokens, logits, strict=True):
            losses = token_losses(row[start - 1 : -1], tokens[start:])
            self.nll.append(losses.cpu().double().sum().item())  # some devices (MPS) have no float64

    @property
    def score(self) -> Score:
        return Score(tuple(self.nll), self.targets)


def scored(
    live: Live,
    chunks: torch.Tensor,
    *,
    first: int = 1,
    prefix: Sequence[int] = (),
    observers: Sequence[Observer] = (),
    advance: Advance = unseen,
    what: str = "",
) -> Score:
    """The score of tokens first..T-1 of `chunks` (N, T), each after `prefix`; `observers` look at the same pass."""
    likelihood = Likelihood(first)
    stream(live, chunks, [likelihood, *observers], prefix=prefix, advance=advance, what=what)
    return likelihood.score
