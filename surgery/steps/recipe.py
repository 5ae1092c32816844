"""The recipe: the YAML a person writes to say what to change in a checkpoint and what must hold afterwards.

Strict on purpose. A misspelt gate that is silently ignored is a gate that never fails, so unknown keys, duplicate
keys, wrong types and numbers that are not finite are errors, each one sentence naming file, line and key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from ..errors import RecipeError
from ..operations import OPERATIONS
from ..operations.attention_bias import AttentionBias
from ..operations.base import Operation, Port
from ..operations.estimated_bias import EstimatedBias
from ..operations.registers import Registers
from ..recipe.fields import AsTuple, one_of
from ..recipe.file import Document, parse, read
from ..tuning.operation import Tune
from ..verification.verify import Verify

if TYPE_CHECKING:
    Entry = Operation
else:
    Entry = one_of(OPERATIONS, "operation", f"{AttentionBias.name}: {AttentionBias.example}")


class Recipe(Document):
    """A whole recipe; `surgery` is the version of this format."""

    elsewhere: ClassVar[dict[str, str]] = {"pretrain": "surgery pretrain"}

    operations: Annotated[
        tuple[Entry, ...],
        AsTuple,
        Field(
            min_length=1, examples=[[{"attention_bias": {"prefix": "auto"}}]],
            description="a list of operations, each with its settings, in their order",
        ),
    ]  # fmt: skip
    tune: Tune | None = Field(None, description="how to train what the operations added")
    verify: Annotated[Verify, Field(description="the gates, each with its settings")] = Verify()

    @field_validator("operations")
    @classmethod
    def _each_once_in_order(cls, value: tuple[Operation, ...]) -> tuple[Operation, ...]:
        names = [operation.name for operation in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"asks for {twice} more than once; give all its settings in one entry")
        in_order = list(dict.fromkeys(kind.name for kind in OPERATIONS if kind.name in names))
        if names != in_order:
            early = next(name for name, wanted in zip(names, in_order, strict=True) if name != wanted)
            raise ValueError(
                f"has {early} too early, which is fitted to what those before it leave; write them in the order "
                f"{', '.join(in_order)}"
            )
        if not any(operation.adds for operation in value):
            adding = " or ".join(dict.fromkeys(kind.name for kind in OPERATIONS if kind.adds))
            raise ValueError(f"has {' and '.join(names)} alone, which adds nothing; put {adding} with it")
        return _handed_on(value)

    @field_validator("verify")
    @classmethod
    def _only_gates_that_apply(cls, value: Verify, info: ValidationInfo) -> Verify:
        asked = [gate.name for gate in value.gates() if gate.same_function and gate.name in value.model_fields_set]
        tune = info.data.get("tune")
        rounding = next((gate.name for gate in value.gates() if gate.reads_linears), None)
        if rounding and (written := next((one.name for one in info.data.get("operations", ()) if one.last), None)):
            raise ValueError(
                f"asks for {rounding}, which simulates what {written} writes, and perplexity judges that; remove "
                f"{rounding}"
            )
        inexact = _inexact([*info.data.get("operations", ()), *([] if tune is None else [tune])])
        if asked and inexact:
            raise ValueError(
                f"asks for {asked[0]}, but {inexact} makes another function of the model, and perplexity decides; "
                f"remove {asked[0]}"
            )
        return value

    def of(self, port: Port) -> Recipe:
        """The same for a model that reads text, or an encoder: gates that always apply and are of the other are left
        out, and tuning has the objectives of that model.

        RecipeError where it asks for something that the model cannot have.
        """
        asked = [one.name for one in self.changes if one.reading not in (None, port)]
        asked += [
            f"verify.{gate.name}"
            for gate in self.verify.gates()
            if gate.reading not in (None, port) and gate.name in self.verify.model_fields_set
        ]
        if asked:
            reads = {"text": "a language model, which reads text", "images": "an encoder, which fidelity judges"}
            raise RecipeError(
                f"the recipe asks for {asked[0]}, which is not for {reads[port]}; remove it, or give another source."
            )
        tune = None if self.tune is None else self.tune.of(port)
        return self.model_copy(update={"tune": tune, "verify": self.verify.of(port)})

    @property
    def reading(self) -> Port | None:
        """What the model has to read for it; None where any will do."""
        asked = [operation.reading for operation in self.changes]
        asked += [
            gate.reading for gate in self.verify.gates() if not gate.always or gate.name in self.verify.model_fields_set
        ]
        return next((port for port in asked if port is not None), None)

    @property
    def changes(self) -> tuple[Operation, ...]:
        """Everything that changes the model, in order: the operations, tuning, and what comes after it."""
        before = [operation for operation in self.operations if not operation.last]
        after = [operation for operation in self.operations if operation.last]
        return (*before, *([] if self.tune is None else [self.tune]), *after)

    @property
    def searches(self) -> bool:
        """Whether a prefix is searched on calibration text."""
        return any(operation.searches for operation in self.operations)

    @property
    def exact(self) -> bool:
        """Whether the converted model is to be the function that the original is after the prefix, if any."""
        return _inexact(self.changes) is None

    @property
    def reads(self) -> str | None:
        """What of this recipe reads calibration text, in words; gates on static scales do too."""
        return next((words for change in self.changes if (words := change.reads) is not None), None)

    @property
    def reads_text(self) -> bool:
        """Whether its operations read text, or what an encoder reads, verified or not."""
        return self.searches or self.reads is not None or self.tune is not None

    @property
    def rounds_linears(self) -> bool:
        """Whether a gate rounds the weights or inputs of linear layers."""
        return any(gate.reads_linears for gate in self.verify.gates())

    @property
    def changes_weights(self) -> bool:
        """Whether tensors of the source may change, rather than others be added."""
        return any(operation.changes_weights for operation in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Every setting in force, defaults included, as plain JSON types; `Recipe.model_validate` reads it back."""
        dumped = self.model_dump(mode="json", exclude_none=True)
        if not self.exact:
            dumped["verify"] = {
                gate.name: dumped["verify"][gate.name] for gate in self.verify.gates() if not gate.same_function
            }
        return dumped


def _handed_on(operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """The same; where test-time registers are followed by what makes slots of registers, each knows of the other."""
    first = next((one for one in operations if isinstance(one, Registers)), None)
    then = next((one for one in operations if isinstance(one, EstimatedBias) and one.source == "registers"), None)
    if first is None or then is None:
        return operations
    told: dict[Operation, Operation] = {first: first.becoming_slots(), then: then.of_made()}
    return tuple(told.get(one, one) for one in operations)


def _inexact(changes: Sequence[Operation]) -> str | None:
    """What makes another function of the model, in words; None where nothing does."""
    return next((change.inexact for change in changes if change.exact == "no"), None)


# How a recipe may be given: the name of one that comes with surgery, a path, its keys, or the recipe itself.
Given = Recipe | Mapping[str, Any] | Path | str


def load_recipe(given: Given) -> Recipe:
    """The recipe `given`. RecipeError when it cannot be read or does not say something we can do."""
    return read(given, Recipe)


def parse_recipe(text: str, name: str) -> Recipe:
    """Parse recipe `text`; `name` stands for the file in messages. RecipeError names the first error of the text."""
    return parse(text, name, Recipe)
