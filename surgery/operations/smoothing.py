"""Smooth channels with large activations into the weights that read them, exactly; quantisation is what gains.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) with scales rounded to powers of two: the model stays the same function
to the bit, and a static scale for all channels of an input no longer serves the few large ones alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..anatomy.sites import Anatomy
from ..errors import UnsupportedModel
from ..survey.stream import stream
from ..verification.quantised import rounded, rounded_weight
from .smoothing_pairs import Pair, apply, find, random_text, sides, touches, without_loss

KINDS = ("down", "norm")
STRENGTHS = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 1.0)  # what the search tries beside leaving a pair alone
MOST = 10  # scales are within 2^-10 .. 2^10
BITS = 8  # of the integers that the search simulates
ROWS = 256  # tokens of calibration text, about, on which it does


@dataclass
class _Seen:
    """What the readers of one pair read: the largest |activation| by channel (m,), and some rows (R, m)."""

    peak: torch.Tensor
    rows: list[torch.Tensor] = field(default_factory=list)


def smooth(
    model: PreTrainedModel,
    anatomy: Anatomy,
    chunks: torch.Tensor,
    kinds: Sequence[str] = KINDS,
    strength: float | None = None,
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
            f"{anatomy.model_type}: every channel that can be scaled is best left as it is on the calibration text, so "
            "smoothing would change nothing; leave it out."
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
    strength: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[torch.Tensor]:
    """For each pair the exponents e (width,) of its scales s = 2^e, from a pass over calibration text `chunks` (N, T).

    s_j = a_j^strength / w_j^(1 - strength), a_j the largest |activation| of channel j, w_j the largest |W[:, j]| over
    the layers that read it, divided by the geometric mean over j. Without a strength, each pair gets the one with which
    its readers, as integers with static scales, come closest to their own output on some rows of the text (as AWQ does,
    Lin et al. 2023, arXiv 2306.00978); 1 throughout where none of them does better.
    """
    trunk = model.get_submodule(anatomy.trunk)
    seen = _observed(model, anatomy, pairs, chunks, progress)
    return [_exponents(trunk, pair, part, strength) for pair, part in zip(pairs, seen, strict=True)]


def _observed(model: PreTrainedModel, anatomy: Anatomy, pairs: Sequence[Pair], chunks: torch.Tensor, progress):
    trunk, step = model.get_submodule(anatomy.trunk), max(1, chunks.numel() // ROWS)
    seen: list[_Seen] = []
    with contextlib.ExitStack() as undo:
        for pair in pairs:
            seen.append(_Seen(torch.zeros(pair.width)))

            def hook(_, args, one=seen[-1]):
                rows = args[0].reshape(-1, args[0].shape[-1])
                one.peak = torch.maximum(one.peak.to(rows), rows.abs().amax(dim=0))
                one.rows.append(rows[::step].clone())

            undo.callback(trunk.get_submodule(pair.readers[0]).register_forward_pre_hook(hook).remove)
        stream(model, anatomy, chunks, [], progress=progress)
    return seen


@torch.inference_mode()
def _exponents(trunk: nn.Module, pair: Pair, seen: _Seen, strength: float | None) -> torch.Tensor:
    weights = [_columns(trunk.get_submodule(name)) for name in pair.readers]
    largest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    if strength is not None:
        return rule(seen.peak, largest, strength)
    rows, none = torch.cat(seen.rows), torch.zeros(pair.width, dtype=torch.long)
    candidates = (none, *(rule(seen.peak, largest, value) for value in STRENGTHS))
    return min(candidates, key=lambda exponents: _error(rows, seen.peak, weights, exponents))


def rule(peak: torch.Tensor, largest: torch.Tensor, strength: float) -> torch.Tensor:
    """SmoothQuant's scales (its equation 4) as exponents of two (m,), 0 where a channel is never active or never read.

    peak, largest (m,): of activations and of weights.
    """
    used = ((peak > 0) & (largest > 0)).cpu()
    logarithms = strength * peak.double().log2().cpu() - (1 - strength) * largest.double().log2().cpu()
    exponents = torch.zeros(len(used), dtype=torch.long)
    if used.any():
        exponents[used] = (logarithms[used] - logarithms[used].mean()).round().clamp(-MOST, MOST).long()
    return exponents


def _error(rows: torch.Tensor, peak: torch.Tensor, weights: Sequence[torch.Tensor], exponents: torch.Tensor) -> float:
    """Sum over readers of |y' - y|^2 / |y|^2, mean of rows (R, m): y' in integers, one static scale for activations."""
    factor = torch.exp2(exponents.double()).to(rows)
    scale = (peak / factor).amax() / (2 ** (BITS - 1) - 1)
    activations, error = rounded(rows / factor, scale, BITS), 0.0
    for weight in weights:
        exact = rows @ weight.T
        off = activations @ rounded_weight(weight * factor, BITS).T - exact
        missed, length = off.double().square().sum(dim=1), exact.double().square().sum(dim=1)
        error += (missed / length.clamp(min=1e-300)).mean().item()
    return error


def _columns(module: nn.Module) -> torch.Tensor:
    """The weight as (out, in)."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight
