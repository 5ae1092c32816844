"""Interventions: change a few scalars or attention weights of a live model, and see what depends on them.

Each is a context manager that yields `Touched` and undoes itself; what the model computes while it is open is changed.
One that has touched nothing at its end raises TouchedNothing. Those on MLP units are in `neurons`. Layers, dims and
units come from a survey of the same model on the same text; `run_interventions` takes them from there.

Notation: B sequences, T tokens, d hidden size. Layer l is the stream after block l - 1, 0 the embedding output; tokens
are counted from the first that is fed, so feed no prefix.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..anatomy.probe import Call
from ..anatomy.seam import on_the_seam
from ..anatomy.sites import Anatomy
from ..verification.perplexity import paired
from .attention import SINK_SCORE, AttentionStatistics, attention_rows
from .likelihood import Likelihood, Score
from .massive import MassiveActivations, massive
from .neurons import MassiveMeans, Touched, TouchedNothing, edit_stream, intervention, silence_units, zero_mlp_write
from .spectrum import Spectrum
from .stream import Batch, Observer, down_projections, stream

Change = contextlib.AbstractContextManager[Touched]
Dims = Mapping[int, Sequence[int]]  # layer -> dims in which the survey found massive activations
AMPLIFIED = 10.0  # factor on the token that is to become a sink
COLLAPSE = 10.0  # the audit asks what multiplies perplexity by this
ROWS = 128  # of attention that are written out: the last of each sequence


# ---- scalars of the residual stream


def set_massive(model: PreTrainedModel, anatomy: Anatomy, dims: Dims, means: MassiveMeans | None = None) -> Change:
    """Massive activations (Sun's criterion, in `dims` of each layer) to zero or to their means: Sun et al., section 3.

    A massive activation that `means` has not seen the like of stays as it is.
    """

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        places = _massive_places(states, dims[layer])
        if means is None:
            return places, 0.0
        flat, d = states.flatten(), states.shape[1]
        return places, flat.new_tensor([means.of(layer, *divmod(p, d), flat[p].item()) for p in places.tolist()])

    return edit_stream(model, anatomy, dims, pick, f"massive activations to {'zero' if means is None else 'means'}")


def zero_random(model: PreTrainedModel, anatomy: Anatomy, dims: Dims, seed: int = 0) -> Change:
    """The control: of each sequence and layer as many scalars as are massive, any others, to zero."""
    source = torch.Generator().manual_seed(seed)

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, float]:
        order, places = torch.rand(states.numel(), generator=source), _massive_places(states, dims[layer])
        order[places] = -1.0
        return order.topk(len(places)).indices.to(states.device), 0.0

    return edit_stream(model, anatomy, dims, pick, "random activations to zero")


def zero_median(model: PreTrainedModel, anatomy: Anatomy, dims: Dims) -> Change:
    """The other control: as many scalars, those whose size is nearest to the median, to zero."""

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, float]:
        magnitude, places = states.abs().flatten(), _massive_places(states, dims[layer])
        return (magnitude - magnitude.median()).abs().topk(len(places), largest=False).indices, 0.0

    return edit_stream(model, anatomy, dims, pick, "median-sized activations to zero")


def zero_largest(model: PreTrainedModel, anatomy: Anatomy, layer: int, scalars: int) -> Change:
    """The `scalars` largest entries of each sequence at `layer`, massive or not, to zero."""

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, float]:
        return states.abs().flatten().topk(min(scalars, states.numel())).indices, 0.0

    return edit_stream(model, anatomy, [layer], pick, f"the {scalars} largest activations of layer {layer} to zero")


def amplify(
    model: PreTrainedModel, anatomy: Anatomy, position: int, layer: int = 0, factor: float = AMPLIFIED
) -> Change:
    """Multiply the token at `position` by `factor` at `layer`, its variance by the square of it (arXiv 2605.06611).

    At the embedding output, what attention then writes to the token is small against its own part, as in a first token.
    """

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = states[position : position + 1] * factor
        return position * states.shape[1] + torch.arange(chosen.numel(), device=states.device), chosen.flatten()

    return edit_stream(model, anatomy, [layer], pick, f"token {position} amplified at layer {layer}")


def _massive_places(states: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Flat places of the massive activations of states (T, d) in `dims`."""
    hits = massive(states.float())[0]
    wanted = torch.zeros(states.shape[1], dtype=torch.bool, device=states.device)
    wanted[list(dims)] = True
    return (hits & wanted).flatten().nonzero().flatten()


# ---- attention


def mask_first(model: PreTrainedModel, anatomy: Anatomy) -> Change:
    """Hide token 0 from every later one. Token 1 then sees only itself, as token 0 did: the sink may move there."""
    return _hidden(model, anatomy, slice(1, None), slice(0, 1), "attention to position 0 masked")


def isolate(model: PreTrainedModel, anatomy: Anatomy, position: int) -> Change:
    """Hide every earlier token from the one at `position`, as they are from a first token (arXiv 2605.06611)."""
    return _hidden(model, anatomy, slice(position, position + 1), slice(0, position), f"token {position} isolated")


@contextlib.contextmanager
def _hidden(model, anatomy: Anatomy, queries: slice, keys: slice, what: str) -> Iterator[Touched]:
    """Masks that transformers makes hide `keys` from `queries`, both positions of the text; slots stay visible."""
    trunk = model.get_submodule(anatomy.trunk)
    mapping = ALL_MASK_ATTENTION_FUNCTIONS._local_mapping  # in front of the functions that are registered
    with intervention(what) as (touched, undo):
        undo.enter_context(on_the_seam(model, anatomy))
        n = (getattr(trunk.config, "eab", None) or {}).get("n_slots", 0)
        keys = slice(n + keys.start, n + keys.stop)

        def masking(ask: Callable) -> Callable:
            def mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, device="cpu", **kwargs):
                found = ask(batch_size, q_length, kv_length, q_offset=q_offset, device=device, **kwargs)
                if found is None:  # plain causal, left to the kernel
                    found = torch.ones(q_length, n + kv_length, dtype=torch.bool, device=device)
                    found = found.tril(n + kv_length - q_length)[None, None]
                found, low = found.clone(), 0 if found.dtype == torch.bool else torch.finfo(found.dtype).min
                rows = [i for i in range(q_length) if i + int(q_offset) in range(kv_length)[queries]]
                touched.count += int((found[:, :, rows, keys] > low).sum()) * batch_size // len(found)
                found[:, :, rows, keys] = low
                return found

            return mask

        undo.callback(mapping.update, dict(mapping))
        undo.callback(mapping.clear)
        for name in {config._attn_implementation for config in (model.config, trunk.config)}:
            mapping[name] = masking(ALL_MASK_ATTENTION_FUNCTIONS[name])
        yield touched


