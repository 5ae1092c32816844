"""What a model in memory gives to token ids: log-probabilities of a text, and ids to try it on."""

from __future__ import annotations

from typing import Any

import torch

from ..anatomy.sites import Anatomy
from ..live.likelihood import token_losses
from ..progress import Advance

ROWS, TOKENS = 2, 48


def random_ids(anatomy: Anatomy, length: int) -> torch.Tensor:
    """The same random token ids (2, length) whenever they are asked for."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, anatomy.vocab_size or 1, (ROWS, length), generator=generator)


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
