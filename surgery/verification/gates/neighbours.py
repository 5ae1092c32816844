"""Neighbours: whether an encoder still finds the same image, or recording, nearest to each."""

from __future__ import annotations

from typing import ClassVar

from ...live.features import nearest
from ...words import Called
from .base import Measured
from .same import Same


class Neighbours(Same):
    """The share of images whose nearest neighbour, among those that are measured on, is the original's.

    By cosine of what stands for an image (CLS), or of its mean patch. Judged at the lower end of the 95% interval over
    images.
    """

    name: ClassVar[str] = "neighbours"
    title: ClassVar[str] = "Neighbours"

    def same(self, original: Measured, converted: Measured) -> list[bool]:
        ours, theirs = converted.features["converted"], original.features["bare"]
        found: list[bool] = (nearest(ours.of_image) == nearest(theirs.of_image)).tolist()
        return found

    @classmethod
    def what(cls, read: Called) -> str:
        return f"nearest other {read.one}"

    @classmethod
    def about(cls, read: Called) -> str:
        return (
            f"Which of the other {read.many} is nearest to each, by the cosine of their features: what search and "
            "clustering see."
        )

    @classmethod
    def label(cls, judgement: str) -> str:
        return "share with the original's nearest neighbour"
