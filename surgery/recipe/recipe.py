"""The recipe: the YAML a person writes to say what to change in a checkpoint and what must hold afterwards.

Strict on purpose. A misspelt gate that is silently ignored is a gate that never fails, so unknown keys, duplicate
keys, wrong types and numbers that are not finite are errors, each one sentence naming file, line and key.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
)

from .fields import AsTuple, Format, Strict
from .gates import Verify
from .operations import AttentionBias, HeadNorm, Operation, Smoothing
from .tune import Tune


class Recipe(Strict):
    """A whole recipe; `surgery` is the version of this format."""

    surgery: Format
    operations: Annotated[tuple[Operation, ...], AsTuple, Field(min_length=1)]
    tune: Tune | None = None
    verify: Verify = Verify()

    @field_validator("operations")
    @classmethod
    def _each_once_in_order(cls, value: tuple[Operation, ...]) -> tuple[Operation, ...]:
        names = [operation.name for operation in value]
        if names.count("attention_bias") > 1:
            raise ValueError("asks for attention_bias more than once; give all its tokens in one prefix")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"asks for {twice} more than once; give all its settings in one entry")
        in_order = [name for name in Operation.model_fields if name in names]
        if names != in_order:
            early = next(name for name, wanted in zip(names, in_order, strict=True) if name != wanted)
            raise ValueError(
                f"has {early} too early, which is fitted to what those before it leave; write them in the order "
                f"{', '.join(in_order)}"
            )
        if names == ["smoothing"]:
            raise ValueError("has smoothing alone, which adds nothing; put attention_bias or head_norm with it")
        return value

    @field_validator("verify")
    @classmethod
    def _only_gates_that_apply(cls, value: Verify, info: ValidationInfo) -> Verify:
        given = "equivalence" in value.model_fields_set
        if given and not _is_exact(info.data.get("operations", ()), info.data.get("tune")):
            raise ValueError(
                "asks for equivalence, but tune, or head_norm with a gate above 0, makes another function of the "
                "model, and perplexity decides; remove equivalence"
            )
        return value

    @property
    def attention_bias(self) -> AttentionBias | None:
        return next((op.attention_bias for op in self.operations if op.attention_bias is not None), None)

    @property
    def searches(self) -> bool:
        """Whether the prefix is searched on calibration text."""
        return self.attention_bias is not None and self.attention_bias.prefix == "auto"

    @property
    def smoothing(self) -> Smoothing | None:
        return next((op.smoothing for op in self.operations if op.smoothing is not None), None)

    @property
    def head_norm(self) -> HeadNorm | None:
        return next((op.head_norm for op in self.operations if op.head_norm is not None), None)

    @property
    def exact(self) -> bool:
        """Whether the converted model is to be the function that the original is behind the prefix, if any.

        Only then does the gate `equivalence` apply. Slots and smoothing are exact, and so are head norms at gate 0.
        """
        return _is_exact(self.operations, self.tune)

    @property
    def fits(self) -> str | None:
        """What of this recipe reads calibration text, in words; gates on static scales do too."""
        reads = {
            "smoothing is scaled": self.smoothing is not None,
            "head_norm is fitted": self.head_norm is not None,
            "tune trains": self.tune is not None and self.tune.dataset is None,
        }
        return next((what for what, true in reads.items() if true), None)

    @property
    def changes_weights(self) -> bool:
        """Whether tensors of the source may change, rather than others be added."""
        return self.smoothing is not None or (self.tune is not None and self.tune.lora is not None)

    def to_dict(self) -> dict[str, Any]:
        """Every setting in force, defaults included, as plain JSON types; `Recipe.model_validate` reads it back."""
        dumped = self.model_dump(mode="json", exclude_none=True)
        if not self.exact:
            del dumped["verify"]["equivalence"]
        return dumped


def _is_exact(operations: tuple[Operation, ...], tune: Tune | None) -> bool:
    return tune is None and all(op.head_norm is None or op.head_norm.gate == 0 for op in operations)
