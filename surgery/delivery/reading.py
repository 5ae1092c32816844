"""What a model in memory gives to token ids: log-probabilities of a text, and ids to try it on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedModel
from ..live.likelihood import token_losses
from ..progress import Advance
from .base import Engine, Finished

ROWS, TOKENS = 2, 48
# Nats. SmolLM2 in int8, vLLM's kernels against the simulation, has 0.13 on text; random weights had 0.4. Without its
# slots the same SmolLM2 is worse by 0.63 on average.
ROUNDED = 0.5
# Of how far a model is from itself with its slots turned round: what is further is not rounding. In a model whose
# slots do little the limit above would see nothing.
TURNED = 2 / 3


def random_ids(finished: Finished) -> torch.Tensor:
    """Random token ids (2, T), the same whenever they are asked for: T is 48, or what positions the model has."""
    anatomy, n = finished.described.anatomy, finished.described.eab.n_slots
    length = TOKENS if anatomy.max_positions is None else min(TOKENS, anatomy.max_positions - n)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, anatomy.vocab_size or 1, (ROWS, length), generator=generator)


@dataclass(frozen=True)
class Distance:
    """How far log-probabilities of an export are from the checkpoint's: what is judged of them, and what is allowed.

    Of a quantised model the largest difference says nothing: integer kernels and the rounding that transformers
    simulates sum in another order, a value at an edge falls to the other side, and what follows is another draw of the
    same noise. Kernels of 4 bit weights compute in bfloat16. There the mean is judged.
    """

    name: str
    called: str
    value: float
    limit: float

    @property
    def close(self) -> bool:
        return math.isfinite(self.value) and self.value <= self.limit


@dataclass(frozen=True)
class Expected:
    """Log-probabilities of the checkpoint; `turned`: with its slots turned round, where it is quantised."""

    logs: torch.Tensor
    turned: torch.Tensor | None = None

    @property
    def rounding(self) -> float:
        """The largest mean |delta log-probability| that rounding explains."""
        if self.turned is None:
            return ROUNDED
        return min(ROUNDED, TURNED * (self.turned.double() - self.logs.double()).abs().mean().item())


@torch.no_grad()
def expected(model: Any, finished: Finished, answer: Callable[[], torch.Tensor]) -> Expected:
    """What `answer` gives of the converted `model` in memory."""
    logs = answer()
    if finished.described.packed is None:
        return Expected(logs)
    slots = [parameter for name, parameter in model.named_parameters() if ".attention_bias." in f".{name}"]
    for parameter in slots:
        parameter.neg_()
    turned = answer()
    for parameter in slots:
        parameter.neg_()
    return Expected(logs, turned)


def distance(found: torch.Tensor, wanted: Expected, engine: Engine, finished: Finished) -> Distance:
    """Of log-probabilities of the same tokens, in any shape."""
    delta = (found.double() - wanted.logs.double()).abs()
    if finished.described.packed is not None:
        called = "mean |delta log-probability|"
        return Distance("mean_log_probability", called, delta.mean().item(), wanted.rounding)
    return Distance("log_probability", "largest |delta log-probability|", delta.max().item(), engine.limit)


def require_close(found: Distance, engine: Engine, finished: Finished) -> None:
    """UnsupportedModel where log-probabilities of random ids differ by more than rounding explains."""
    if not found.close:
        raise UnsupportedModel(
            f"{finished.described.anatomy.model_type}: on random ids {engine.title} differs from {finished.name}: "
            f"the {found.called} is {found.value:.3g}, and rounding explains {found.limit:.2g}, so what {engine.title} "
            "computes is not the same function."
        )


@torch.inference_mode()
def text_log_probabilities(model: Any, chunks: torch.Tensor, advance: Advance) -> torch.Tensor:
    """Log-probability that `model` gives each token of `chunks` (N, T) after those before it: (N, T - 1), in nats."""
    rows = []
    for chunk in chunks:
        ids = chunk[None].to(model.device)
        logits = model(input_ids=ids).logits[0, :-1]
        rows.append(-token_losses(logits, ids[0, 1:]).cpu())
        advance(1, "")
    return torch.stack(rows)


@torch.inference_mode()
def all_log_probabilities(model: Any, ids: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
    """What `model` gives each token of the vocabulary after each of `ids` (B, T): (B, T, V), float32
    or wider, on the CPU.

    `given`: mask and positions, if any.
    """
    logits = model(input_ids=ids.to(model.device), **given).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).cpu()
