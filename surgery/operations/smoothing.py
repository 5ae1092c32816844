"""Smooth channels with large activations into the weights that read them, exactly; quantisation is what gains.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) with scales rounded to powers of two: the model stays the same function
to the bit, and a static scale for all channels of an input no longer serves the few large ones alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
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
from ..live.stream import stream
from ..progress import Advance, unseen
from ..recipe.fields import AsTuple
from .base import Changes, Exact, Fitting, Operation, Stand, Target
from .pairs import Pair, apply, find, random_text, sides, touches, without_loss

MOST = 10  # scales are within 2^-10 .. 2^10


@dataclass(frozen=True)
class Smoothed:
    """Pairs in the order of scaling, each with its exponents of two (width,), and how many tensors that changes."""

    pairs: tuple[tuple[Pair, torch.Tensor], ...]
    tensors: int


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
        require_in_memory(live.model, "smoothing")

    def fit(self, live: Live, text: Fitting) -> Smoothed:
        text.reporter.step("smooth channels with large activations")
        with text.reporter.bar("smoothing", len(text.chunks)) as advance:
            parts = smooth(live, text.chunks, self.inputs, self.strength, advance)
        changed = self.tensors(live, parts)
        for name in changed:
            stored_name(text.target.layout, live.anatomy, name)  # refused before the long work
        text.reporter.note(f"{len(changed)} tensors changed by powers of two, and no logit")
        return parts

    def graft(self, live: Live, parts: Smoothed) -> contextlib.AbstractContextManager[object]:
        for pair, exponents in parts.pairs:
            apply(sides(live.trunk, pair), exponents)
        return contextlib.nullcontext()

    def tensors(self, live: Live, parts: Smoothed) -> Mapping[str, torch.Tensor]:
        return {
            f"{live.anatomy.lead}{side.name}": side.tensor.detach()
            for pair, exponents in parts.pairs
            for side in sides(live.trunk, pair)
            if touches(side, exponents)
        }

    def says(self, parts: Smoothed, target: Target, recipe: Stand) -> Section:
        return Section(
            text=f"Smoothing has scaled {parts.tensors:,} tensors by powers of two, the same function: what was large "
            "in activations is in the weights that read them."
        )


def smooth(
    live: Live, chunks: torch.Tensor, kinds: Sequence[str], strength: float, advance: Advance = unseen
) -> Smoothed:
    """Pairs of the live model, and the exponents by which they are scaled on calibration text `chunks` (N, T).

    The model is left as it was. UnsupportedModel where nothing can be scaled, where nothing has to be, or where the
    logits on random tokens are not the same bits when it is.
    """
    kind, trunk, text = live.anatomy.model_type, live.trunk, random_text(live)
    pairs = [pair for pair in find(live) if pair.kind in kinds]
    if not pairs:
        raise UnsupportedModel(
            f"{kind}: no channel can be scaled exactly (no {' or '.join(kinds)} input of linear layers "
            "whose source is theirs alone), so smoothing would change nothing; leave it out."
        )
    before, done = _logits(live, text), []
    wanted = scales(live, pairs, chunks, strength, advance)
    with contextlib.ExitStack() as undo:
        for pair, exponents in zip(pairs, wanted, strict=True):
            parts = sides(trunk, pair)
            exponents = without_loss(parts, exponents)  # of weights that earlier pairs may have scaled the other way
            if exponents.any():
                apply(parts, exponents)
                undo.callback(apply, parts, -exponents)
                done.append((pair, exponents))
        same = torch.equal(_logits(live, text), before)
    if not done:
        raise UnsupportedModel(
            f"{kind}: every channel that can be scaled is about as large as the others on the "
            "calibration text, so smoothing would change nothing; leave it out."
        )
    if not same:
        raise UnsupportedModel(
            f"{kind}: scaled channels changed the logits, so something reads them beside the layers that "
            "were found; leave smoothing out."
        )
    changed = {side.name for pair, exponents in done for side in sides(trunk, pair) if touches(side, exponents)}
    return Smoothed(tuple(done), len(changed))


@torch.no_grad()
def _logits(live: Live, text: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = live.model(input_ids=text, use_cache=False).logits
    return logits


def scales(
    live: Live, pairs: Sequence[Pair], chunks: torch.Tensor, strength: float, advance: Advance = unseen
) -> list[torch.Tensor]:
    """For each pair the exponents e (width,) of its scales s = 2^e, from a pass over calibration text `chunks` (N, T).

    s_j = a_j^strength / w_j^(1 - strength), a_j the largest |activation| of channel j, w_j the largest |W[:, j]| over
    the layers that read it, divided by the geometric mean over j.
    """
    peaks = [torch.zeros(pair.width) for pair in pairs]
    with contextlib.ExitStack() as undo:
        for index, pair in enumerate(pairs):

            def hook(_: nn.Module, args: tuple[torch.Tensor, ...], index: int = index) -> None:
                peak = args[0].reshape(-1, args[0].shape[-1]).abs().amax(dim=0)
                peaks[index] = torch.maximum(peaks[index].to(peak), peak)

            undo.callback(live.trunk.get_submodule(pair.readers[0]).register_forward_pre_hook(hook).remove)
        stream(live, chunks, [], advance=advance, what="calibration")
    found = []
    for pair, peak in zip(pairs, peaks, strict=True):
        columns = [as_rows(live.trunk.get_submodule(name)).detach().abs().amax(dim=0) for name in pair.readers]
        found.append(rule(peak, torch.stack(columns).amax(dim=0), strength))
    return found


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
