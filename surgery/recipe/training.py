"""What every part of a recipe that trains has in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Gate, Strict


class Training(Strict):
    """So many optimiser steps of `batch` sequences of `length` tokens, judged on other text every `evaluate_every`.

    The learning rate rises over `warmup` steps, and then falls as half a cosine or stays. Gradients are clipped to the
    norm `clip`. `held_out`: sequences that are judged on and never trained on.
    """

    steps: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)] = 2
    length: Annotated[int, Field(ge=2)] = 256
    learning_rate: Gate = 3e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 10
    clip: Gate = 1.0
    seed: int = 0
    evaluate_every: Annotated[int, Field(ge=1)] = 50
    held_out: Annotated[int, Field(ge=1)] = 16
