"""The shape of the residual stream: how much of it lies along one direction, and the size of its largest entries.

Notation: X (T, d) the states of one layer on one sequence, not centred, s_1 >= s_2 >= ... its singular values,
p_j = s_j^2 / ||X||_F^2. p_1 is the anisotropy, H = -sum_j p_j log2 p_j the matrix-based entropy. The bounds are those
of Queipo-de-Llano et al., arXiv 2510.06477: one long first row alone forces p_1 up and H down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..errors import DamagedCheckpoint
from ..live.stream import Batch, Observer

TOP = 3
_SPECTRAL = ("p1", "entropy_bits", "entropy_normalised", "p1_bound", "entropy_bound")


def shares(states: torch.Tensor) -> torch.Tensor:
    """states (T, d), finite and not all zero -> p (min(T, d),), float64, descending, sums to 1.

    Eigenvalues of the smaller of X X^T and X^T X. Squaring is harmless here because nothing small is asked for: in
    float64 each p_j is off by a few 1e-16 whatever s_1^2 / s_r^2 is, so a direction lost below that would have added
    less than 1e-13 bits. (Against singular values of the same X the entropy differs by 2e-14 bits on SmolLM2; with a
    float32 Gram matrix by 7e-6.) What cannot be told from rounding is set to 0, so `count_nonzero` is the rank.
    """
    states = _scaled(states)
    gram = states @ states.T if states.shape[0] <= states.shape[1] else states.T @ states
    energies = torch.linalg.eigvalsh(gram).flip(0)
    rounding = torch.finfo(energies.dtype).eps * len(energies) * energies[0]
    energies = torch.where(energies > rounding, energies, 0)
    return energies / energies.sum()


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Shares p (r,) that sum to 1 -> their entropy in bits, a scalar."""
    return -torch.special.xlogy(p, p).sum() / math.log(2.0)


def lower_bound(states: torch.Tensor) -> torch.Tensor:
    """states (T, d), not all zero -> (c + a) / (c + 1) <= p_1, a scalar of float64.

    c = M / R, a = (1 / R) sum_{i>0} ||x_i||^2 cos^2(x_i, x_0), M = ||x_0||^2, R = sum_{i>0} ||x_i||^2. Multiplied out,
    (M + aR) / (M + R) is the share of ||X||_F^2 along x_0, and needs no R > 0. It is 0 where x_0 is.
    """
    states = _scaled(states)
    along = (states @ states[0])[1:].square().sum()
    own = states[0].square().sum()
    return (own + along / own.clamp_min(torch.finfo(own.dtype).tiny)) / states.square().sum()


def upper_bound(p1: torch.Tensor, rank: int) -> torch.Tensor:
    """A lower bound of p_1 and the rank r -> an upper bound of the entropy in bits, a scalar.

    -p log p - (1 - p) log(1 - p) + (1 - p) log(r - 1): the entropy where all other directions share alike. It falls
    with p only from 1 / r on, and p_1 is never below that, so a weaker `p1` counts as 1 / r.
    """
    p = p1.clamp(1 / rank, 1.0)
    others = torch.log2(p.new_tensor(max(rank - 1, 1)))
    return entropy(torch.stack([p, 1 - p])) + (1 - p) * others


@dataclass
class _Tally:
    """One layer's sums over the sequences seen, and over those whose spectrum was taken."""

    sequences: int = 0
    top: list[float] = field(default_factory=lambda: [0.0] * TOP)
    dominance: float = 0.0
    spectra: int = 0
    spectral: list[float] = field(default_factory=lambda: [0.0] * len(_SPECTRAL))


class Spectrum(Observer):
    """Anisotropy, entropy and their bounds on each `every`-th sequence; the largest entries on all of them.

    A prefix in front of the text is left out. Raises DamagedCheckpoint where the stream is not finite.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        self.every = every
        self.layers: dict[int, _Tally] = {}

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        tally = self.layers.setdefault(layer, _Tally())
        for row in states[:, batch.lead :]:
            magnitude = row.abs()
            top = _largest(magnitude)
            if not torch.isfinite(top).all():
                raise DamagedCheckpoint(
                    f"layer {layer}: the residual stream is not finite on what was read, so there is nothing to "
                    "survey; check the weights (download them again), or load the model in float32 if it is in half "
                    "precision."
                )
            first = magnitude[0].double() if row.device.type != "mps" else magnitude[0].float()
            dominance = first.max() / first.mean().clamp_min(torch.finfo(first.dtype).tiny)
            tally.top = [total + value for total, value in zip(tally.top, top.tolist(), strict=True)]
            tally.dominance += dominance.item()
            if tally.sequences % self.every == 0 and top[0] > 0:  # a stream of zeros has no directions
                tally.spectral = [a + b for a, b in zip(tally.spectral, _spectral(row), strict=True)]
                tally.spectra += 1
            tally.sequences += 1

    def rows(self) -> dict[int, dict]:
        """Layer -> keys of the survey: means over sequences, those of the spectrum over `spectra` of them."""
        found = {}
        for layer, tally in sorted(self.layers.items()):
            means = [total / tally.spectra if tally.spectra else None for total in tally.spectral]
            found[layer] = {
                **dict(zip(_SPECTRAL, means, strict=True)),
                "spectra": tally.spectra,
                "dominance": tally.dominance / tally.sequences,
                "top3": [total / tally.sequences for total in tally.top],
            }
        return found


def _spectral(row: torch.Tensor) -> list[float]:
    """The values of `_SPECTRAL` for one sequence (T, d)."""
    p = shares(row)
    rank = int(torch.count_nonzero(p))
    bits, p1_bound = entropy(p), lower_bound(row)
    most = torch.log2(p.new_tensor(float(len(p)))) if len(p) > 1 else p.new_ones(())  # one token: 0 of 0 bits is 0
    return torch.stack([p[0], bits, bits / most, p1_bound, upper_bound(p1_bound, rank)]).tolist()


def _scaled(states: torch.Tensor) -> torch.Tensor:
    """States in float64 with a largest entry of 1: no share depends on the scale, and no square over- or underflows."""
    states = (states.cpu() if states.device.type == "mps" else states).double()  # mps knows no float64
    return states / states.abs().max()


def _largest(magnitude: torch.Tensor) -> torch.Tensor:
    """magnitude (T, d) -> its `TOP` largest entries, descending, 0 where there are fewer.

    They lie in the rows with the largest maxima; a search through all entries would take seven times as long.
    """
    rows = magnitude.amax(dim=1).topk(min(TOP, len(magnitude))).indices
    entries = magnitude[rows].flatten()
    top = entries.topk(min(TOP, len(entries))).values.float()
    return torch.nn.functional.pad(top, (0, TOP - len(top)))
