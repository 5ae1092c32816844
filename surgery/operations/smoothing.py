"""Smooth channels with large activations into the weights that read them, exactly; quantisation is what gains.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) with scales rounded to powers of two: the model stays the same function
to the bit, and a static scale for all channels of an input no longer serves the few large ones alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..anatomy.linears import LINEAR, as_rows
from ..anatomy.stored import find_stored, stored_name
from ..converted.card import Section
from ..errors import UnsupportedModel
from ..live.loading import require_in_memory
from ..live.model import Live
from ..live.port import answer
from ..live.stream import stream
from ..progress import Advance, unseen
from ..recipe.fields import AsTuple
from .base import Alter, Changes, Exact, Fitting, Operation, Stand, Target
from .pairs import Pair, Side, apply, find, scaled, sides, touches, without_loss

Scaled = tuple[Pair, torch.Tensor]  # with exponents of two (width,)

MOST = 10  # scales are within 2^-10 .. 2^10


@dataclass(frozen=True)
class Smoothed:
    """Pairs in the order of scaling, each with its exponents of two (width,), and the tensors that changes: names in
    the trunk."""

    pairs: tuple[tuple[Pair, torch.Tensor], ...]
    changed: tuple[str, ...]


class Smoothing(Operation):
    """Move channels with large activations into the weights that read them, by powers of two: the same function.

    `inputs`: of which linear layers, those that end MLPs ("down") and those after norms ("norm"). `strength`: how much
    of what is large in activations goes over to the weights.
    """

    name: ClassVar[str] = "smoothing"

    strength: Annotated[
        float, Field(gt=0, le=1, allow_inf_nan=False, description="how much goes over to the weights")
    ] = 0.8
    inputs: Annotated[
        tuple[Literal["down", "norm"], ...],
        AsTuple,
        Field(min_length=1, description="of the layers that end MLPs (down), of those after norms (norm)"),
    ] = ("down", "norm")

    @property
    def exact(self) -> Exact:
        return "bits"

    @property
    def changes_weights(self) -> bool:
        return True

    @property
    def reads(self) -> str | None:
        return "smoothing is scaled"

    @property
    def whole(self) -> bool:
        return False  # pairs lie within blocks

    def could_make(self, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Rows and columns, each by a power of two."""
        (mantissas, exponents), (changed, moved) = torch.frexp(before.float()), torch.frexp(after.float())
        if not torch.equal(mantissas, changed):
            return False
        by = moved - exponents
        if before.ndim < 2 or bool((mantissas == 0).any()):  # a zero does not show by what it was scaled
            return True
        by = by.flatten(1)
        return bool((by - by[:1] - by[:, :1] + by[0, 0] == 0).all())

    def plan(self, target: Target, parts: Smoothed | None = None) -> Changes:
        """Any weight of a block may change. UnsupportedModel where none is stored as the model has it."""
        anatomy, found, renamed = target.anatomy, {}, []
        trunk = anatomy.blank.get_submodule(anatomy.trunk)
        for block in anatomy.blocks:
            for name, module in trunk.get_submodule(block).named_modules(prefix=block):
                linear = isinstance(module, LINEAR)
                for part, parameter in module.named_parameters(recurse=False):
                    stored = find_stored(target.layout, anatomy, f"{name}.{part}")
                    if stored is not None and (linear or parameter.ndim == 1):
                        found[stored] = "may change"
                    elif linear:
                        renamed.append(f"{anatomy.lead}{name}.{part}")
        if renamed and not found:
            stored_name(target.layout, anatomy, renamed[0])  # raises
        return Changes(changed=found)

    def require(self, live: Live) -> None:
        if live.layers is None:
            require_in_memory(live.model, "smoothing")

    def fit(self, live: Live, text: Fitting) -> Smoothed:
        text.reporter.step("smooth channels with large activations")
        with text.reporter.bar("smoothing", len(text.chunks)) as advance:
            parts = smooth(live, text.chunks, self.inputs, self.strength, advance)
        for name in parts.changed:
            stored_name(text.target.layout, live.anatomy, f"{live.anatomy.lead}{name}")  # refused before the long work
        text.reporter.note(f"{len(parts.changed)} tensors changed by powers of two, and nothing that comes out")
        return parts

    def graft(self, live: Live, parts: Smoothed) -> contextlib.AbstractContextManager[object]:
        if live.layers is not None:
            return scaled_in(live, parts.pairs)
        scale(live.trunk, parts.pairs)
        return contextlib.nullcontext()

    def tensors(self, live: Live, parts: Smoothed) -> Mapping[str, torch.Tensor]:
        return {}

    def alters(self, parts: Smoothed, target: Target) -> Mapping[str, Alter]:
        lead, blank = target.anatomy.lead, target.anatomy.blank.get_submodule(target.anatomy.trunk)
        every = _by_name(blank, parts.pairs)
        return {f"{lead}{name}": functools.partial(_scaled, every[name]) for name in parts.changed}

    def says(self, parts: Smoothed, target: Target, recipe: Stand) -> Section:
        return Section(
            text=f"Smoothing has scaled {len(parts.changed):,} tensors by powers of two, the same function: what was "
            "large in activations is in the weights that read them."
        )


