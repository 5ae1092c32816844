"""Perplexity, and the score of one variant on text. Plain numbers: nothing here needs torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..words import factor


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
        return factor(self.nll)

    def on(self, part: Score) -> Score:
        """The score on the chunks that `part` is of, the first of the same text."""
        return Score(self.chunks[: len(part.chunks)], self.targets)

    def to_dict(self) -> dict:
        return {"ppl": self.ppl, "nll": self.nll, "tokens": self.tokens}
