"""The recipe: the YAML a person writes to say what to change in a checkpoint and what must hold afterwards.

Strict on purpose. A misspelt gate that is silently ignored is a gate that never fails, so unknown keys, duplicate
keys, wrong types and numbers that are not finite are errors, each one sentence naming file, line and key.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .strict_yaml import shown


def _token(value: object) -> str | int:
    """A prefix entry: the text of one token, or its id (>= 0). ValueError otherwise."""
    if isinstance(value, str) and value:
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("holds half of a character pair, which is not text; write the whole character")
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f'is {shown(value)}; write the text of one token in quotes, such as "\\n", or its id, 0 or more')


def _kind(word: str, listed: str) -> Callable[[object], str]:
    """For a setting that is one word or a list: which of the two a value is meant as."""
    return lambda value: listed if isinstance(value, (list, tuple)) else word


_AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_Tokens = Annotated[tuple[Annotated[str | int, PlainValidator(_token)], ...], _AsTuple, Field(min_length=1)]
_Prefix = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[_Tokens, Tag("tokens")], Discriminator(_kind("auto", "tokens"))
]
_Numbers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], _AsTuple, Field(min_length=1)]
_Layers = Annotated[
    Annotated[Literal["all"], Tag("all")] | Annotated[_Numbers, Tag("numbers")], Discriminator(_kind("all", "numbers"))
]
_Targets = Annotated[
    Annotated[Literal["all"], Tag("all")] | Annotated[tuple[str, ...], _AsTuple, Field(min_length=1), Tag("names")],
    Discriminator(_kind("all", "names")),
]
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Gate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def known(name: str, model: type[Strict]) -> str:
    """The way out for an unknown name: the nearest that exists, and all that do."""
    names = list(model.model_fields)
    near = difflib.get_close_matches(name, names, n=1)
    listed = "known here: " + ", ".join(names)
    return f"did you mean '{near[0]}'? ({listed})" if near else listed


class AttentionBias(Strict):
    """Fold a token prefix into learnable key/value slots at every attention site.

    `prefix`: "auto" searches for the tokens, at most `max_slots` of them; otherwise the tokens in order, each the text
    of one token or its id. `slots_visible`: "as_prefix" shows a slot to a query exactly where the model's own mask
    would have shown the prefix token; "always" shows it to every query, which is not exact for windowed layers.
    """

    prefix: _Prefix = "auto"
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


class HeadNorm(Strict):
    """Norm what each head brings back, before the output projection: o + gate (norm(o) - o).

    `per_head`: each head has a weight of its own; otherwise the heads of a site share one. `gate`: 0 leaves the model
    the function that it is, 1 is the pure norm, emitted without a gate. `layers`: which blocks, counted from 0 as in
    the names of tensors.
    """

    per_head: bool = False
    gate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    layers: _Layers = "all"

    @field_validator("layers")
    @classmethod
    def _each_layer_once(cls, value: Literal["all"] | tuple[int, ...]) -> Literal["all"] | tuple[int, ...]:
        if value != "all" and len(set(value)) != len(value):
            raise ValueError("names a layer more than once")
        return value


class Operation(Strict):
    """One change to the model, written as a mapping with exactly one key: the operation's name."""

    attention_bias: AttentionBias | None = None
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

    @field_validator("attention_bias", "head_norm", mode="before")
    @classmethod
    def _settings(cls, value: object) -> object:
        if value is None:  # None is for the operation that is not named
            raise PydanticCustomError("model_type", "Input should be a mapping")
        return value

    @model_serializer(mode="wrap")
    def _without_others(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {self.name: plain(self)[self.name]}


class Objectives(Strict):
    """Weights of what tuning lowers (`tuning.objectives`); 0 leaves one out."""

    kl: _Weight = 1.0
    lm: _Weight = 0.0
    hidden: _Weight = 0.0
    massive: _Weight = 0.0
    peak_ratio: _Weight = 0.0

    @model_validator(mode="after")
    def _some(self) -> Objectives:
        if not any(self.weights().values()):
            raise ValueError("has no weight above 0, so there is nothing to lower; write 'kl: 1.0'")
        return self

    def weights(self) -> dict[str, float]:
        """Name -> weight of those that count."""
        return {name: weight for name in type(self).model_fields if (weight := getattr(self, name))}


class Lora(Strict):
    """LoRA on linear layers inside the blocks, merged into the weights that are emitted.

    `targets`: "all" of them, or a list of names such as q_proj. The update is scaled by `scale` (alpha / rank).
    """

    rank: Annotated[int, Field(ge=1)] = 16
    scale: _Gate = 2.0
    targets: _Targets = "all"
    learning_rate: _Gate = 1e-3


class Tune(Strict):
    """Train what the operations added, for so many optimiser steps.

    A step reads `batch` sequences of `length` tokens, over all processes, in `accumulate` micro-batches. The held-out
    text is the first `held_out` sequences of the calibration text, on which the model is judged every `evaluate_every`
    steps, quantised if `quantised` names a scheme; training stops after `patience` judgements without a better one.
    """

    steps: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)] = 2
    length: Annotated[int, Field(ge=2)] = 256
    accumulate: Annotated[int, Field(ge=1)] = 1
    learning_rate: _Gate = 3e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 10
    clip: _Gate = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    objectives: Objectives = Objectives()
    quantised: Literal["w8a8_static", "w8a8_dynamic", "w8a8_per_token", "w4a4_static"] | None = None
    lora: Lora | None = None
    evaluate_every: Annotated[int, Field(ge=1)] = 50
    patience: Annotated[int, Field(ge=1)] | None = None
    held_out: Annotated[int, Field(ge=1)] = 16

    @field_validator("accumulate")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("batch", value) % value:
            raise ValueError(f"is {value}, which does not divide the batch of {info.data['batch']} sequences")
        return value