class SinkAt(Observer):
    """Share of heads, of all layers, that give the token at `position` at least 0.3 of attention: of its last rows."""

    def __init__(self, position: int) -> None:
        self.position = position
        self._heads: dict[torch.nn.Module, torch.Tensor | float] = {}  # (Hq,), summed over sequences
        self._sequences: Counter[torch.nn.Module] = Counter()

    def attention(self, block: int, call: Call, batch: Batch) -> None:
        place, stop = batch.lead + self.position, call.query.shape[2]
        rows = attention_rows(call, max(place + 1, stop - ROWS), stop)  # (B, Hq, at most ROWS, n + S)
        given = rows[..., rows.shape[-1] - call.key.shape[2] + place].double().mean(dim=2).sum(dim=0).cpu()
        self._heads[call.module] = self._heads.get(call.module, 0.0) + given
        self._sequences[call.module] += len(call.query)

    def rate(self) -> float:
        scores = torch.cat([total / self._sequences[site] for site, total in self._heads.items()])
        return (scores >= SINK_SCORE).double().mean().item()


# ---- what depends on them


@dataclass(frozen=True)
class Planned:
    """One row of the table: `apply` puts the intervention in place, `sink` is where a sink may come up instead."""

    name: str
    where: str
    apply: Callable[[], Change]
    sink: int | None = None


