"""What the layers of a survey say together: births and deaths of massive activations, phases of depth, correlations.

`across` reads the rows that the observers left, one per layer, and looks at no tensor. The scale-free criterion of
massive activations, `auto_massive`, and its observer are here too, since they find the same lives on another scale.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..live.stream import Batch, Observer
from .massive import at_least, median

AUTO_RATIO = 10.0
FIRST_TOKEN = 10.0  # a first token that long against the others dominates; with random weights it reached 2.6


def auto_massive(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """states (T, d) of one sequence -> places (K, 2) of what is massive on its own scale, and that scale.

    The scale is what an ordinary token's largest entry is: the median over tokens of max_i |x_ti|. Massive is what is
    at least `AUTO_RATIO` times that. Unlike Sun's criterion it has no absolute threshold, so a stream may be small
    (vision) or large (Gemma); and a feature that is large in most tokens (an outlier feature, not a massive activation)
    raises the scale instead of the count.

    Where ten comes from: entries of a Gaussian stream reach 1.5 scales at T = 512, d = 576, and tiny models of 16
    families with random weights 4; SmolLM2 has at most 2.3 at layers 0 and 1, where nothing is massive yet, and 48 to
    330 at the layers where Sun's criterion holds. A sequence of one token has nothing to compare with, and one whose
    ordinary token is all zeros has no scale: neither has massive activations.
    """
    magnitude = states.abs()
    peaks = magnitude.amax(dim=1)
    ordinary = median(peaks)
    return at_least(magnitude, peaks, AUTO_RATIO * ordinary if ordinary > 0 else math.inf), ordinary


class AutoMassive(Observer):
    """Counts massive activations by `auto_massive` (a prefix in front is left out)."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()  # by layer
        self.ratios: defaultdict[int, float] = defaultdict(float)  # largest entry over the scale, summed over sequences
        self.sequences: Counter[int] = Counter()

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        for row in states[:, batch.lead :].float():
            places, ordinary = auto_massive(row)
            self.counts[layer] += len(places)
            self.ratios[layer] += (
                max(abs(end.item()) for end in row.aminmax()) / ordinary.item() if ordinary > 0 else 0.0
            )
            self.sequences[layer] += 1

    def rows(self) -> dict[int, dict]:
        """Layer -> `auto_count` over all sequences, `auto_ratio` (largest entry over the scale) their mean."""
        return {
            layer: {"auto_count": self.counts[layer], "auto_ratio": self.ratios[layer] / seen}
            for layer, seen in sorted(self.sequences.items())
        }


def across(layers: Sequence[dict]) -> dict:
    """Rows of the survey by l = 0, 1, ... -> what they say together.

    `born`, `died`, `spans`, `dims`, `tokens` are about Sun's massive activations, `auto` about the scale-free ones
    (None where they were not counted); `phases` and `correlations` are None where there are none.
    """
    spans = alive([row["count"] for row in layers])
    living = [row for start, stop in spans for row in layers[start : stop + 1]]
    counted = all("auto_count" in row for row in layers)
    return {
        **_life(spans, len(layers)),
        "dims": _most_common(row["dims"] for row in living),
        "tokens": _most_common(row["tokens"] for row in living),
        "auto": _life(alive([row["auto_count"] for row in layers]), len(layers)) if counted else None,
        "phases": phases(layers),
        "correlations": correlations(layers),
    }


def _most_common(counted: Iterable[list]) -> list:
    """(what, how many) of several layers -> what, the most common first."""
    total: Counter[Any] = Counter()
    for layer in counted:
        total.update(dict(layer))
    return [what for what, _ in total.most_common()]


def _life(spans: list[tuple[int, int]], depth: int) -> dict:
    """`died` is the first layer without them, None where the last layer still has them."""
    last = spans[-1][1] if spans else depth - 1
    return {
        "born": spans[0][0] if spans else None,
        "died": last + 1 if last + 1 < depth else None,
        "spans": [list(span) for span in spans],
    }


