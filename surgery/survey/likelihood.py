"""Negative log-likelihood of text, per chunk, in nats."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .stream import Batch, Observer


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
    def mean(self) -> float:
        """Mean NLL per token."""
        return sum(self.nll) / (len(self.nll) * self.targets)
