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

IMAGES = 2
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}  # of a feature's length


def random_features(live: Live, prefix: Sequence[int] = ()) -> Features:
    """What the encoder makes of random images, recordings, or texts after `prefix`, as large as it was made for."""
    at_random = replace(live, port=port_of(live.anatomy))
    found = Features(at_random)
    stream(at_random, random_inputs(live.anatomy, IMAGES), [found], prefix=prefix)
    return found


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
