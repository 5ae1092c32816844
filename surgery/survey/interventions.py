"""Interventions: what becomes of a model when what its survey found is changed, and how little breaks it.

`run_interventions` takes layers, dims and units from a survey of the same model on the same text; how they are changed
is in `edits`.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch

from ..anatomy.calls import Call
from ..live.edits import Change, TouchedNothing
from ..live.likelihood import scored
from ..live.model import Live
from ..live.paired import paired
from ..live.places import down_projections
from ..live.score import Score
from ..live.stream import Batch, Observer
from ..progress import Advance, unseen
from .attention import SINK_SCORE, AttentionStatistics
from .edits import (
    amplify,
    isolate,
    mask_first,
    set_massive,
    silence_units,
    zero_largest,
    zero_median,
    zero_mlp_write,
    zero_random,
)
from .massive import MassiveActivations, MassiveMeans
from .softmax import Softmax
from .spectrum import Spectrum

COLLAPSE = 10.0  # the audit asks what multiplies perplexity by this
ROWS = 128  # of attention that are written out: the last of each sequence


class SinkAt(Observer):
    """Share of heads, of all layers, that give the token at `position` at least 0.3 of attention: of its last rows."""

    def __init__(self, position: int) -> None:
        self.position = position
        self._heads: dict[torch.nn.Module, torch.Tensor] = {}  # (Hq,), summed over sequences
        self._sequences: Counter[torch.nn.Module] = Counter()

    def attention(self, block: int, call: Call, batch: Batch) -> None:
        place, stop = batch.lead + self.position, call.query.shape[2]
        softmax = Softmax(call)
        rows, _ = softmax.weights(torch.arange(max(place + 1, stop - ROWS), stop))  # (B, Hq, at most ROWS, P)
        given = rows[..., softmax.n + place].double().mean(dim=2).sum(dim=0).cpu()
        self._heads[call.module] = self._heads[call.module] + given if call.module in self._heads else given
        self._sequences[call.module] += len(call.query)

    def rate(self) -> float:
        scores = torch.cat([total / self._sequences[site] for site, total in self._heads.items()])
        return (scores >= SINK_SCORE).double().mean().item()


@dataclass(frozen=True)
class Planned:
    """One row of the table: `apply` puts the intervention in place, `sink` is where a sink may come up instead."""

    name: str
    where: str
    apply: Callable[[], Change]
    sink: int | None = None


@dataclass(frozen=True)
class Interventions:
    """The rows after the untouched one; `means` is empty until the untouched model has run."""

    planned: list[Planned]
    means: MassiveMeans

    @property
    def passes(self) -> int:
        """Over the text, with the untouched one."""
        return 1 + len(self.planned)


def plan_interventions(live: Live, length: int, survey: dict, *, seed: int = 0) -> Interventions:
    """What `survey` gives reason for, on texts of `length` tokens; if nothing is massive, only what moves sinks."""
    planned, means = [], MassiveMeans()
    dims = {row["layer"]: sorted(dim for dim, _ in row["dims"]) for row in survey["layers"]}
    dims = {layer: found for layer, found in dims.items() if found}
    born = survey["across"]["born"]
    if born is not None and dims:
        lives = {f"layer {born}": {born: dims[born]}} | ({"every layer with them": dims} if len(dims) > 1 else {})
        for where, some in lives.items():
            planned += [
                Planned("massive activations to zero", where, partial(set_massive, live, some)),
                Planned("massive activations to their mean", where, partial(set_massive, live, some, means)),
                Planned("as many random activations to zero", where, partial(zero_random, live, some, seed)),
                Planned("as many median-sized activations to zero", where, partial(zero_median, live, some)),
            ]
        for layer in sorted({born, born + 1} & {block + 1 for block in down_projections(live)}):
            where = f"layer {layer}" + ("" if layer == born else ", as a control")
            planned.append(Planned("MLP's write to token 0 removed", where, partial(zero_mlp_write, live, layer)))
    units: dict[int, dict[int, None]] = {}  # an ordered set of each layer
    for entry in survey["super_neurons"]:
        units.setdefault(entry["layer"], {})[entry["unit"]] = None
    if units:
        where = "; ".join(f"layer {layer}, units {', '.join(map(str, found))}" for layer, found in units.items())
        planned.append(Planned("super neurons silenced", where, partial(silence_units, live, units)))
    if length > 2:
        planned.append(Planned("attention to token 0 masked", "all layers", partial(mask_first, live), sink=1))
    if (chosen := length // 4) > 1:
        planned.append(Planned(f"token {chosen} isolated", "all layers", partial(isolate, live, chosen), sink=chosen))
        planned.append(Planned(f"token {chosen} amplified", "layer 0", partial(amplify, live, chosen), sink=chosen))
    return Interventions(planned, means)


def run_interventions(
    live: Live,
    chunks: torch.Tensor,
    interventions: Interventions,
    advance: Advance = unseen,
) -> list[dict]:
    """Each intervention on `chunks` (N, T), against the untouched model, the first row.

    Rows: `name`, `where`, `touched` (scalars, or places in the masks of all sites), `ppl`, `delta_nll` per token
    (paired by chunk), `sink_rate` and `entropy_bits` (means over layers), `massive`. Where a sink may come up elsewhere
    also `planted`: `position`, its `sink_rate` and the `untouched` one. An intervention that finds no hold on this
    model has `error` and None for the rest. `advance` is told of sequences, N for each pass, and of what is done.
    """

    def measured(what: str, also: Sequence[Observer]) -> tuple[Score, dict]:
        return _measure(live, chunks, also, advance, what)

    sinks = {plan.sink: SinkAt(plan.sink) for plan in interventions.planned if plan.sink is not None}
    untouched, found = measured("untouched", [interventions.means, *sinks.values()])
    rows = [_row("untouched", "", 0, untouched, untouched, found)]
    for plan in interventions.planned:
        there = [SinkAt(plan.sink)] if plan.sink is not None else []
        try:
            with plan.apply() as touched:
                score, found = measured(plan.name, there)
        except TouchedNothing as error:
            rows.append({**dict.fromkeys(rows[0]), "name": plan.name, "where": plan.where, "error": str(error)})
            continue
        for sink in there:
            before = sinks[sink.position].rate()
            found["planted"] = {"position": sink.position, "sink_rate": sink.rate(), "untouched": before}
        rows.append(_row(plan.name, plan.where, touched.count, score, untouched, found))
    return rows


def _row(name: str, where: str, touched: int, score: Score, reference: Score, found: dict) -> dict:
    delta = paired(score, reference).to_dict()
    return {"name": name, "where": where, "touched": touched, "ppl": score.ppl, "delta_nll": delta, **found}


def _measure(
    live: Live, chunks: torch.Tensor, also: Sequence[Observer], advance: Advance, what: str
) -> tuple[Score, dict]:
    found, attention, spectrum = MassiveActivations(), AttentionStatistics(), Spectrum()
    score = scored(live, chunks, observers=[found, attention, spectrum, *also], advance=advance, what=what)
    rates = [row["sink_rate"] for row in attention.rows().values()]
    bits = [row["entropy_bits"] for row in spectrum.rows().values()]
    return score, {"sink_rate": fmean(rates), "entropy_bits": fmean(bits), "massive": found.count}


def audit(
    live: Live,
    chunks: torch.Tensor,
    survey: dict,
    *,
    most: int = 1024,
    advance: Advance = unseen,
) -> dict:
    """The attack surface: how few scalars of the stream, set to zero in every sequence, multiply perplexity by ten.

    Greedy: the k largest entries of the layer where the largest stands highest over the median. k is doubled, then
    bisected, so it is the smallest if more removed scalars always do more harm. `scalars` is None if `most` do not
    suffice; `of` is how many there are, `tried` maps each k to the perplexity.
    """
    layer = max(survey["layers"], key=lambda row: row["ratio"])["layer"]
    tried: dict[int, float] = {}

    def ppl(scalars: int) -> float:
        with zero_largest(live, layer, scalars) if scalars else contextlib.nullcontext():
            tried[scalars] = scored(live, chunks, advance=advance, what=f"{scalars} to zero").ppl
        return tried[scalars]

    limit, enough = COLLAPSE * ppl(0), 1
    if not math.isfinite(limit):
        enough = most  # there is nothing to multiply
    while ppl(enough) < limit and enough < most:
        enough = min(2 * enough, most)
    few, found = enough // 2, math.isfinite(limit) and tried[enough] >= limit
    while found and enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if ppl(middle) >= limit else (middle, enough)
    size = chunks.shape[1] * live.model.config.get_text_config().hidden_size
    return {"layer": layer, "scalars": enough if found else None, "of": size, "tried": dict(sorted(tried.items()))}
