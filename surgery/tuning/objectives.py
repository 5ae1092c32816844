"""What tuning lowers. Each objective is a mean over tokens or sequences, so that micro-batches of one size average.

Notation: B sequences or images, T tokens, d hidden size, V vocabulary. The student is the model with what is trained,
the teacher the original after the same prefix, or of an encoder as it came. Hidden states are those of `live.stream`:
layer l = 0 is the embedding output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..live.likelihood import token_losses
from ..survey.massive import MIN_MAGNITUDE, MIN_RATIO

ROWS = 32  # of logits at a time, which stay in the cache of a CPU


@dataclass
class Pass:
    """What a forward pass left: logits (B, T, V) and the residual stream (B, T, d) of each layer, where asked for.

    Of an encoder `tokens` are pixels (B, C, H, W), and there are no logits; `features` are those of CLS (B, 1, d),
    where there is one, and of the P patches (B, P, d), after the last norm.
    """

    tokens: torch.Tensor
    logits: torch.Tensor | None
    hidden: list[torch.Tensor] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)

    @property
    def predicted(self) -> torch.Tensor:
        """The logits of a language model, which objectives of text read."""
        assert self.logits is not None
        return self.logits

    @property
    def device(self) -> torch.device:
        """Where the sum of the objectives is taken."""
        return (self.features[0] if self.logits is None else self.logits).device


def kl(student: Pass, teacher: Pass) -> torch.Tensor:
    """Mean over tokens of KL(teacher || student), in nats (Hinton et al. 2015, arXiv 1503.02531, at temperature 1)."""
    ours, theirs = student.predicted.flatten(0, 1), teacher.predicted.flatten(0, 1)
    total = ours.new_zeros((), dtype=torch.promote_types(ours.dtype, torch.float32))
    for row, wanted in zip(ours.split(ROWS), theirs.split(ROWS), strict=True):
        wanted = wanted.to(total.dtype).log_softmax(-1)
        total = total + F.kl_div(row.to(total.dtype).log_softmax(-1), wanted, reduction="sum", log_target=True)
    return total / len(ours)


def language_modelling(student: Pass) -> torch.Tensor:
    """Mean NLL of tokens 1..T-1 of each sequence, in nats."""
    return token_losses(student.predicted[:, :-1].flatten(0, 1), student.tokens[:, 1:].flatten()).mean()


def hidden(student: Pass, teacher: Pass) -> torch.Tensor:
    """Mean over layers and tokens of |x - y|^2 / |y|^2, y the teacher's.

    Of text the first token, often a sink, is left out. Of an image it is CLS, and counts; tokens that only one of the
    two has are registers, which stand behind it.
    """
    first, behind, parts = 0 if student.logits is None else 1, len(student.features) - 1, []
    for ours, theirs in zip(student.hidden, teacher.hidden, strict=True):
        more = theirs.shape[1] - ours.shape[1]
        ours, theirs = _less(ours, behind, -more), _less(theirs, behind, more)
        ours, theirs = _wide(ours[:, first:]), _wide(theirs[:, first:])
        parts.append(((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean())
    return _together(parts).mean()


def _less(states: torch.Tensor, at: int, count: int) -> torch.Tensor:
    """states (B, T, d) without `count` tokens, where that is above 0, from token `at` on."""
    return states if count <= 0 else torch.cat([states[:, :at], states[:, at + count :]], dim=1)


def features(student: Pass, teacher: Pass) -> torch.Tensor:
    """Mean over images of 1 - cosine to the teacher's features, half of it that of CLS, where there is one, and half
    the mean over patches."""
    pairs = zip(student.features, teacher.features, strict=True)
    far = [1 - F.cosine_similarity(_wide(ours), _wide(theirs), dim=-1).mean() for ours, theirs in pairs]
    return torch.stack(far).mean()


def massive(student: Pass) -> torch.Tensor:
    """How far the largest |x| of each layer and sequence is beyond Sun's criterion: a mean of log ratios.

    Zero exactly where there is no massive activation (arXiv 2402.17762, section 2).
    """
    peaks, medians = _peaks(student.hidden)
    return (peaks / (MIN_RATIO * medians).clamp(min=MIN_MAGNITUDE)).clamp(min=1.0).log().mean()


def peak_ratio(student: Pass) -> torch.Tensor:
    """Mean over layers and sequences of log(largest |x| / median |x|)."""
    peaks, medians = _peaks(student.hidden)
    return (peaks / medians.clamp(min=torch.finfo(peaks.dtype).tiny)).log().mean()


def _peaks(layers: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest and median |x|, (layers, B) each; gradients go through the largest alone."""
    magnitudes = [_wide(states).abs().flatten(1) for states in layers]
    medians = [magnitude.detach().median(dim=1).values for magnitude in magnitudes]
    return _together([magnitude.amax(dim=1) for magnitude in magnitudes]), _together(medians)


def _together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stacked on the device of the first: layers may be spread over several."""
    return torch.stack([part.to(parts[0].device) for part in parts])


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


# Name in a recipe -> objective, and what it reads: the teacher, the residual stream.
OBJECTIVES: dict[str, tuple[Callable[..., torch.Tensor], bool, bool]] = {
    "kl": (kl, True, False),
    "lm": (language_modelling, False, False),
    "features": (features, True, False),
    "hidden": (hidden, True, True),
    "massive": (massive, False, True),
    "peak_ratio": (peak_ratio, False, True),
}


@dataclass(frozen=True)
class Objective:
    """A weighted sum of objectives; `weights` by name, those at 0 left out."""

    weights: dict[str, float]

    @property
    def needs_teacher(self) -> bool:
        return any(OBJECTIVES[name][1] for name in self.weights)

    @property
    def needs_hidden(self) -> bool:
        return any(OBJECTIVES[name][2] for name in self.weights)

    def __call__(self, student: Pass, teacher: Pass | None) -> tuple[torch.Tensor, dict[str, float]]:
        """The sum, and each objective's own value."""
        parts = {}
        for name in self.weights:
            compute, with_teacher, _ = OBJECTIVES[name]
            value = compute(student, teacher) if with_teacher else compute(student)
            parts[name] = value.to(student.device)
        total = functools.reduce(torch.add, (self.weights[name] * part for name, part in parts.items()))
        return total, {name: part.detach().item() for name, part in parts.items()}
