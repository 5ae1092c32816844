"""A recipe of its own: a small GPT-2 trained from nothing, as it is and in variants that give its sinks a place."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from .fields import AsTuple, Format, Gate, Strict
from .training import Training

Variant = Literal["plain", "sink_token", "attention_bias", "head_norm"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


class Size(Strict):
    """Blocks, hidden size, and heads of each block, of a GPT-2 whose MLPs are four times as wide; without dropout."""

    blocks: Annotated[int, Field(ge=1)] = 4
    width: Annotated[int, Field(ge=2)] = 128
    heads: Annotated[int, Field(ge=1)] = 4

    @model_validator(mode="after")
    def _divides(self) -> Size:
        if self.width % self.heads:
            raise ValueError(f"has {self.heads} heads, which do not divide its width of {self.width}")
        return self


class Pretrain(Training):
    """Train each of `variants` from the same weights, on the same batches.

    `vocabulary`: tokens of the byte-level BPE that is trained on the text. `slots`: of attention_bias, at each site.
    """

    batch: Annotated[int, Field(ge=1)] = 8
    length: Annotated[int, Field(ge=2)] = 128
    learning_rate: Gate = 2e-3
    warmup: Annotated[int, Field(ge=0)] = 50
    variants: Annotated[tuple[Variant, ...], AsTuple, Field(min_length=1)] = VARIANTS
    model: Size = Size()
    vocabulary: Annotated[int, Field(ge=257)] = 2048  # every byte, and the sink token
    slots: Annotated[int, Field(ge=1, le=16)] = 1

    @field_validator("variants")
    @classmethod
    def _each_once(cls, value: tuple[Variant, ...]) -> tuple[Variant, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a variant more than once")
        return value


class FromScratch(Strict):
    """The whole recipe."""

    surgery: Format
    pretrain: Pretrain

    def to_dict(self) -> dict[str, Any]:
        """Every setting in force, defaults included, as plain JSON types; `model_validate` reads it back."""
        return self.model_dump(mode="json")