def smooth(
    live: Live, chunks: torch.Tensor, kinds: Sequence[str], strength: float, advance: Advance = unseen
) -> Smoothed:
    """Pairs of the live model, and the exponents by which they are scaled on calibration text `chunks` (N, T).

    The model is left as it was. UnsupportedModel where nothing can be scaled, where nothing has to be, or where the
    logits on random tokens are not the same bits when it is.
    """
    kind = live.anatomy.model_type
    pairs = [pair for pair in find(live) if pair.kind in kinds]
    if not pairs:
        raise UnsupportedModel(
            f"{kind}: no channel can be scaled exactly (no {' or '.join(kinds)} input of linear layers "
            "whose source is theirs alone), so smoothing would change nothing; leave it out."
        )
    before = answer(live)
    done, changed = _without_loss(live, list(zip(pairs, scales(live, pairs, chunks, strength, advance), strict=True)))
    if not done:
        raise UnsupportedModel(
            f"{kind}: every channel that can be scaled is about as large as the others on the "
            "calibration text, so smoothing would change nothing; leave it out."
        )
    with scaled_in(live, done):
        same = torch.equal(answer(live), before)
    if not same:
        raise UnsupportedModel(
            f"{kind}: scaled channels changed what the model says, so something reads them beside the layers that "
            "were found; leave smoothing out."
        )
    return Smoothed(tuple(done), changed)


@torch.no_grad()
def _without_loss(live: Live, wanted: Sequence[Scaled]) -> tuple[list[Scaled], tuple[str, ...]]:
    """The pairs that are scaled at all, by what of `wanted` loses no bit; and the names of what that changes.

    Each pair sees the weights as those before it leave them, a block at a time. The model is left as it was.
    """
    trunk, done, changed = live.trunk, [], set()
    for block in live.anatomy.blocks:
        if live.layers is not None:
            live.layers.load(f"{live.anatomy.lead}{block}")
        with contextlib.ExitStack() as undo:
            for pair, exponents in wanted:
                if not pair.source.startswith(f"{block}."):
                    continue
                parts = sides(trunk, pair)
                exponents = without_loss(parts, exponents)
                if exponents.any():
                    changed |= {side.name for side in parts if touches(side, exponents)}
                    apply(parts, exponents)
                    undo.callback(apply, parts, -exponents)
                    done.append((pair, exponents))
    if live.layers is not None:
        live.layers.release()
    return done, tuple(sorted(changed))


def scale(trunk: nn.Module, pairs: Sequence[Scaled]) -> None:
    """Scale the weights in memory, in place."""
    for pair, exponents in pairs:
        apply(sides(trunk, pair), exponents)


