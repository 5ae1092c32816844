"""What every part of a recipe that trains has in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Positive, Strict


class Training(Strict):
    """So many optimiser steps of `batch` sequences of `length` tokens, judged on other text every `evaluate_every`.

    The learning rate rises over `warmup` steps, and then falls as half a cosine or stays. Gradients are clipped to the
    norm `clip`. `held_out`: sequences that are judged on and never trained on.
    """

    steps: Annotated[int, Field(ge=1, examples=[300], description="optimiser steps")]
    batch: Annotated[int, Field(ge=1, description="sequences in a step, over all processes")] = 2
    length: Annotated[int, Field(ge=2, description="tokens in a sequence")] = 256
    learning_rate: Annotated[Positive, Field(description="the highest, reached after warm-up")] = 3e-3
    schedule: Annotated[
        Literal["cosine", "constant"], Field(description="what the learning rate does after warm-up")
    ] = "cosine"
    warmup: Annotated[int, Field(ge=0, description="steps in which the learning rate rises")] = 10
    clip: Annotated[Positive, Field(description="the largest norm of a gradient")] = 1.0
    seed: Annotated[int, Field(description="seed of the order of sequences, and of what begins at random")] = 0
    evaluate_every: Annotated[int, Field(ge=1, description="steps from one judgement to the next")] = 50
    held_out: Annotated[int, Field(ge=1, description="sequences that are judged on, never trained on")] = 16
