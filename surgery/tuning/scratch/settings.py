"""A recipe of its own: a small model trained from nothing, as it is and in variants that give its sinks a place."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ...recipe.fields import AsTuple, Positive, Strict
from ...recipe.file import Document
from ...recipe.training import Training

Variant = Literal["plain", "sink_token", "attention_bias", "head_norm"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


class Size(Strict):
    """Blocks, hidden size, and heads of each block, of a model without dropout whose MLPs are four times as wide.

    `family`: its model type in transformers, one that `surgery run` takes too. `config`: what its config.json says
    beside that, or instead of it, in the words of transformers.
    """

    family: Annotated[str, Field(description="its model type in transformers, one that run takes")] = "gpt2"
    blocks: Annotated[int, Field(ge=1, description="how many blocks")] = 4
    width: Annotated[int, Field(ge=2, description="hidden size")] = 128
    heads: Annotated[int, Field(ge=1, description="heads of each block, which divide the width")] = 4
    config: Annotated[
        dict[str, Any], Field(description="further entries of config.json, such as layer_types of a hybrid")
    ] = {}  # noqa: RUF012 - pydantic copies it

    @model_validator(mode="after")
    def _divides(self) -> Size:
        if self.width % self.heads:
            raise ValueError(f"has {self.heads} heads, which do not divide its width of {self.width}")
        return self


class Pretrain(Training):
    """Train each of `variants` from the same weights, on the same batches."""

    batch: Annotated[int, Field(ge=1, description="sequences in a step")] = 8
    length: Annotated[int, Field(ge=2, description="tokens in a sequence")] = 128
    learning_rate: Annotated[Positive, Field(description="the highest, reached after warm-up")] = 2e-3
    warmup: Annotated[int, Field(ge=0, description="steps in which the learning rate rises")] = 50
    variants: Annotated[tuple[Variant, ...], AsTuple, Field(min_length=1, description="which are trained")] = VARIANTS
    model: Annotated[Size, Field(description="how large the model is")] = Size()
    vocabulary: Annotated[
        int, Field(ge=257, description="tokens of the byte-level BPE: at least every byte, and the sink token")
    ] = 2048
    slots: Annotated[int, Field(ge=1, le=16, description="slots of attention_bias at each site")] = 1

    @field_validator("variants")
    @classmethod
    def _each_once(cls, value: tuple[Variant, ...]) -> tuple[Variant, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a variant more than once")
        return value


class FromScratch(Document):
    """The whole recipe."""

    elsewhere: ClassVar[dict[str, str]] = dict.fromkeys(("operations", "tune", "verify"), "surgery run")

    pretrain: Annotated[Pretrain, Field(examples=[{"steps": 1000}], description="how to train, and which variants")]

    def to_dict(self) -> dict[str, Any]:
        """Every setting in force, defaults included, as plain JSON types; `model_validate` reads it back."""
        return self.model_dump(mode="json")
