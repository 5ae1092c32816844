"""Massive activations: a few scalars of the residual stream thousands of times the rest (Sun et al. 2024)."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field

import numpy as np
import torch

from ..live.stream import Batch, Observer
from .thresholds import MIN_MAGNITUDE, MIN_RATIO

LISTED = 32  # the largest ones of each layer that are listed one by one; all are counted


def massive(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """states (T, d) of one sequence -> places (K, 2) where Sun's criterion holds, and the median of |states|.

    A place is a position and a dim. The median is over all entries of the sequence.
    """
    magnitude = states.abs()
    middle = median(magnitude)
    return at_least(magnitude, magnitude.amax(dim=1), (MIN_RATIO * middle).clamp(min=MIN_MAGNITUDE)), middle


def median(values: torch.Tensor) -> torch.Tensor:
    """The median of all entries, a scalar; of an even count, the lower of the middle two."""
    if values.device.type != "cpu":
        return values.flatten().median()
    # numpy selects in a tenth of the time that torch takes for it on a CPU.
    middle = (values.numel() - 1) // 2
    return values.new_tensor(np.partition(values.detach().numpy(), middle, axis=None)[middle])


def at_least(magnitude: torch.Tensor, peaks: torch.Tensor, least: torch.Tensor | float) -> torch.Tensor:
    """Places (K, 2), position and dim, of the entries of magnitude (T, d) that are at least `least`, row by row.

    peaks (T,) are the largest entries of the rows; few reach `least`, and a search through all entries would cost more.
    """
    rows = (peaks >= least).nonzero().flatten()
    if not len(rows):
        return rows.new_empty(0, 2)
    hits = (magnitude[rows] >= least).nonzero()
    return torch.stack([rows[hits[:, 0]], hits[:, 1]], dim=1)


@dataclass
class LayerTally:
    """Running statistics of one layer over the sequences seen."""

    sequences: int = 0
    count: int = 0
    max: float = 0.0  # sums over sequences until `LayerTally.mean`
    median: float = 0.0
    ratio: float = 0.0
    first_norm: float = 0.0
    rest_norm: float = 0.0
    worst: float = 0.0  # largest |x| / median among massive activations
    dims: collections.Counter = field(default_factory=collections.Counter)
    tokens: collections.Counter = field(default_factory=collections.Counter)
    later_tokens: collections.Counter = field(default_factory=collections.Counter)  # the same, position 0 left out
    listed: list[tuple[float, int, int, int]] = field(default_factory=list)  # value, dim, position, token id

    def mean(self, total: float) -> float:
        return total / max(self.sequences, 1)


class MassiveActivations(Observer):
    """Counts massive activations of the text (a prefix in front is left out of the count and of the median)."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerTally] = {}

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        tally = self.layers.setdefault(layer, LayerTally())
        for tokens, row in zip(batch.tokens[:, batch.lead :], states[:, batch.lead :].float(), strict=True):
            self._row(tally, tokens, row)

    def _row(self, tally: LayerTally, tokens: torch.Tensor, row: torch.Tensor) -> None:
        places, scale = massive(row)
        top, middle = max(float(end.abs()) for end in row.aminmax()), float(scale)
        norms = row.norm(dim=-1)
        tally.sequences += 1
        tally.max += top
        tally.median += middle
        tally.ratio += top / max(middle, torch.finfo(torch.float32).tiny)
        tally.first_norm += norms[0].item()
        tally.rest_norm += norms[1:].mean().item() if len(norms) > 1 else 0.0
        for position, dim in places.tolist():
            value, token = float(row[position, dim]), int(tokens[position])
            tally.count += 1
            tally.dims[dim] += 1
            tally.tokens[token] += 1
            tally.later_tokens[token] += position > 0
            tally.worst = max(tally.worst, abs(value) / max(middle, torch.finfo(torch.float32).tiny))
            tally.listed.append((value, dim, position, token))
        if len(tally.listed) > 4 * LISTED:  # bounded memory: text of any length keeps the largest few
            tally.listed = _largest(tally.listed)

    @property
    def count(self) -> int:
        return sum(tally.count for tally in self.layers.values())

    @property
    def loudest(self) -> float:
        """The largest |x| / median of a layer, mean over sequences, of the layer where it is largest."""
        return max((tally.mean(tally.ratio) for tally in self.layers.values()), default=0.0)

    def tokens(self) -> collections.Counter:
        """Token id -> how many massive activations it carried, over all layers."""
        return sum((tally.tokens for tally in self.layers.values()), collections.Counter())

    def summary(self) -> dict:
        """`massive_activations.before` / `.after` of the verdict."""
        dims = sum((tally.dims for tally in self.layers.values()), collections.Counter())
        return {
            "count": self.count,
            "worst_ratio": max((tally.worst for tally in self.layers.values()), default=0.0),
            "dims": [dim for dim, _ in dims.most_common()],
            "layers": [layer for layer, tally in sorted(self.layers.items()) if tally.count],
            "token_ids": [token for token, _ in self.tokens().most_common()],
        }

    def rows(self) -> dict[int, dict]:
        """Layer -> keys of the survey. `dims` and `tokens` (ids): of all massive activations, with how many each has;
        `massive` lists the largest.
        """
        return {
            layer: {
                "count": tally.count,
                "max": tally.mean(tally.max),
                "median": tally.mean(tally.median),
                "ratio": tally.mean(tally.ratio),
                "first_norm": tally.mean(tally.first_norm),
                "rest_norm": tally.mean(tally.rest_norm),
                "dims": [list(entry) for entry in tally.dims.most_common()],
                "tokens": [list(entry) for entry in tally.tokens.most_common()],
                "massive": [
                    {"dim": dim, "position": position, "token": token, "value": value}
                    for value, dim, position, token in _largest(tally.listed)
                ],
            }
            for layer, tally in sorted(self.layers.items())
        }


class MassiveMeans(Observer):
    """Mean massive activation by layer and dim, of the first tokens of texts and of later ones."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int, bool], tuple[float, int]] = {}

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        for row in states[:, batch.lead :]:
            for position, dim in massive(row.float())[0].tolist():
                total, count = self._sums.get((layer, dim, position == 0), (0.0, 0))
                self._sums[layer, dim, position == 0] = total + row[position, dim].item(), count + 1

    def of(self, layer: int, position: int, dim: int, otherwise: float) -> float:
        total, count = self._sums.get((layer, dim, position == 0), (otherwise, 1))
        return total / count


def _largest(listed: list[tuple]) -> list[tuple]:
    return sorted(listed, key=lambda entry: -abs(entry[0]))[:LISTED]
