"""Top 1: whether a classifier still says the same of an image, or a recording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field

from ...errors import SourceError
from ...live.paired import Interval, share_interval
from ...live.stream import Batch, Observer
from ...recipe.fields import Share
from ...table import Table
from ...words import called, count_of, percent
from .base import Gate, Inputs, Judgement, Measured, Variant, at_least


class Classes(Observer):
    """The most likely class of each image."""

    def __init__(self) -> None:
        self.classes: list[int] = []

    def logits(self, logits: torch.Tensor, batch: Batch) -> None:
        self.classes += logits.argmax(dim=-1).flatten().tolist()


class Top1(Gate):
    """The share of images of which a classifier's most likely class is the original's.

    Judged at the lower end of the 95% interval over images.
    """

    name: ClassVar[str] = "top1"
    reading: ClassVar[Literal["text", "images"] | None] = "images"

    min_share: Annotated[Share, Field(examples=[0.95], description="the least share that will do")]

    def require(self, inputs: Inputs) -> None:
        if not inputs.classes:
            raise SourceError(
                "verify.top1: the checkpoint is no classifier of what it reads, by architectures of its config.json; "
                "leave top1 out."
            )

    def watch(self, variant: Variant) -> Observer | None:
        return Classes()

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        return [at_least(self.name, self._share(original, converted).low, self.min_share)]

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        if original is None:
            return {}
        share, many = self._share(original, converted).to_dict(), converted.features["converted"].called.many
        return {self.name: {many: len(self._classes(converted, "converted")), "share": share}}

    def _classes(self, measured: Measured, variant: Variant) -> list[int]:
        seen: Classes = measured.watched[self.name][variant]
        return seen.classes

    def _share(self, original: Measured, converted: Measured) -> Interval:
        pairs = zip(self._classes(converted, "converted"), self._classes(original, "bare"), strict=True)
        return share_interval([ours == theirs for ours, theirs in pairs])

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        if not (found := verdict.get(cls.name)):
            return None
        read = called(found)
        mean, low, high = (percent(found["share"][key]) for key in ("mean", "low", "high"))
        return Table(
            "Top 1", ("", read.many, "the same", "95% interval"),
            [("most likely class", str(found[read.many]), mean, f"{low} to {high}")],
            text=f"What the classifier says of each {read.one}, whether that is right or not.",
        )  # fmt: skip

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        if not (found := verdict.get(cls.name)):
            return None
        read = called(found)
        of = count_of(found[read.many], read.one)
        return f"The most likely class is the original's for {percent(found['share']['mean'])} of {of}."

    @classmethod
    def label(cls, judgement: str) -> str:
        return "share of the original's class"
