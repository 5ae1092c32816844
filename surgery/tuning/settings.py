"""What `tune:` of a recipe says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_serializer, field_validator, model_validator

from ..anatomy.linears import means, require_known
from ..checkpoint.provenance import name_of
from ..errors import RecipeError
from ..live.quantised import SCHEMES, Scheme
from ..operations.base import Port
from ..recipe.fields import AsTuple, Positive, Strict, Targets, Weight
from ..recipe.training import Training

# Objectives that compare what only one kind of model has; and what an encoder has where a recipe does not say.
OF: dict[str, Port] = {"kl": "text", "lm": "text", "features": "images"}
OF_ENCODERS = {"kl": 0.0, "features": 1.0, "hidden": 1.0}
_REFUSED: dict[Port, str] = {
    "images": "which compares logits, and an encoder's features are compared by 'features' or 'hidden'",
    "text": "which compares an encoder's features, and a language model's logits are compared by 'kl'",
}


class Objectives(Strict):
    """Weights of what tuning lowers (`tuning.objectives`); 0 leaves one out.

    An encoder makes no logits: for one, `kl` is 0 where it is not given, `features` 1 and `hidden` 1. Of DINOv2-small
    with registers put into it, both together brought images that were not trained on nearer than either.
    """

    kl: Annotated[Weight, Field(description="divergence from the original after the same prefix")] = 1.0
    lm: Annotated[Weight, Field(description="negative log-likelihood of the text")] = 0.0
    features: Annotated[
        Weight, Field(description="1 less the cosine of features with the original's; of an encoder, where it is 1.0")
    ] = 0.0
    hidden: Annotated[
        Weight, Field(description="distance of the residual stream from the original's; of an encoder 1.0")
    ] = 0.0
    massive: Annotated[Weight, Field(description="how far activations are beyond Sun's criterion")] = 0.0
    peak_ratio: Annotated[Weight, Field(description="the largest activation over the median, as a logarithm")] = 0.0

    @model_validator(mode="after")
    def _some(self) -> Objectives:
        if not any(self.weights().values()):
            raise ValueError("has no weight above 0, so there is nothing to lower; write 'kl: 1.0'")
        return self

    def weights(self) -> dict[str, float]:
        """Name -> weight of those that count."""
        return {name: weight for name in type(self).model_fields if (weight := getattr(self, name))}

    def of(self, port: Port) -> Self:
        """The same for a model that reads text, or images. RecipeError for an objective that is of the other."""
        given = self.model_fields_set
        found = self
        if port == "images":
            usual = {key: weight for key, weight in OF_ENCODERS.items() if key not in given}
            found = self.model_copy(update=usual)
        if other := next((name for name in found.weights() if OF.get(name, port) != port), None):
            raise RecipeError(f"the recipe asks for tune.objectives.{other}, {_REFUSED[port]}; remove it.")
        if not found.weights():
            raise RecipeError(
                "tune.objectives has no weight above 0, so there is nothing to lower; write 'features: 1.0'."
            )
        return found


class Lora(Strict):
    """LoRA on linear layers inside the blocks, merged into the weights that are emitted."""

    rank: Annotated[int, Field(ge=1, description="rank of the update")] = 16
    scale: Annotated[Positive, Field(description="factor on the update (alpha / rank)")] = 2.0
    targets: Annotated[Targets, Field(description="all linear layers, or a list of names such as q_proj")] = "all"
    learning_rate: Annotated[Positive, Field(description="learning rate of these parameters")] = 1e-3

    def targeted(self, names: Sequence[str]) -> list[str]:
        """Of the linear layers `names`, those that `targets` means; SourceError for a target that means none."""
        if self.targets == "all":
            return list(names)
        require_known(self.targets, names, "tune.lora.targets")
        return [name for name in names if any(means(target, name) for target in self.targets)]


class Dataset(Strict):
    """Text to tune on instead of --calibration: a dataset of the hub, or a directory that `datasets` reads as one."""

    name: Annotated[str, Field(min_length=1, examples=["allenai/c4"], description="hub id, or a directory")]
    config: Annotated[str, Field(min_length=1)] | None = Field(None, description="which, where it has several")
    split: Annotated[str, Field(min_length=1, description="which split")] = "train"
    column: Annotated[str, Field(min_length=1, description="the column that holds the text")] = "text"
    characters: Annotated[int, Field(ge=1, description="how many characters are read")] = 4_000_000

    @field_serializer("name")
    def _without_path(self, name: str) -> str:
        """What is written about a run names no directory of whoever ran it."""
        return name_of(name) if os.path.isabs(name) or os.path.isdir(name) else name


class Settings(Training):
    """How to train: see `tuning.operation.Tune`."""

    dataset: Dataset | None = Field(None, description="text to train on in place of the calibration text")
    accumulate: Annotated[int, Field(ge=1, description="micro-batches of a step, which divide the batch")] = 1
    precision: Annotated[
        Literal["float32", "bfloat16"], Field(description="precision of forward and backward passes")
    ] = "float32"
    objectives: Annotated[Objectives, Field(description="what is lowered")] = Objectives()
    quantised: Literal["w8a8_static", "w8a8_dynamic", "w8a8_per_token", "w4a4_static"] | None = Field(
        None, description="round activations in training as this scheme does, and judge so"
    )
    per_token: Annotated[
        tuple[str, ...],
        AsTuple,
        Field(description="of quantised: layers, such as down_proj, whose inputs have a scale per token instead"),
    ] = ()
    lora: Lora | None = Field(None, description="train low-rank updates of the linear layers too")
    anneal: Annotated[
        float, Field(ge=0, le=1, allow_inf_nan=False, description="share of the steps in which head norms' gates open")
    ] = 0.5
    patience: Annotated[int, Field(ge=1)] | None = Field(
        None, examples=[3], description="judgements without a better one, after which training stops"
    )

    @field_validator("accumulate")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("batch", value) % value:
            raise ValueError(f"is {value}, which does not divide the batch of {info.data['batch']} sequences")
        return value

    @field_validator("per_token")
    @classmethod
    def _of_rounding(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if value and info.data.get("quantised") is None:
            raise ValueError("is of quantised, which is not given; leave it out")
        return value

    def of(self, port: Port) -> Self:
        """The same for a model that reads text, or images. RecipeError where it asks for something of the other."""
        if port == "images" and self.dataset is not None:
            raise RecipeError(
                "the recipe asks for tune.dataset, which is text for a language model; remove it, and give an encoder "
                "what it reads with --calibration."
            )
        return self.model_copy(update={"objectives": self.objectives.of(port)})

    @property
    def scheme(self) -> Scheme | None:
        """How activations are rounded in training; None where they are not."""
        return None if self.quantised is None else replace(SCHEMES[self.quantised], per_token=self.per_token)

    @property
    def reads_linears(self) -> bool:
        """Whether it adds to linear layers, or rounds their inputs."""
        return self.lora is not None or self.quantised is not None
