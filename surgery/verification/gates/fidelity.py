"""Fidelity: how alike the features are that an encoder makes of images or sound, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ...live.features import Features
from ...live.paired import Interval, cosine_interval
from ...live.port import Images
from ...table import Table
from ...words import called, count_of, fixed
from .base import Gate, Judgement, Measured, at_least

# Of features: what stands for the whole, and parts of an image, a recording or a text.
PARTS = {"cls": "CLS", "last": "last token", "patches": "patches", "frames": "frames", "tokens": "tokens"}
WHOLE = ("cls", "last")
Cosine = Annotated[float, Field(gt=-1, le=1, allow_inf_nan=False)]


def between(a: Features, b: Features) -> dict[str, Interval]:
    """The mean cosine of what stands for an image, where anything does, and of its patches (frames, tokens), with its
    interval over images."""
    whole, patches = a.alike(b)
    return {
        **({} if whole is None else {str(a.whole): cosine_interval(whole)}),
        a.called.parts: cosine_interval(patches),
    }


def tokens_of(measured: Measured) -> int:
    """How many tokens an image or a recording becomes."""
    assert isinstance(measured.port, Images)
    return measured.port.tokens


class Fidelity(Gate):
    """How alike an encoder's features of each image are to the original's, by cosine: of CLS, and of patches.

    Judged at the lower end of the 95% interval over images. Registers are no part of it. `min_patches` is also for the
    frames of a recording and for the tokens of a text, and `min_cls` for the last of these, where it stands for all.
    """

    name: ClassVar[str] = "fidelity"
    always: ClassVar[bool] = True
    reading: ClassVar[Literal["text", "images"] | None] = "images"

    min_cls: Annotated[Cosine, Field(description="the least cosine of CLS, where there is one")] = 0.99
    min_patches: Annotated[Cosine, Field(description="the least mean cosine of an image's patches")] = 0.99

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        found = between(converted.features["converted"], original.features["bare"])
        return [
            at_least(f"{self.name}.{part}", one.low, self.min_cls if part in WHOLE else self.min_patches)
            for part, one in found.items()
        ]

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        """`fidelity`: `images`, `recordings` or `texts`; of each of `PARTS` that there is, the mean cosine with its
        interval; `length` in tokens of one, of both models."""
        if original is None:
            return {}
        after, before = converted.features["converted"], original.features["bare"]
        return {
            self.name: {
                after.called.many: len(after.found),
                "length": {"original": tokens_of(original), "converted": tokens_of(converted)},
                **{part: one.to_dict() for part, one in between(after, before).items()},
            }
        }

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        if not (found := verdict.get(cls.name)):
            return None
        read = called(found)
        rows = [
            (label, str(found[read.many]), fixed(found[part]["mean"], 4),
             f"{fixed(found[part]['low'], 4)} to {fixed(found[part]['high'], 4)}")
            for part, label in PARTS.items()
            if part in found
        ]  # fmt: skip
        before, after = found["length"]["original"], found["length"]["converted"]
        fewer = "" if before == after else f" {read.one.capitalize()}s became {before} tokens each, and become {after}."
        return Table(
            "Fidelity", ("", read.many, "cosine", "95% interval"), rows,
            text="How alike features are, after the last norm, to the original's: 1 is the same direction. Of "
            f"{read.parts} their mean in each {read.one}.{fewer}",
        )  # fmt: skip

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        if not (found := verdict.get(cls.name)):
            return None
        read = called(found)
        parts = [f"{label} {fixed(found[part]['mean'], 4)}" for part, label in PARTS.items() if part in found]
        return f"Cosine of features with the original's, on {count_of(found[read.many], read.one)}: {', '.join(parts)}."

    @classmethod
    def label(cls, judgement: str) -> str:
        return f"cosine of {PARTS.get(judgement.rpartition('.')[2], 'patches')} with the original's"