def plan_interventions(
    model: PreTrainedModel, anatomy: Anatomy, length: int, survey: dict, means: MassiveMeans, seed: int = 0
) -> list[Planned]:
    """What `survey` gives reason for, on texts of `length` tokens; if nothing is massive, only what moves sinks."""
    on, planned = (model, anatomy), []
    dims = {row["layer"]: sorted({entry["dim"] for entry in row["massive"]}) for row in survey["layers"]}
    dims = {layer: found for layer, found in dims.items() if found}
    born = survey["across"]["born"]
    if born is not None and dims:
        lives = {f"layer {born}": {born: dims[born]}} | ({"every layer with them": dims} if len(dims) > 1 else {})
        for where, some in lives.items():
            planned += [
                Planned("massive activations to zero", where, lambda d=some: set_massive(*on, d)),
                Planned("massive activations to their mean", where, lambda d=some: set_massive(*on, d, means)),
                Planned("as many random activations to zero", where, lambda d=some: zero_random(*on, d, seed)),
                Planned("as many median-sized activations to zero", where, lambda d=some: zero_median(*on, d)),
            ]
        for layer in sorted({born, born + 1} & {block + 1 for block in down_projections(*on)}):
            where = f"layer {layer}" + ("" if layer == born else ", as a control")
            planned.append(Planned("MLP's write to token 0 removed", where, lambda at=layer: zero_mlp_write(*on, at)))
    units: dict[int, dict[int, None]] = {}  # an ordered set of each layer
    for entry in survey["super_neurons"]:
        units.setdefault(entry["layer"], {})[entry["unit"]] = None
    if units:
        where = "; ".join(f"layer {layer}, units {', '.join(map(str, found))}" for layer, found in units.items())
        planned.append(Planned("super neurons silenced", where, lambda: silence_units(*on, units)))
    if length > 2:
        planned.append(Planned("attention to token 0 masked", "all layers", lambda: mask_first(*on), sink=1))
    if (chosen := length // 4) > 1:
        planned.append(Planned(f"token {chosen} isolated", "all layers", lambda: isolate(*on, chosen), sink=chosen))
        planned.append(Planned(f"token {chosen} amplified", "layer 0", lambda: amplify(*on, chosen), sink=chosen))
    return planned


def run_interventions(
    model: PreTrainedModel,
    anatomy: Anatomy,
    chunks: torch.Tensor,
    survey: dict,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict]:
    """Each intervention that `survey` gives reason for, on `chunks` (N, T), against the untouched model, the first row.

    Rows: `name`, `where`, `touched` (scalars, or places in masks), `ppl`, `delta_nll` per token (paired by chunk),
    `sink_rate` and `entropy_bits` (means over layers), `massive`. Where a sink may come up elsewhere also `planted`:
    `position`, its `sink_rate` and the `untouched` one. An intervention that finds no hold on this model has `error`
    and None for the rest. `progress` is told how many sequences are done, of N for each row.
    """
    means = MassiveMeans()
    planned = plan_interventions(model, anatomy, chunks.shape[1], survey, means, seed)
    sinks = {plan.sink: SinkAt(plan.sink) for plan in planned if plan.sink is not None}
    untouched, found = _measure(model, anatomy, chunks, progress, [means, *sinks.values()])
    rows = [_row("untouched", "", 0, untouched, untouched, found)]
    for plan in planned:
        there = [SinkAt(plan.sink)] if plan.sink is not None else []
        try:
            with plan.apply() as touched:
                score, found = _measure(model, anatomy, chunks, progress, there)
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


def _measure(model, anatomy, chunks, progress, also: Sequence[Observer]) -> tuple[Score, dict]:
    likelihood, found, attention, spectrum = Likelihood(), MassiveActivations(), AttentionStatistics(), Spectrum()
    stream(model, anatomy, chunks, [likelihood, found, attention, spectrum, *also], progress=progress)
    rates = [row["sink_rate"] for row in attention.rows().values()]
    bits = [row["entropy_bits"] for row in spectrum.rows().values()]
    return likelihood.score, {"sink_rate": fmean(rates), "entropy_bits": fmean(bits), "massive": found.count}


def audit(model: PreTrainedModel, anatomy: Anatomy, chunks: torch.Tensor, survey: dict, *, most: int = 1024) -> dict:
    """The attack surface: how few scalars of the stream, set to zero in every sequence, multiply perplexity by ten.

    Greedy: the k largest entries of the layer where the largest stands highest over the median. k is doubled, then
    bisected, so it is the smallest if more removed scalars always do more harm. `scalars` is None if `most` do not
    suffice; `of` is how many there are, `tried` maps each k to the perplexity.
    """
    layer = max(survey["layers"], key=lambda row: row["ratio"])["layer"]
    tried: dict[int, float] = {}

    def ppl(scalars: int) -> float:
        likelihood = Likelihood()
        with zero_largest(model, anatomy, layer, scalars) if scalars else contextlib.nullcontext():
            stream(model, anatomy, chunks, [likelihood])
        tried[scalars] = likelihood.score.ppl
        return tried[scalars]

    limit, enough = COLLAPSE * ppl(0), 1
    while ppl(enough) < limit and enough < most:
        enough = min(2 * enough, most)
    few, found = enough // 2, tried[enough] >= limit
    while found and enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if ppl(middle) >= limit else (middle, enough)
    size = chunks.shape[1] * model.config.get_text_config().hidden_size
    return {"layer": layer, "scalars": enough if found else None, "of": size, "tried": dict(sorted(tried.items()))}
