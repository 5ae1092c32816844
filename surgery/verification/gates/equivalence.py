"""Equivalence: likelihoods on real text are those of the original after the same prefix."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ...live.paired import paired
from ...recipe.fields import Positive
from .base import Gate, Judgement, Measured, at_most


class Equivalence(Gate):
    """|mean NLL difference| to the original after the same prefix, in nats per token.

    Judged at the end of the paired 95% interval that is farther from zero. For recipes that leave the function what it
    is. (`verification.equivalence` compares on random ids, before anything is written.)
    """

    name: ClassVar[str] = "equivalence"
    reading: ClassVar[Literal["text", "images"] | None] = "text"
    always: ClassVar[bool] = True
    same_function: ClassVar[bool] = True

    max_delta_nll: Annotated[Positive, Field(description="the largest difference, nats per token")] = 1e-5

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        control = original.scores["control"]
        difference = paired(converted.scores["converted"].on(control), control)
        return [at_most(self.name, max(abs(difference.low), abs(difference.high)), self.max_delta_nll)]

    @classmethod
    def label(cls, judgement: str) -> str:
        return "difference to the original after the prefix, nats per token"