def alive(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Massive activations by layer -> runs of layers (first, last) that have them.

    A layer has them where it counts at least a quarter of what the median layer with any does: one odd sequence out
    of many moves neither birth nor death, and neither does a layer where each spike has several dimensions.
    """
    some = [count for count in counts if count]
    if not some:
        return []
    enough = statistics.median(some) / 4
    return _runs([count > 0 and count >= enough for count in counts])


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    found = []
    for flag, group in itertools.groupby(range(len(flags)), key=lambda layer: flags[layer]):
        members = list(group)
        if flag:
            found.append((members[0], members[-1]))
    return found


def phases(layers: Sequence[dict]) -> dict | None:
    """Rows by layer -> {"mix": [a, b], "compress": [a, b], "refine": [a, b] or None}, ends inclusive, or None.

    Mix, Compress, Refine are the phases of Queipo-de-Llano et al., arXiv 2510.06477. Where they begin and end is our
    definition; n_l = norm of the first token / mean norm of the rest, both as the rows have them:

    * the first token is long in a layer where log n_l is at least half of its maximum over depth; the valley is the
      layer with the lowest entropy H of these. A layer is compressed where the first token is long and H_l at most
      halfway from the valley to the highest entropy before it;
    * Compress is the run of compressed layers around the valley, Mix all before it, Refine all after it (None where
      the last layer is still compressed);
    * claimed only if the first token dominates (some n_l >= `FIRST_TOKEN`), the valley has at most half of the
      highest entropy before it, and heads turn to the sink: the mean sink rate of blocks that read a compressed layer
      is above that of blocks that read a layer of Mix. So random weights have no phases.
    """
    if len(layers) < 3 or any(row.get("entropy_bits") is None for row in layers):
        return None
    bits = [row["entropy_bits"] for row in layers]
    lengths = [_log_ratio(row["first_norm"], row["rest_norm"]) for row in layers]
    most = max(lengths)
    long = [length >= most / 2 for length in lengths]
    valley = min((layer for layer in range(len(layers)) if long[layer]), key=bits.__getitem__, default=0)
    before = max(bits[:valley], default=0.0)
    if most < math.log(FIRST_TOKEN) or bits[valley] > before / 2:
        return None
    halfway = (bits[valley] + before) / 2
    runs = _runs([is_long and h <= halfway for is_long, h in zip(long, bits, strict=True)])
    start, stop = next((a, b) for a, b in runs if a <= valley <= b)
    if not _sinks_rise(layers, start, stop):
        return None
    refine = [stop + 1, len(layers) - 1] if stop + 1 < len(layers) else None
    return {"mix": [0, start - 1], "compress": [start, stop], "refine": refine}


def _log_ratio(first: float, rest: float) -> float:
    tiny = torch.finfo(torch.float32).tiny  # a norm may be 0
    return math.log(max(first, tiny) / max(rest, tiny))


def _sinks_rise(layers: Sequence[dict], start: int, stop: int) -> bool:
    """Whether blocks that read layers start..stop have a higher sink rate than those before; False if none are.

    The row of layer l + 1 holds the block that reads layer l.
    """
    rates = [row.get("sink_rate") for row in layers[1:]]
    mixing = [rate for rate in rates[:start] if rate is not None]
    compressed = [rate for rate in rates[start : stop + 1] if rate is not None]
    return bool(mixing and compressed) and statistics.fmean(compressed) > statistics.fmean(mixing)


def correlations(layers: Sequence[dict]) -> dict | None:
    """Pearson correlations over depth of changes from layer to layer, after arXiv 2510.06477; None where there is none.

    The change of the first token's norm from l - 1 to l goes with the change of entropy at the same layer, and with
    the change of sink rate from the block that reads layer l - 1 to the block that reads layer l.
    """
    norms = [row["first_norm"] for row in layers]
    found = {
        "first_norm_entropy": _of_changes(norms, [row.get("entropy_bits") for row in layers]),
        "first_norm_sink_rate": _of_changes(norms[:-1], [row.get("sink_rate") for row in layers[1:]]),
    }
    return None if all(value is None for value in found.values()) else found


def _of_changes(a: Sequence[float | None], b: Sequence[float | None]) -> float | None:
    """Pearson correlation of the differences of neighbours; None for under three of them, or one that never changes."""
    both = list(zip(a, b, strict=True))
    pairs = [
        (x - x_before, y - y_before)
        for (x_before, y_before), (x, y) in itertools.pairwise(both)
        if x is not None and x_before is not None and y is not None and y_before is not None
    ]
    if len(pairs) < 3 or any(max(side) == min(side) for side in zip(*pairs, strict=True)):
        return None
    return statistics.correlation(*zip(*pairs, strict=True))
