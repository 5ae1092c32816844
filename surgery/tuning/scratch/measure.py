"""What becomes of a model's stream and attention while it is trained: one pass over held-out text."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...live.likelihood import Likelihood
from ...live.stream import Batch, Observer, stream
from ...survey.across import AutoMassive
from ...survey.attention import AttentionStatistics
from ...survey.massive import MassiveActivations
from .variants import Variant


class _Everywhere(Observer):
    """Shows `inner` the whole stream, a token that leads the text included: that is where its spikes may have gone."""

    def __init__(self, inner: Observer) -> None:
        self.inner = inner

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        self.inner.hidden(layer, states, Batch(batch.tokens, lead=0))


def measure(variant: Variant, chunks: torch.Tensor) -> dict:
    """Held-out `nll` and `ppl`, massive activations and sinks of `variant` on `chunks` (N, T); plain data.

    `massive`: how many by Sun's criterion, over all layers and sequences; `auto`: by the scale-free one. `ratio`:
    largest |x| over the median, mean over sequences, of the layer where it is largest. These are of every position;
    those named `_on_text` leave a leading sink token out. Means over all heads: `first_score`, weight on the first
    token of the text; `slot_score`, on all slots, a leading token among them (None without); `sink_rate`, share of
    heads with a sink. `layers` has the same by layer, as in a survey.
    """
    text, whole, auto = MassiveActivations(), MassiveActivations(), AutoMassive()
    attention, likelihood = AttentionStatistics(), Likelihood()
    observers = [text, _Everywhere(whole), _Everywhere(auto), attention, likelihood]
    stream(variant.live, chunks, observers, prefix=variant.lead)
    rows: dict[int, dict[str, Any]] = {layer: {"layer": layer} for layer in whole.layers}
    for layer, row in whole.rows().items():
        rows[layer] |= {key: row[key] for key in ("max", "median", "ratio", "count", "dims")}
    for layer, row in text.rows().items():
        rows[layer] |= {f"{key}_on_text": row[key] for key in ("max", "median", "ratio", "count")}
    for found in (auto.rows(), attention.rows()):
        for layer, row in found.items():
            rows[layer] |= row
    attending = [row for row in rows.values() if "sink_rate" in row]
    slots = [sum(scores) for row in attending for scores in row["slot_score"] if scores]
    return {
        "nll": likelihood.score.nll,
        "ppl": likelihood.score.ppl,
        "massive": whole.count,
        "massive_on_text": text.count,
        "auto": sum(auto.counts.values()),
        "ratio": whole.loudest,
        "ratio_on_text": text.loudest,
        "first_score": _mean([score for row in attending for score in row["sink_score"]]),
        "slot_score": _mean(slots) if slots else None,
        "sink_rate": _mean([row["sink_rate"] for row in attending]),
        "layers": list(rows.values()),
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
