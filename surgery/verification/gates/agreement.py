"""Agreement: whether greedy decoding would go on as the original does after the same prefix, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field

from ...live.paired import NONE_IN, Interval, mean_interval
from ...live.stream import Batch, Observer
from ...table import Table
from ...words import count_of, percent
from .base import Gate, Judgement, Measured, Variant, at_least


class Greedy(Observer):
    """The most likely next token at each place of every chunk (N, T - 1): after tokens 0 .. T - 2 of the text."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []

    def logits(self, logits: torch.Tensor, batch: Batch) -> None:
        self._rows.append(logits[:, batch.lead : -1].argmax(dim=-1).cpu())

    @property
    def tokens(self) -> torch.Tensor:
        return torch.cat(self._rows)


@dataclass(frozen=True)
class Shares:
    """Of `tokens` in each of `chunks`, the share on which two models agree, with its interval over chunks."""

    share: Interval
    chunks: int
    tokens: int


class Agreement(Gate):
    """The share of next tokens on which greedy decoding agrees with the original after the same prefix.

    Both read the evaluation text, and at every place the most likely next token is compared. Judged at the lower end of
    the 95% interval, paired by chunk of text.
    """

    name: ClassVar[str] = "agreement"
    reading: ClassVar[Literal["text", "images"] | None] = "text"

    min_share: Annotated[
        float,
        Field(gt=0, le=1, allow_inf_nan=False, examples=[0.99], description="the least share that will do"),
    ]

    def watch(self, variant: Variant) -> Observer | None:
        return Greedy() if variant in ("control", "converted") else None

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        return [at_least(self.name, self._shares(original, converted).share.low, self.min_share)]

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        if original is None:
            return {}
        found = self._shares(original, converted)
        return {self.name: {"share": found.share.to_dict(), "tokens": found.chunks * found.tokens}}

    def _shares(self, original: Measured, converted: Measured) -> Shares:
        ours, theirs = (
            measured.watched[self.name][variant].tokens
            for measured, variant in ((converted, "converted"), (original, "control"))
        )
        equal = ours == theirs
        chunks, tokens = equal.shape
        share = mean_interval(equal.double().mean(dim=1).tolist())
        if bool(equal.all()):  # which says nothing of how much chunks vary
            share = Interval(1.0, 1.0 - NONE_IN / equal.numel(), 1.0)
        return Shares(Interval(share.mean, max(share.low, 0.0), min(share.high, 1.0)), chunks, tokens)

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        if not (found := verdict.get(cls.name)):
            return None
        mean, low, high = (percent(found["share"][key]) for key in ("mean", "low", "high"))
        return Table(
            "Agreement", ("", "tokens", "the same", "95% interval"),
            [("converted, original after the prefix", f"{found['tokens']:,}", mean, f"{low} to {high}")],
            text="The most likely next token at each place of the text. Where it is the same, greedy decoding goes on "
            "as the original's does.",
        )  # fmt: skip

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        if not (found := verdict.get(cls.name)):
            return None
        return (
            f"Greedy decoding takes the original's next token at {percent(found['share']['mean'])} of "
            f"{count_of(found['tokens'], 'place')}."
        )

    @classmethod
    def label(cls, judgement: str) -> str:
        return "share of next tokens that are the original's"
