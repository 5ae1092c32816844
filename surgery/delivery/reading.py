"""What a model in memory gives to token ids: log-probabilities of a text, and ids to try it on."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedModel
from ..live.likelihood import token_losses
from ..progress import Advance
from .base import Engine, Finished

ROWS, TOKENS = 2, 48


def random_ids(finished: Finished) -> torch.Tensor:
    """Random token ids (2, T), the same whenever they are asked for: T is 48, or what positions the model has."""
    anatomy, n = finished.described.anatomy, finished.described.eab.n_slots
    length = TOKENS if anatomy.max_positions is None else min(TOKENS, anatomy.max_positions - n)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, anatomy.vocab_size or 1, (ROWS, length), generator=generator)


def require_close(delta: float, engine: Engine, finished: Finished) -> None:
    """UnsupportedModel where log-probabilities of random ids differ by more than rounding explains."""
    if not delta <= engine.limit:
        raise UnsupportedModel(
            f"{finished.described.anatomy.model_type}: on random token ids the original in {engine.title} differs from "
            f"{finished.name} by {delta:.3g} in log-probability (rounding explains {engine.limit:g}), so what "
            f"{engine.title} computes is not the same function."
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
