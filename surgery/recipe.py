"""The recipe: the YAML a person writes to say what to change in a checkpoint and what must hold afterwards.

Strict on purpose. A misspelt gate that is silently ignored is a gate that never fails, so unknown keys, duplicate
keys, wrong types and numbers that are not finite are errors, each one sentence naming file, line and key.
"""

from __future__ import annotations

import difflib
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


def _prefix_kind(value: object) -> str:
    return "tokens" if isinstance(value, (list, tuple)) else "auto"


_AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_Tokens = Annotated[tuple[Annotated[str | int, PlainValidator(_token)], ...], _AsTuple, Field(min_length=1)]
_Prefix = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[_Tokens, Tag("tokens")], Discriminator(_prefix_kind)
]
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


class Operation(Strict):
    """One change to the model, written as a mapping with exactly one key: the operation's name."""

    attention_bias: AttentionBias

    @model_validator(mode="before")
    @classmethod
    def _one_known_name(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError(f"is {shown(value)}; write '- attention_bias: {{prefix: auto}}'")
        for name in value:
            if name not in cls.model_fields:
                raise ValueError(f"names the unknown operation {shown(name)}; {known(str(name), cls)}")
        if len(value) != 1:
            raise ValueError("holds no operation; write '- attention_bias: {prefix: auto}'")
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


class Int8Gate(QuantisedGate):
    """The same. `executed`: besides the simulation run int8 for real (`verification.executed`); the gate is on both."""

    executed: bool = False


class Quantised(Strict):
    """Gates by quantisation scheme (`verification.quantised.SCHEMES`); only those that are named are measured."""

    w8a8_static: Int8Gate | None = None
    w8a8_dynamic: Int8Gate | None = None
    w8a8_per_token: Int8Gate | None = None
    w4a4_static: QuantisedGate | None = None
    w4: QuantisedGate | None = None
    kv4: QuantisedGate | None = None
    kv2: QuantisedGate | None = None

    def gates(self) -> dict[str, QuantisedGate]:
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: gate for name, gate in found.items() if gate is not None}

    def executed(self) -> tuple[str, ...]:
        return tuple(name for name, gate in self.gates().items() if getattr(gate, "executed", False))

    @model_serializer(mode="wrap")
    def _without_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: gate for name, gate in plain(self).items() if gate is not None}


class Streaming(Strict):
    """Perplexity with a cache of the last `window` tokens, over that of the original which also keeps its first four.

    Judged at the upper end of the paired 95% interval.
    """

    window: Annotated[int, Field(ge=2)]
    max_ratio: _Gate


class CacheEdits(Strict):
    """Perplexity behind a context of which `tokens` were deleted from, or inserted into, the cache: four such edits.

    Over that of the original, edited alike, which keeps its first four tokens; upper end of the paired 95% interval.
    """

    tokens: Annotated[int, Field(ge=8)]
    max_ratio: _Gate


class Tasks(Strict):
    """How much less the converted model may score than the original on zero-shot tasks of lm-evaluation-harness.

    In each metric that is a mean over documents, at the upper end of the interval paired by document. `limit`: only so
    many documents of each task.
    """

    names: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], _AsTuple, Field(min_length=1)]
    limit: Annotated[int, Field(ge=2)] | None = None
    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Verify(Strict):
    """The gates. One that is left out still applies, with its default; none of the first three can be switched off."""

    equivalence: Equivalence = Equivalence()
    perplexity: Perplexity = Perplexity()
    massive_activations: MassiveActivations = MassiveActivations()
    quantised: Quantised = Quantised()
    streaming: Streaming | None = None
    cache_edits: CacheEdits | None = None
    tasks: Tasks | None = None

    @model_serializer(mode="wrap")
    def _without_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: gate for name, gate in plain(self).items() if gate}


class Recipe(Strict):
    """A whole recipe; `surgery` is the version of this format."""

    surgery: Literal[1]
    operations: Annotated[tuple[Operation, ...], _AsTuple, Field(min_length=1)]
    verify: Verify = Verify()

    @field_validator("surgery", mode="before")
    @classmethod
    def _this_format(cls, value: object) -> object:
        if type(value) is not int or value != 1:  # 1.0 and true equal 1 in Python, and a Literal would let them pass
            raise ValueError(f"is {shown(value)}, and the only recipe format is 1; write 'surgery: 1'")
        return value

    @field_validator("operations")
    @classmethod
    def _each_once(cls, value: tuple[Operation, ...]) -> tuple[Operation, ...]:
        if len(value) > 1:
            raise ValueError("asks for attention_bias more than once; give all its tokens in one prefix")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Every setting in force, defaults included, as plain JSON types; `Recipe.model_validate` reads it back."""
        return self.model_dump(mode="json")
