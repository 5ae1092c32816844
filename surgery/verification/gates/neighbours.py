"""Neighbours: whether an encoder still finds the same image, or recording, nearest to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ...live.features import nearest
from ...live.paired import Interval, share_interval
from ...recipe.fields import Share
from ...table import Table
from ...words import called, count_of, percent
from .base import Gate, Judgement, Measured, at_least


class Neighbours(Gate):
    """The share of images whose nearest neighbour, among those that are measured on, is the original's.

    By cosine of CLS, or of the mean patch where there is none. Judged at the lower end of the 95% interval over images.
    """

    name: ClassVar[str] = "neighbours"
    reading: ClassVar[Literal["text", "images"] | None] = "images"

    min_share: Annotated[Share, Field(examples=[0.9], description="the least share that will do")]

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        return [at_least(self.name, self._share(original, converted).low, self.min_share)]

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        if original is None:
            return {}
        features = converted.features["converted"]
        many = features.called.many
        return {self.name: {many: len(features.found), "share": self._share(original, converted).to_dict()}}

    def _share(self, original: Measured, converted: Measured) -> Interval:
        ours, theirs = (
            nearest(measured.features[variant].of_image)
            for measured, variant in ((converted, "converted"), (original, "bare"))
        )
        return share_interval((ours == theirs).tolist())

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        if not (found := verdict.get(cls.name)):
            return None
        read = called(found)
        mean, low, high = (percent(found["share"][key]) for key in ("mean", "low", "high"))
        return Table(
            "Neighbours", ("", read.many, "the same", "95% interval"),
            [(f"nearest other {read.one}", str(found[read.many]), mean, f"{low} to {high}")],
            text=f"Which of the other {read.many} is nearest to each, by the cosine of their features: what search and "
            "clustering see.",
        )  # fmt: skip

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        if not (found := verdict.get(cls.name)):
            return None
        read = called(found)
        of = count_of(found[read.many], read.one)
        return f"The nearest other {read.one} is the original's for {percent(found['share']['mean'])} of {of}."

    @classmethod
    def label(cls, judgement: str) -> str:
        return "share with the original's nearest neighbour"
