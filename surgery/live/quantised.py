"""A model as if it were quantised: weights, activations and the key/value cache, rounded as integers would round them.

Every scheme is symmetric, q = clamp(round(x / s), -Q, Q) * s with Q = 2^(bits-1) - 1, except the cache, whose entries
are rounded between the least and the largest of each token and head (Liu et al. 2024, KIVI, arXiv 2402.02750, has
per-token values so, and per-channel keys). What is rounded is computed in the model's own dtype, so that the simulation
differs from integer kernels by the order of sums alone.

Embeddings and the output layer stay as they are, and so do slots and norms: few, and float32 on disk.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..anatomy.calls import Call, rewriting
from ..anatomy.linears import linears, means, row_dim
from ..errors import UnsupportedModel
from ..progress import Advance, unseen
from .graft import on_the_seam
from .model import Live
from .stream import stream

Ranges = Literal["static", "dynamic", "per_token"]


@dataclass(frozen=True)
class Scheme:
    """Bits of weights, activations and cache, None where they stay as they are.

    `group`: so many input channels of a weight share a scale; None: all of an output channel. `ranges`: the scale of an
    activation is "static" (one per linear layer, from calibration), "dynamic" (one per batch) or "per_token". That last
    also for the layers that `per_token` means, whatever the others have.
    """

    weights: int | None = None
    activations: int | None = None
    cache: int | None = None
    group: int | None = None
    ranges: Ranges = "static"
    per_token: tuple[str, ...] = ()

    def of(self, layer: str) -> Scheme:
        """What the linear layer of this name has."""
        named = any(means(target, layer) for target in self.per_token)
        return replace(self, ranges="per_token", per_token=()) if named else self

    @property
    def in_layers(self) -> bool:
        return self.weights is not None or self.activations is not None

    @property
    def calibrated(self) -> bool:
        return self.activations is not None and self.ranges == "static"


SCHEMES = {
    "w8a8_static": Scheme(8, 8),
    "w8a8_dynamic": Scheme(8, 8, ranges="dynamic"),
    "w8a8_per_token": Scheme(8, 8, ranges="per_token"),
    "w4a4_static": Scheme(4, 4, group=64),
    "w4": Scheme(4, group=64),
    "kv4": Scheme(cache=4),
    "kv2": Scheme(cache=2),
}


def loaded_linears(live: Live) -> dict[str, nn.Module]:
    """`linears` of a model with weights; UnsupportedModel where accelerate keeps some of them elsewhere."""
    found = linears(live.model, live.anatomy)
    if live.layers is None and any(module.weight.is_meta for module in found.values()):
        raise UnsupportedModel(
            "quantised verification rounds weights in memory, and some of these are offloaded; give a --device that "
            "holds the whole model."
        )
    return found


def rounded(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """values as symmetric integers of so many bits times `scale` (broadcast; where it is 0 so is everything)."""
    most = 2 ** (bits - 1) - 1
    steps = values / torch.where(scale > 0, scale, 1.0)
    return steps.round().clamp(-most, most) * scale


def rounded_weight(weight: torch.Tensor, bits: int, group: int | None = None) -> torch.Tensor:
    """weight (out, in) with a scale per output channel, or per `group` input channels of it (the last may be fewer)."""
    size = weight.shape[1] if group is None else group
    parts = [
        rounded(part, part.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1), bits)
        for part in weight.split(size, dim=1)
    ]
    return torch.cat(parts, dim=1)


def rounded_cache(states: torch.Tensor, bits: int) -> torch.Tensor:
    """states (B, H, S, D): each token of each head between its least and its largest entry, in 2^bits - 1 steps."""
    low, high = states.amin(dim=-1, keepdim=True), states.amax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return ((states - low) / torch.where(step > 0, step, 1.0)).round() * step + low


def activation_ranges(live: Live, chunks: torch.Tensor, advance: Advance = unseen) -> dict[str, torch.Tensor]:
    """Linear layer -> the largest |input| on calibration text `chunks` (N, T), a scalar."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(module, args) -> None:
            if args[0].numel():
                peak = args[0].abs().amax()
                found[name] = torch.maximum(found[name], peak) if name in found else peak

        return hook

    with contextlib.ExitStack() as undo:
        for name, module in loaded_linears(live).items():
            undo.callback(module.register_forward_pre_hook(watch(name)).remove)
        stream(live, chunks, [], advance=advance, what="calibration")
    return found


@contextlib.contextmanager
def quantised(live: Live, scheme: Scheme, ranges: dict[str, torch.Tensor] | None = None) -> Iterator[None]:
    """The model computes as if quantised by `scheme`; its own weights are back at the end.

    `ranges` are those of `activation_ranges`, needed for static scales.
    """
    if scheme.calibrated and ranges is None:
        raise ValueError("static scales need the ranges of calibration text")
    with contextlib.ExitStack() as undo:
        layers = loaded_linears(live) if scheme.in_layers else {}
        for name, module in layers.items():
            if scheme.weights is not None and live.layers is None:
                rounded = _Rounded(module, scheme.weights, scheme.group)
                parametrize.register_parametrization(module, "weight", rounded)
                undo.callback(parametrize.remove_parametrizations, module, "weight", leave_parametrized=False)
            if scheme.activations is not None:
                own = scheme.of(name)
                peak = ranges.get(name) if own.calibrated and ranges is not None else None
                hook = _rounding(own, scheme.activations, peak)
                undo.callback(module.register_forward_pre_hook(hook).remove)
        if scheme.weights is not None and live.layers is not None:
            undo.enter_context(
                live.layers.changing(functools.partial(_round, {*layers.values()}, scheme.weights, scheme.group))
            )
        if scheme.cache is not None:
            undo.enter_context(on_the_seam(live))
            undo.enter_context(rewriting(functools.partial(_cached, scheme.cache)))
        yield


def _cached(bits: int, call: Call) -> Call:
    return replace(call, key=rounded_cache(call.key, bits), value=rounded_cache(call.value, bits))


def _round(layers: set[nn.Module], bits: int, group: int | None, module: nn.Module) -> None:
    """Round the weight of `module`, which was just loaded, if it is one of `layers`."""
    if module in layers:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        weight.data = _Rounded(module, bits, group)(weight.data)


class _Rounded(nn.Module):
    """Rounds a weight whenever it is read: one layer's at a time is in memory twice."""

    def __init__(self, module: nn.Module, bits: int, group: int | None) -> None:
        super().__init__()
        self.rows, self.bits, self.group = row_dim(module), bits, group

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        by_rows = weight.transpose(0, self.rows)  # (out, in)
        return rounded_weight(by_rows, self.bits, self.group).transpose(0, self.rows)


def _rounding(scheme: Scheme, bits: int, peak: torch.Tensor | None):
    most = 2 ** (bits - 1) - 1

    def hook(module, args):
        values = args[0]
        if scheme.ranges == "static":
            scale = values.new_zeros(()) if peak is None else peak.to(values) / most
        elif scheme.ranges == "dynamic":
            scale = values.abs().amax() / most
        else:
            scale = values.abs().amax(dim=-1, keepdim=True) / most
        return (rounded(values, scale, scheme.activations), *args[1:])

    return hook
