"""Same: the share of images, or whatever an encoder reads, of which something is what it is to the original."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ...live.paired import share_interval
from ...recipe.fields import Share
from ...table import Table
from ...words import Called, called, count_of, percent
from .base import Gate, Judgement, Measured, at_least


class Same(Gate):
    """A share, judged at the lower end of its 95% interval. A gate says of each image whether it is `same`.

    `title`: of its table.
    """

    reading: ClassVar[Literal["text", "images"] | None] = "images"
    title: ClassVar[str]

    min_share: Annotated[Share, Field(examples=[0.9], description="the least share that will do")]

    @abc.abstractmethod
    def same(self, original: Measured, converted: Measured) -> list[bool]:
        """Of each image."""

    @classmethod
    @abc.abstractmethod
    def what(cls, read: Called) -> str:
        """What it is that is the same, of what is `read`."""

    @classmethod
    @abc.abstractmethod
    def about(cls, read: Called) -> str:
        """What that means, as a sentence."""

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        return [at_least(self.name, share_interval(self.same(original, converted)).low, self.min_share)]

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        if original is None:
            return {}
        same, many = self.same(original, converted), converted.features["converted"].called.many
        return {self.name: {many: len(same), "share": share_interval(same).to_dict()}}

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        if not (found := verdict.get(cls.name)):
            return None
        read = called(found)
        mean, low, high = (percent(found["share"][key]) for key in ("mean", "low", "high"))
        rows = [(cls.what(read), str(found[read.many]), mean, f"{low} to {high}")]
        return Table(cls.title, ("", read.many, "the same", "95% interval"), rows, text=cls.about(read))

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        if not (found := verdict.get(cls.name)):
            return None
        read = called(found)
        of, share = count_of(found[read.many], read.one), percent(found["share"]["mean"])
        return f"The {cls.what(read)} is the original's for {share} of {of}."
