"""`operations:` what to change in a model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .fields import AsTuple, Layers, Prefix, Strict, known
from .strict_yaml import shown


class AttentionBias(Strict):
    """Fold a token prefix into learnable key/value slots at every attention site.

    `prefix`: "auto" searches for the tokens, at most `max_slots` of them; otherwise the tokens in order, each the text
    of one token or its id. `slots_visible`: "as_prefix" shows a slot to a query exactly where the model's own mask
    would have shown the prefix token; "always" shows it to every query, which is not exact for windowed layers.
    """

    prefix: Prefix = "auto"
    max_slots: Annotated[int, Field(ge=1, le=16)] = 4
    slots_visible: Literal["as_prefix", "always"] = "as_prefix"

    @field_validator("max_slots")
    @classmethod
    def _only_for_a_search(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("prefix", "auto") != "auto":
            raise ValueError("bounds the search that 'prefix: auto' makes, but the prefix is given; remove one of them")
        return value

    @model_serializer(mode="wrap")
    def _without_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = plain(self)
        if self.prefix != "auto":
            del fields["max_slots"]
        return fields


class Smoothing(Strict):
    """Move channels with large activations into the weights that read them, by powers of two: the same function.

    `inputs`: of which linear layers, those that end MLPs ("down") and those behind norms ("norm"). `strength`: how much
    of what is large in activations goes over to the weights.
    """

    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.8
    inputs: Annotated[tuple[Literal["down", "norm"], ...], AsTuple, Field(min_length=1)] = ("down", "norm")


class HeadNorm(Strict):
    """Norm what each head brings back, before the output projection: o + gate (norm(o) - o).

    `per_head`: each head has a weight of its own; otherwise the heads of a site share one. `gate`: 0 leaves the model
    the function that it is, 1 is the pure norm, emitted without a gate. `layers`: which blocks, counted from 0 as in
    the names of tensors.
    """

    per_head: bool = False
    gate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    layers: Layers = "all"

    @field_validator("layers")
    @classmethod
    def _each_layer_once(cls, value: Literal["all"] | tuple[int, ...]) -> Literal["all"] | tuple[int, ...]:
        if value != "all" and len(set(value)) != len(value):
            raise ValueError("names a layer more than once")
        return value


class Operation(Strict):
    """One change to the model, written as a mapping with exactly one key: the operation's name."""

    attention_bias: AttentionBias | None = None
    smoothing: Smoothing | None = None
    head_norm: HeadNorm | None = None

    @property
    def name(self) -> str:
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @model_validator(mode="before")
    @classmethod
    def _one_known_name(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError(f"is {shown(value)}; write '- attention_bias: {{prefix: auto}}'")
        for name in value:
            if name not in cls.model_fields:
                raise ValueError(f"names the unknown operation {shown(name)}; {known(str(name), cls)}")
        if len(value) != 1:
            many = "holds several operations; give each an entry of its own, with its own dash"
            raise ValueError(many if value else "holds no operation; write '- attention_bias: {prefix: auto}'")
        return value

    @field_validator("attention_bias", "smoothing", "head_norm", mode="before")
    @classmethod
    def _settings(cls, value: object) -> object:
        if value is None:  # None is for the operation that is not named
            raise PydanticCustomError("model_type", "Input should be a mapping")
        return value

    @model_serializer(mode="wrap")
    def _without_others(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {self.name: plain(self)[self.name]}
