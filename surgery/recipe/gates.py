"""`verify:` what must hold afterwards."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from .fields import AsTuple, Gate, Strict


class Equivalence(Strict):
    """|mean NLL difference| to the original with the same prefix, in nats per token."""

    max_delta_nll: Gate = 1e-5


class Perplexity(Strict):
    """Perplexity over the bare original's, judged at the upper end of the paired 95% interval."""

    max_ratio: Gate = 1.01


class MassiveActivations(Strict):
    """How many massive activations may remain on the evaluation text."""

    max: Annotated[int, Field(ge=0)] = 0


class QuantisedGate(Strict):
    """Perplexity of the quantised converted model over the bare original's in float, upper end of the interval."""

    max_ratio: Gate


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


class Streaming(Strict):
    """Perplexity with a cache of the last `window` tokens, over that of the original which also keeps its first four.

    Judged at the upper end of the paired 95% interval.
    """

    window: Annotated[int, Field(ge=2)]
    max_ratio: Gate


class CacheEdits(Strict):
    """Perplexity behind a context of which `tokens` were deleted from, or inserted into, the cache: four such edits.

    Over that of the original, edited alike, which keeps its first four tokens; upper end of the paired 95% interval.
    """

    tokens: Annotated[int, Field(ge=8)]
    max_ratio: Gate


class Tasks(Strict):
    """How much less the converted model may score than the original on zero-shot tasks of lm-evaluation-harness.

    In each metric that is a mean over documents, at the upper end of the interval paired by document. `limit`: only so
    many documents of each task.
    """

    names: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AsTuple, Field(min_length=1)]
    limit: Annotated[int, Field(ge=2)] | None = None
    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Verify(Strict):
    """The gates. One that is left out still applies, with its default; none of the first three can be switched off.

    `equivalence` is for recipes that leave the function what it is (`Recipe.exact`).
    """

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
