"""Smooth channels with large activations into the weights that read them, exactly; quantisation is what gains.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) with scales rounded to powers of two: the model stays the same function
to the bit, and a static scale for all channels of an input no longer serves the few large ones alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..anatomy.sites import Anatomy
from ..errors import UnsupportedModel
from ..live.stream import stream
from .pairs import Pair, apply, find, random_text, sides, touches, without_loss

KINDS = ("down", "norm")
STRENGTH = 0.8  # how much of what is large in activations goes over to the weights
MOST = 10  # scales are within 2^-10 .. 2^10


def smooth(
    model: PreTrainedModel,
    anatomy: Anatomy,
    chunks: torch.Tensor,
    kinds: Sequence[str] = KINDS,
    strength: float = STRENGTH,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, torch.Tensor]:
    """Scale the model's channels in place by `scales` of calibration text `chunks` (N, T).

    Returns the changed parameters by their names in the causal LM. UnsupportedModel where nothing can be scaled, where
    nothing has to be, or where the logits on random tokens are not the same bits as before; then nothing has changed.
    """
    trunk, text = model.get_submodule(anatomy.trunk), random_text(model)
    pairs = [pair for pair in find(model, anatomy) if pair.kind in kinds]
    if not pairs:
        raise UnsupportedModel(
            f"{anatomy.model_type}: no channel can be scaled exactly (no {' or '.join(kinds)} input of linear layers "
            "whose source is theirs alone), so smoothing would change nothing; leave it out."
        )
    before, done = _logits(model, text), []
    for pair, exponents in zip(pairs, scales(model, anatomy, pairs, chunks, strength, progress), strict=True):
        parts = sides(trunk, pair)
        exponents = without_loss(parts, exponents)  # of weights that earlier pairs may have scaled the other way
        if exponents.any():
            apply(parts, exponents)
            done.append((parts, exponents))
    if not done:
        raise UnsupportedModel(
            f"{anatomy.model_type}: every channel that can be scaled is about as large as the others on the "
            "calibration text, so smoothing would change nothing; leave it out."
        )
    if not torch.equal(_logits(model, text), before):
        for parts, exponents in reversed(done):
            apply(parts, -exponents)
        raise UnsupportedModel(
            f"{anatomy.model_type}: scaled channels changed the logits, so something reads them beside the layers that "
            "were found; leave smoothing out."
        )
    lead = f"{anatomy.trunk}." if anatomy.trunk else ""
    return {f"{lead}{side.name}": side.tensor.detach() for parts, e in done for side in parts if touches(side, e)}


@torch.no_grad()
def _logits(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    return model(input_ids=text, use_cache=False).logits


def scales(
    model: PreTrainedModel,
    anatomy: Anatomy,
    pairs: Sequence[Pair],
    chunks: torch.Tensor,
    strength: float = STRENGTH,
    progress: Callable[[int], None] = lambda done: None,
) -> list[torch.Tensor]:
    """For each pair the exponents e (width,) of its scales s = 2^e, from a pass over calibration text `chunks` (N, T).

    s_j = a_j^strength / w_j^(1 - strength), a_j the largest |activation| of channel j, w_j the largest |W[:, j]| over
    the layers that read it, divided by the geometric mean over j.
    """
    trunk = model.get_submodule(anatomy.trunk)
    peaks = [torch.zeros(pair.width) for pair in pairs]
    with contextlib.ExitStack() as undo:
        for index, pair in enumerate(pairs):

            def hook(_, args, index=index):
                peak = args[0].reshape(-1, args[0].shape[-1]).abs().amax(dim=0)
                peaks[index] = torch.maximum(peaks[index].to(peak), peak)

            undo.callback(trunk.get_submodule(pair.readers[0]).register_forward_pre_hook(hook).remove)
        stream(model, anatomy, chunks, [], progress=progress)
    found = []
    for pair, peak in zip(pairs, peaks, strict=True):
        columns = [_columns(trunk.get_submodule(name)).detach().abs().amax(dim=0) for name in pair.readers]
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


def _columns(module: nn.Module) -> torch.Tensor:
    """The weight as (out, in)."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight
