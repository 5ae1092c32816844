"""`tune:` how to train what the operations added."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .fields import Gate, Strict, Targets, Weight
from .training import Training


class Objectives(Strict):
    """Weights of what tuning lowers (`tuning.objectives`); 0 leaves one out."""

    kl: Weight = 1.0
    lm: Weight = 0.0
    hidden: Weight = 0.0
    massive: Weight = 0.0
    peak_ratio: Weight = 0.0

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
    scale: Gate = 2.0
    targets: Targets = "all"
    learning_rate: Gate = 1e-3


class Dataset(Strict):
    """Text to tune on instead of --calibration: a dataset of the hub, or a directory that `datasets` reads as one.

    Of its `split`, the first so many characters of the text in `column`; `config` where it has several.
    """

    name: Annotated[str, Field(min_length=1)]
    config: Annotated[str, Field(min_length=1)] | None = None
    split: Annotated[str, Field(min_length=1)] = "train"
    column: Annotated[str, Field(min_length=1)] = "text"
    characters: Annotated[int, Field(ge=1)] = 4_000_000


class Tune(Training):
    """Train what the operations added, on `dataset` or else on the calibration text.

    A step reads its batch, over all processes, in `accumulate` micro-batches. Judged is, on the first `held_out` chunks
    of that text, the model as it would be emitted, quantised if `quantised` names a scheme; training stops after
    `patience` judgements without a better one. The gate of head norms rises from 0 to that of the recipe over the share
    `anneal` of the steps; one of 0 is learned.
    """

    dataset: Dataset | None = None
    accumulate: Annotated[int, Field(ge=1)] = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    objectives: Objectives = Objectives()
    quantised: Literal["w8a8_static", "w8a8_dynamic", "w8a8_per_token", "w4a4_static"] | None = None
    lora: Lora | None = None
    anneal: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    patience: Annotated[int, Field(ge=1)] | None = None

    @field_validator("accumulate")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("batch", value) % value:
            raise ValueError(f"is {value}, which does not divide the batch of {info.data['batch']} sequences")
        return value
