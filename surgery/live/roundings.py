"""What layers of a quantised model round of what enters and leaves them: made steady to compare, passed by gradients.

Rounding makes a step of the least difference. So such a model is compared with itself in float64, where differences are
small enough to make none, but for one place: by compressed-tensors' dynamic scales of integers, the largest value of a
token always lies on the edge between two steps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_OFF_THE_EDGE = 1 + 2**-20  # what dynamic scales are multiplied by

Rounding = Callable[[nn.Module, str, torch.Tensor, Any], torch.Tensor]


def rounds_values(model: nn.Module) -> bool:
    """Whether layers of `model` round what enters or leaves them."""
    return any(True for _ in _rounding(model))


@contextlib.contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Within the block, dynamic scales are a millionth larger, so that no value lies on an edge by construction."""
    with _rounded_by(model, _steadily):
        yield


@contextlib.contextmanager
def straight_through(model: nn.Module) -> Iterator[None]:
    """Within the block, gradients pass what is rounded as if it were not (Bengio et al. 2013, arXiv 1308.3432).

    compressed-tensors takes it out of the graph. Values stay what they are, to the bit.
    """
    with _rounded_by(model, _straight):
        yield


def _rounding(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Layers that round, each with what compressed-tensors knows of it."""
    for module in model.modules():
        scheme: Any = getattr(module, "quantization_scheme", None)
        if scheme is not None and (scheme.input_activations or scheme.output_activations):
            yield module, scheme


@contextlib.contextmanager
def _rounded_by(model: nn.Module, rounded: Rounding) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        for module, scheme in _rounding(model):
            undo.callback(setattr, module, "forward", module.forward)
            module.forward = functools.partial(_forward, module, scheme, rounded)
        yield


def _forward(module: nn.Module, scheme: Any, rounded: Rounding, values: torch.Tensor) -> torch.Tensor:
    if scheme.input_activations:
        values = rounded(module, "input", values, scheme.input_activations)
    values = type(module).forward(module, values)
    return rounded(module, "output", values, scheme.output_activations) if scheme.output_activations else values


def _steadily(module: nn.Module, which: str, values: torch.Tensor, arguments: Any) -> torch.Tensor:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize, forward_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    found: torch.Tensor
    if arguments.dynamic is not True or arguments.type != "int":
        found = forward_quantize(module, values, which, arguments)
    else:
        scale, zero = compute_dynamic_scales_and_zp(value=values, args=arguments, module=module)
        found = fake_quantize(values, scale * _OFF_THE_EDGE, zero, arguments)
    return found


def _straight(module: nn.Module, which: str, values: torch.Tensor, arguments: Any) -> torch.Tensor:
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    found: torch.Tensor = _Straight.apply(values, forward_quantize(module, values.detach(), which, arguments))
    return found


class _Straight(torch.autograd.Function):
    """`rounded` forwards; backwards its gradient is that of `values`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return upstream, None
