"""Activations rounded in the training loop, with gradients: straight through the rounding, and through its range.

The gradient passes the rounding as if it were the identity (Bengio et al. 2013, arXiv 1308.3432). It also reaches the
scale, as in learned step sizes (Esser et al. 2020, LSQ, arXiv 1902.08153): a step that is too coarse pushes the largest
activation down, which is what makes a model easy to quantise. On SmolLM2 the latter is most of the gain.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..live.quantised import Scheme


def straight_through(values: torch.Tensor, bits: int, per_token: bool = False) -> torch.Tensor:
    """values (B, ..., d) rounded to symmetric integers of so many bits; one scale per sequence from its largest |x|.

    The scale is the sequence's own, not the batch's: a step must not depend on how it is cut into micro-batches. Or it
    is each token's own.
    """
    rows = values.flatten(0, -2) if per_token else values.flatten(1)
    return _Rounded.apply(rows, 2 ** (bits - 1) - 1).view(values.shape)


class _Rounded(torch.autograd.Function):
    """Rows (N, M), each rounded to multiples s q of s = max |x| / `most`, with |q| <= `most`.

    By hand, which takes half the time of autograd: with upstream gradients u, dL/dx = u, and dL/ds = sum(u (q - x / s))
    goes to the largest |x| alone.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor, most: int) -> torch.Tensor:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        peak, where = wide.abs().max(dim=1, keepdim=True)
        scale = (peak / most).clamp(min=torch.finfo(wide.dtype).tiny)
        steps = wide / scale
        rounded = steps.round().clamp_(-most, most)
        ctx.save_for_backward(torch.sub(rounded, steps, out=steps), where, wide.gather(1, where).sign() / most)
        return rounded.mul_(scale).to(rows.dtype)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        error, where, slope = ctx.saved_tensors
        to_peak = (upstream.to(error.dtype) * error).sum(dim=1, keepdim=True) * slope
        return upstream.scatter_add(1, where, to_peak.to(upstream.dtype)), None


@contextlib.contextmanager
def fake_quantised(
    layers: Mapping[str, nn.Module], scheme: Scheme, sequences: int | None = None
) -> Iterator[None]:  # fmt: skip
    """Each of `layers`, linear ones by name or what an adapter made of them, reads inputs by `straight_through`.

    Some models flatten sequences and tokens into one dimension before a layer: `sequences` tells them apart again.
    Scales are static or of a batch in `scheme`, and here of each sequence, which is what training can see of either.
    """
    bits = scheme.activations
    if bits is None:
        raise ValueError("the scheme rounds no activations")

    def hook(per_token: bool, module, args):
        values = args[0]
        rows = values.shape[0] if sequences is None or values.shape[0] % sequences else sequences
        by_sequence = values.reshape(rows, -1, values.shape[-1])
        return (straight_through(by_sequence, bits, per_token).reshape(values.shape), *args[1:])

    with contextlib.ExitStack() as undo:
        for name, layer in layers.items():
            rounding = functools.partial(hook, scheme.of(name).ranges == "per_token")
            undo.callback(layer.register_forward_pre_hook(rounding).remove)
        yield
