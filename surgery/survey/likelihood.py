"""Negative log-likelihood of text, per chunk, in nats, and the perplexity that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .stream import Batch, Observer


def perplexity(nll: float) -> float:
    """exp of a mean NLL, or of a difference of two (then a ratio); infinite where a float cannot hold it."""
    return math.exp(nll) if nll < 700 else math.inf


@dataclass(frozen=True)
class Score:
    """NLL of one variant: `chunks` holds each chunk's sum over its `targets` tokens, in nats, float64."""

    chunks: tuple[float, ...]
    targets: int

    @property
    def tokens(self) -> int:
        return len(self.chunks) * self.targets

    @property
    def nll(self) -> float:
        """Mean NLL per token."""
        return math.fsum(self.chunks) / self.tokens

    @property
    def ppl(self) -> float:
        return perplexity(self.nll)

    def to_dict(self) -> dict:
        return {"ppl": self.ppl, "nll": self.nll, "tokens": self.tokens}


class Likelihood(Observer):
    """Sums the NLL of tokens 1..T-1 of every chunk, in float64.

    The first token of a chunk is never a target, with or without a prefix: every variant is scored on the same tokens.
    """

    def __init__(self) -> None:
        self.nll: list[float] = []  # per chunk, summed over its targets
        self.targets = 0  # per chunk

    def logits(self, logits: torch.Tensor, batch: Batch) -> None:
        self.targets = batch.tokens.shape[1] - batch.lead - 1
        for tokens, row in zip(batch.tokens, logits, strict=True):
            predicting = row[batch.lead : -1].float() if row.dtype != torch.float64 else row[batch.lead : -1]
            losses = F.cross_entropy(predicting, tokens[batch.lead + 1 :].to(row.device), reduction="none")
            self.nll.append(losses.double().sum().item())

    @property
    def score(self) -> Score:
        return Score(tuple(self.nll), self.targets)
