"""Top 1: whether a classifier still says the same of an image, a recording or a text."""

from __future__ import annotations

from typing import ClassVar

import torch

from ...errors import SourceError
from ...live.stream import Batch, Observer
from ...words import Called
from .base import Inputs, Measured, Variant
from .same import Same


class Classes(Observer):
    """The most likely class of each image."""

    def __init__(self) -> None:
        self.classes: list[int] = []

    def logits(self, logits: torch.Tensor, batch: Batch) -> None:
        self.classes += logits.argmax(dim=-1).flatten().tolist()


class Top1(Same):
    """The share of images of which a classifier's most likely class is the original's.

    Judged at the lower end of the 95% interval over images.
    """

    name: ClassVar[str] = "top1"
    title: ClassVar[str] = "Top 1"

    def require(self, inputs: Inputs) -> None:
        if not inputs.classes:
            raise SourceError(
                "verify.top1: the checkpoint is no classifier of what it reads, by architectures of its config.json; "
                "leave top1 out."
            )

    def watch(self, variant: Variant) -> Observer | None:
        return Classes()

    def same(self, original: Measured, converted: Measured) -> list[bool]:
        ours, theirs = self._classes(converted, "converted"), self._classes(original, "bare")
        return [a == b for a, b in zip(ours, theirs, strict=True)]

    def _classes(self, measured: Measured, variant: Variant) -> list[int]:
        seen: Classes = measured.watched[self.name][variant]
        return seen.classes

    @classmethod
    def what(cls, read: Called) -> str:
        return "most likely class"

    @classmethod
    def about(cls, read: Called) -> str:
        return f"What the classifier says of each {read.one}, whether that is right or not."

    @classmethod
    def label(cls, judgement: str) -> str:
        return "share of the original's class"