@contextlib.contextmanager
def scaled_in(live: Live, pairs: Sequence[Scaled]) -> Iterator[None]:
    """Within the block, the live model with `pairs` scaled: now where it is resident, else whenever a block comes."""
    trunk = live.trunk
    if live.layers is None:
        scale(trunk, pairs)
        try:
            yield
        finally:
            scale(trunk, [(pair, -exponents) for pair, exponents in pairs])
        return
    by_module: dict[nn.Module, dict[str, list[tuple[Side, torch.Tensor]]]] = {}
    for name, scalings in _by_name(trunk, pairs).items():
        home, _, leaf = name.rpartition(".")
        by_module.setdefault(trunk.get_submodule(home), {})[leaf] = scalings

    def change(module: nn.Module) -> None:
        for leaf, scalings in by_module.get(module, {}).items():
            parameter = module.get_parameter(leaf)
            parameter.data = _scaled(scalings, parameter.data)

    with live.layers.changing(change):
        yield


def _by_name(trunk: nn.Module, pairs: Sequence[Scaled]) -> dict[str, list[tuple[Side, torch.Tensor]]]:
    """Parameter of the trunk -> how it is scaled, one after another."""
    found: dict[str, list[tuple[Side, torch.Tensor]]] = {}
    for pair, exponents in pairs:
        for side in sides(trunk, pair):
            found.setdefault(side.name, []).append((side, exponents))
    return found


def _scaled(scalings: Sequence[tuple[Side, torch.Tensor]], weight: torch.Tensor) -> torch.Tensor:
    for side, exponents in scalings:
        weight = scaled(side, exponents, weight)
    return weight


def scales(
    live: Live, pairs: Sequence[Pair], chunks: torch.Tensor, strength: float, advance: Advance = unseen
) -> list[torch.Tensor]:
    """For each pair the exponents e (width,) of its scales s = 2^e, from a pass over calibration text `chunks` (N, T).

    s_j = a_j^strength / w_j^(1 - strength), a_j the largest |activation| of channel j, w_j the largest |W[:, j]| over
    the layers that read it, divided by the geometric mean over j.
    """
    peaks = [torch.zeros(pair.width) for pair in pairs]
    columns: dict[int, torch.Tensor] = {}
    with contextlib.ExitStack() as undo:
        for index, pair in enumerate(pairs):

            def hook(_: nn.Module, args: tuple[torch.Tensor, ...], index: int = index) -> None:
                peak = args[0].reshape(-1, args[0].shape[-1]).abs().amax(dim=0)
                peaks[index] = torch.maximum(peaks[index].to(peak), peak)
                if index not in columns:  # while they are loaded
                    columns[index] = _columns(live, pairs[index])

            undo.callback(live.trunk.get_submodule(pair.readers[0]).register_forward_pre_hook(hook).remove)
        stream(live, chunks, [], advance=advance, what="calibration")
    largest = [columns.get(index, torch.zeros(pair.width)) for index, pair in enumerate(pairs)]
    return [rule(peak, of_each, strength) for peak, of_each in zip(peaks, largest, strict=True)]


def _columns(live: Live, pair: Pair) -> torch.Tensor:
    """The largest |W[:, j]| (width,) over the layers that read the pair."""
    readers = [as_rows(live.trunk.get_submodule(name)).detach().abs().amax(dim=0) for name in pair.readers]
    return torch.stack(readers).amax(dim=0)


def rule(peak: torch.Tensor, largest: torch.Tensor, strength: float) -> torch.Tensor:
    """SmoothQuant's scales (its equation 4) as exponents of two (m,); peak, largest (m,): of activations and weights.

    0 where a channel is never active, is never read, or overflows.
    """
    used = ((peak > 0) & (largest > 0) & peak.isfinite()).cpu()
    logarithms = strength * peak.double().log2().cpu() - (1 - strength) * largest.double().log2().cpu()
    exponents = torch.zeros(len(used), dtype=torch.long)
    if used.any():
        exponents[used] = (logarithms[used] - logarithms[used].mean()).round().clamp(-MOST, MOST).long()
    return exponents