class Equivalence(Strict):
    """|mean NLL difference| to the original with the same prefix, in nats per token."""

    max_delta_nll: _Gate = 1e-5


class Perplexity(Strict):
    """Perplexity over the bare original's, judged at the upper end of the paired 95% interval."""

    max_ratio: _Gate = 1.01


class MassiveActivations(Strict):
    """How many massive activations may remain on the evaluation text."""

    max: Annotated[int, Field(ge=0)] = 0


class QuantisedGate(Strict):
    """Perplexity of the quantised converted model over the bare original's in float, upper end of the interval."""

    max_ratio: _Gate


class Quantised(Strict):
    """Gates by quantisation scheme (`verification.quantised.SCHEMES`); only those that are named are measured."""

    w8a8_static: QuantisedGate | None = None
    w8a8_dynamic: QuantisedGate | None = None
    w8a8_per_token: QuantisedGate | None = None
    w4a4_static: QuantisedGate | None = None
    w4: QuantisedGate | None = None
    kv4: QuantisedGate | None = None
    kv2: QuantisedGate | None = None

    def gates(self) -> dict[str, QuantisedGate]:
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: gate for name, gate in found.items() if gate is not None}


class Streaming(Strict):
    """Perplexity with a cache of the last `window` tokens, over that of the original which also keeps its first four.

    Judged at the upper end of the paired 95% interval.
    """

    window: Annotated[int, Field(ge=2)]
    max_ratio: _Gate


class Verify(Strict):
    """The gates. One that is left out still applies, with its default; none of the first three can be switched off.

    `equivalence` is for recipes that leave the function what it is (`Recipe.exact`).
    """

    equivalence: Equivalence = Equivalence()
    perplexity: Perplexity = Perplexity()
    massive_activations: MassiveActivations = MassiveActivations()
    quantised: Quantised = Quantised()
    streaming: Streaming | None = None

    @model_serializer(mode="wrap")
    def _without_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: gate for name, gate in plain(self).items() if gate}


class Recipe(Strict):
    """A whole recipe; `surgery` is the version of this format."""

    surgery: Literal[1]
    operations: Annotated[tuple[Operation, ...], _AsTuple, Field(min_length=1)]
    tune: Tune | None = None
    verify: Verify = Verify()

    @field_validator("surgery", mode="before")
    @classmethod
    def _this_format(cls, value: object) -> object:
        if type(value) is not int or value != 1:  # 1.0 and true equal 1 in Python, and a Literal would let them pass
            raise ValueError(f"is {shown(value)}, and the only recipe format is 1; write 'surgery: 1'")
        return value

    @field_validator("operations")
    @classmethod
    def _each_once_in_order(cls, value: tuple[Operation, ...]) -> tuple[Operation, ...]:
        names = [operation.name for operation in value]
        if names.count("attention_bias") > 1:
            raise ValueError("asks for attention_bias more than once; give all its tokens in one prefix")
        if names.count("head_norm") > 1:
            raise ValueError("asks for head_norm more than once; give all its layers in one list")
        if names == ["head_norm", "attention_bias"]:
            raise ValueError("has head_norm first, whose weights are fitted behind the slots; put attention_bias first")
        return value

    @field_validator("verify")
    @classmethod
    def _only_gates_that_apply(cls, value: Verify, info: ValidationInfo) -> Verify:
        given = "equivalence" in value.model_fields_set
        if given and not _is_exact(info.data.get("operations", ()), info.data.get("tune")):
            raise ValueError(
                "asks for equivalence, but tune, or head_norm with a gate above 0, makes another function of the model, "
                "and perplexity decides; remove equivalence, or them"
            )
        return value

    @property
    def attention_bias(self) -> AttentionBias | None:
        return next((op.attention_bias for op in self.operations if op.attention_bias is not None), None)

    @property
    def head_norm(self) -> HeadNorm | None:
        return next((op.head_norm for op in self.operations if op.head_norm is not None), None)

    @property
    def exact(self) -> bool:
        """Whether the converted model is to be the function that the original is behind the prefix, if any.

        Only then does the gate `equivalence` apply. Slots are exact, and so are head norms at gate 0; what is tuned is not.
        """
        return _is_exact(self.operations, self.tune)

    def to_dict(self) -> dict[str, Any]:
        """Every setting in force, defaults included, as plain JSON types; `Recipe.model_validate` reads it back."""
        dumped = self.model_dump(mode="json", exclude_none=True)
        if not self.exact:
            del dumped["verify"]["equivalence"]
        return dumped


def _is_exact(operations: tuple[Operation, ...], tune: Tune | None) -> bool:
    return tune is None and all(op.head_norm is None or op.head_norm.gate == 0 for op in operations)
