"""The comparison that nothing skips, of encoders: random images, sound or token ids before and after an operation that
is to be exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..errors import UnsupportedModel
from ..live.features import Features
from ..live.model import Live
from ..live.port import Images, port_of, random_inputs
from ..live.stream import stream
from ..live.text import behind

IMAGES, PADDING = 2, 3
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}  # of a feature's length


def random_features(live: Live, prefix: Sequence[int] = ()) -> Features:
    """What the encoder makes of random images, recordings, or texts after `prefix`, as large as it was made for."""
    at_random, given = replace(live, port=port_of(live.anatomy)), random_inputs(live.anatomy, IMAGES)
    found = Features(at_random)
    stream(at_random, given, [found], prefix=prefix)
    if live.port.of_text:
        found.found.extend(_padded(live, given, prefix))
    return found


@torch.inference_mode()
def _padded(live: Live, ids: torch.Tensor, prefix: Sequence[int]) -> torch.Tensor:
    """Last hidden states of texts (N, T) after `prefix`, of which the second is padded as a tokenizer pads."""
    mask = torch.ones_like(ids)
    mask[1:, -PADDING:] = 0
    whole, seen = behind(prefix, ids), behind([1] * len(prefix), mask)
    states = live.trunk(input_ids=whole.to(live.device), attention_mask=seen.to(live.device))[0]
    return (states[:, len(prefix) :].cpu() * mask[..., None]).float()


def require_alike(live: Live, before: Features, what: str) -> None:
    """UnsupportedModel where the encoder makes other features of the same input than `before` `what` was done: of a
    prefix that is folded, before was after it."""
    after = random_features(live)
    pairs = zip(after.found, before.found, strict=True)
    worst = max(float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-12)).max()) for a, b in pairs)
    limit = ROUNDING.get(live.model.dtype, 0.1)
    if not worst <= limit:
        assert isinstance(live.port, Images)
        raise UnsupportedModel(
            f"{live.anatomy.model_type}: on random {live.port.called.many} the encoder with {what} differs from the "
            f"one before by {worst:.3g} of a feature's length (rounding explains {limit:.3g}), so it is not exact for "
            "this model and nothing was written"
        )
