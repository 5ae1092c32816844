"""`verify:` of a recipe: the gates, each by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import SerializerFunctionWrapHandler, create_model, field_validator, model_serializer

from ..recipe.fields import Strict
from .gates import GATES, Gate


class _Verify(Strict):
    @field_validator("*")
    @classmethod
    def _that_asks(cls, value: Gate | None) -> Gate | None:
        return value if value is not None and value.asks else None

    @model_serializer(mode="wrap")
    def _without_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: gate for name, gate in plain(self).items() if gate}

    def gates(self, compared: bool = True) -> tuple[Gate, ...]:
        """The gates that are asked for; where there is no original to compare with, only those that always apply."""
        found = (getattr(self, gate.name) for gate in GATES if gate.always or compared)
        return tuple(gate for gate in found if gate is not None)

    def of(self, port: str) -> Self:
        """The gates of a model that reads text, or images: of those that always apply, the ones that are for it."""
        other = {gate.name: None for gate in self.gates() if gate.reading not in (None, port)}
        own = [gate for gate in GATES if gate.always and gate.reading == port and getattr(self, gate.name) is None]
        return self.model_copy(update={**other, **{gate.name: gate() for gate in own}})


if TYPE_CHECKING:
    Verify = _Verify
else:
    Verify = create_model(
        "Verify",
        __base__=_Verify,
        __module__=__name__,
        __doc__="The gates. Those that always apply do so with their defaults where they are left out.",
        # Of an encoder they take the place of those of a language model once it is known to be one.
        **{gate.name: (gate, gate() if gate.always and gate.reading != "images" else None) for gate in GATES},
    )
