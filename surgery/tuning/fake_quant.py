"""Activations rounded in the training loop, with gradients: straight through the rounding, and through its range.

The gradient passes the rounding as if it were the identity (Bengio et al. 2013, arXiv 1308.3432). It also reaches the
scale, as in learned step sizes (Esser et al. 2020, LSQ, arXiv 1902.08153): a step that is too coarse pushes the largest
activation down, which is what makes a model easy to quantise. On SmolLM2 the latter is most of the gain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


def straight_through(values: torch.Tensor, bits: int) -> torch.Tensor:
    """values (B, ...) rounded to symmetric integers of so many bits, with one scale per sequence from its largest |x|.

    The scale is the sequence's own, not the batch's: a step must not depend on how it is cut into micro-batches.
    """
    most = 2 ** (bits - 1) - 1
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    peak = wide.abs().amax(dim=tuple(range(1, wide.ndim)), keepdim=True)
    scale = (peak / most).clamp(min=torch.finfo(wide.dtype).tiny)
    steps = wide / scale
    steps = steps + (steps.round().clamp(-most, most) - steps).detach()
    return (steps * scale).to(values.dtype)


@contextlib.contextmanager
def fake_quantised(layers: Iterable[nn.Module], bits: int) -> Iterator[None]:
    """Each of `layers`, linear ones or what an adapter made of them, reads its input through `straight_through`."""

    def hook(module, args):
        return (straight_through(args[0], bits), *args[1:])

    with contextlib.ExitStack() as undo:
        for layer in layers:
            undo.callback(layer.register_forward_pre_hook(hook).remove)
        yield
