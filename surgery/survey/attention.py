"""What each head does with its attention: sinks (Xiao et al., arXiv 2309.17453), entropy, spread of outputs, selection.

Block b belongs to layer b + 1, which it writes. A prefix in front of the text (`Batch.lead`) is looked at as what a
fold makes of it: its tokens are slots, and position 0 is the first token of the text. So a model after a prefix and
the same model with that prefix folded give the same figures.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from ..anatomy.calls import Call
from ..live.stream import Batch, Observer
from .softmax import Rows, Softmax

SINK_SCORE = 0.3  # a head with at least this score counts into the layer's sink rate
HELD = 0.9  # of a row's weight is held by the places that count as selected
ROWS = 64  # of a sequence that entropy is taken of
SELECTION_ROWS = 4  # of a sequence that selection is looked at in: their weights are written out and sorted
EXACT = "donot_use_mm_for_euclid_dist"  # equal values, such as those of repeated tokens, stand equally far
GOLDEN = (5**0.5 - 1) / 2


def spaced(rows: range, count: int, turn: int = 0) -> torch.Tensor:
    """`count` of `rows`, evenly spaced, or all of them; each `turn` starts elsewhere within the first space.

    Turns by the golden ratio cover the space evenly, so that over many sequences every row has the same chance.
    """
    if len(rows) <= count:
        return torch.tensor(rows, dtype=torch.long)
    start = (0.5 + turn * GOLDEN) % 1
    return torch.tensor([rows[int((i + start) * len(rows) / count)] for i in range(count)])


class HeadMeans:
    """Means over sequences of quantities by head, for each site of each block (some blocks hold two)."""

    def __init__(self) -> None:
        self.sums: dict[int, dict[nn.Module, dict[str, torch.Tensor]]] = defaultdict(dict)  # float64
        self.counts: dict[tuple[nn.Module, str], int] = defaultdict(int)

    def add(self, block: int, site: nn.Module, **quantities: torch.Tensor) -> None:
        """Each quantity (B, Hq, ...), one entry per sequence."""
        sums = self.sums[block].setdefault(site, {})
        for name, values in quantities.items():
            sums[name] = sums.get(name, 0) + values.detach().double().sum(dim=0).cpu()
            self.counts[site, name] += values.shape[0]

    def rows(self) -> Iterable[tuple[int, dict[str, torch.Tensor]]]:
        """Layer, and name -> means (heads of all sites, ...)."""
        for block, sites in sorted(self.sums.items()):
            names = dict.fromkeys(name for sums in sites.values() for name in sums)
            yield (
                block + 1,
                {
                    name: torch.cat([sums[name] / self.counts[site, name] for site, sums in sites.items()])
                    for name in names
                },
            )


class AttentionStatistics(Observer):
    """Where attention goes and how wide it spreads, by head; means over the rows of a text, then over sequences.

    * `sink_score`: weight of position 0, by head; `slot_score`: of each slot, by head and slot.
    * `sink_rate`: share of heads that give at least 0.3 to one of these places.
    * `attention_entropy`: entropy of a row, in nats, by head; `effective_tokens`: exp of it, as if so many places
      shared the weight equally.
    * `mixing`: entropy of a row / log of the number of places it sees, mean over heads and rows that see more than one;
      1 is uniform attention. None where no row does.
    * `learned_sink_score`: weight of a learned sink logit (GPT-OSS), by head; only where sites have one. It is a place
      of the row in entropy and mixing, and counts in no sink rate: no token is attended to.

    Scores are means over all rows. The others, which cost what attention costs, are of `rows` rows of each text in each
    `every`-th batch, evenly spaced and starting elsewhere each time, wherever the model's own pass tells enough for the
    scores.
    """

    def __init__(self, rows: int = ROWS, every: int = 1) -> None:
        self.samples, self.every = rows, every
        self.means = HeadMeans()
        self.turns: Counter[nn.Module] = Counter()

    def attended(self, block: int, call: Call, output: torch.Tensor, batch: Batch) -> None:
        softmax = Softmax(call)
        text, turn = softmax.text(batch.lead), self.turns[call.module]
        self.turns[call.module] += 1
        sinks = softmax.sinks(torch.tensor(text), batch.lead)
        if sinks is None:
            rows = softmax.rows(torch.tensor(text), batch.lead)
            sinks = rows.sinks
        elif turn % self.every == 0:
            rows = softmax.rows(spaced(text, self.samples, turn // self.every), batch.lead)
        else:
            rows = None
        given = {"first": sinks.first, "slots": sinks.slots, "learned": sinks.learned}
        found = {name: row.mean(dim=2, dtype=torch.float64) for name, row in given.items() if row is not None}
        self.means.add(block, call.module, **found)
        if rows is not None:
            self._spread(block, call.module, rows)

    def _spread(self, block: int, site: nn.Module, rows: Rows) -> None:
        self.means.add(block, site, entropy=rows.entropy.mean(dim=2, dtype=torch.float64))
        spread = (rows.places > 1).expand_as(rows.entropy)
        if bool(spread.any()):
            shares = rows.entropy.double() / rows.places.clamp(min=2).double().log()
            mixing = torch.where(spread, shares, 0.0).sum(dim=2) / spread.sum(dim=2).clamp(min=1)
            self.means.add(block, site, mixing=mixing)

    def rows(self) -> dict[int, dict]:
        """Layer -> the keys above."""
        found = {}
        for layer, means in self.means.rows():
            scores = torch.cat([means["first"].unsqueeze(-1), means["slots"]], dim=-1)
            found[layer] = {
                "sink_score": means["first"].tolist(),
                "slot_score": means["slots"].tolist(),
                "sink_rate": (scores.amax(dim=1) >= SINK_SCORE).double().mean().item(),
                "mixing": means["mixing"].mean().item() if "mixing" in means else None,
                "attention_entropy": means["entropy"].tolist(),
                "effective_tokens": means["entropy"].exp().tolist(),
                **({"learned_sink_score": means["learned"].tolist()} if "learned" in means else {}),
            }
        return found


class ValueVariance(Observer):
    """Variance over channels of each head's output, as it goes into the output projection: after a head norm.

    * `value_variance_first`: at the first token of the text, by head. That token attends to itself and to slots alone,
      so its output is one value vector where others are means of many.
    * `value_variance_rest`: mean over all later tokens, by head; None in a text of one token.
    """

    def __init__(self) -> None:
        self.means = HeadMeans()

    def attended(self, block: int, call: Call, output: torch.Tensor, batch: Batch) -> None:
        text = output[:, batch.lead :]  # (B, R, Hq, E)
        text = text.to(torch.promote_types(text.dtype, torch.float32))
        # Two passes by hand: torch.var takes six times as long on a CPU.
        variance = (text - text.mean(dim=-1, keepdim=True)).square().mean(dim=-1)
        self.means.add(block, call.module, first=variance[:, 0])
        if variance.shape[1] > 1:
            self.means.add(block, call.module, rest=variance[:, 1:].mean(dim=1, dtype=torch.float64))

    def rows(self) -> dict[int, dict]:
        """Layer -> the keys above."""
        return {
            layer: {
                "value_variance_first": means["first"].tolist(),
                "value_variance_rest": means["rest"].tolist() if "rest" in means else None,
            }
            for layer, means in self.means.rows()
        }


class Selection(Observer):
    """Which places a row selects: how many, how far apart from the others, how sensitive its weights are; by head.

    After Mudarisov et al. (arXiv 2508.17821), where the N largest weights of a row are selected and N is free. Here it
    is what the row asks for, the least N that holds 90% of its weight. For a row with weights p over the L places that
    it sees (slots, keys, a learned sink logit, whose value is zero), values v and output o = sum p v:

    * `attended_share`: N / L.
    * `separability`: share of the selected whose value lies nearer to o than that of any place not selected; rows that
      select all they see are left out, and a head without any other row has None.
    * `selection_distance`: the paper's |sum of p v over the selected - sum of p v over the others|, divided by the sum
      of p |v|, which bounds it (triangle inequality). 1: the others add nothing, or the opposite.
    * `gradient_sensitivity`: largest p (1 - p) / T of a row, the derivative of a weight by its own product q.k, where
      T = 1 / scale is the temperature; `gradient_bound`: 1 / (4 T), which it cannot exceed (p (1 - p) <= 1/4).
    * `attended_by_length`: `length` (L) and `tokens` (N, mean over heads, sites and sequences) of the sampled rows.

    Means over `rows` rows of a sequence, evenly spaced and starting elsewhere each time, then over the sequences of
    each `every`-th batch.
    """

    def __init__(self, rows: int = SELECTION_ROWS, every: int = 1) -> None:
        self.samples, self.every = rows, every
        self.means = HeadMeans()
        self.turns: Counter[nn.Module] = Counter()
        self.bounds: dict[int, float] = {}
        self.lengths: dict[int, Counter[int]] = defaultdict(Counter)  # block -> L -> sum of N
        self.seen: dict[int, Counter[int]] = defaultdict(Counter)  # block -> L -> how many rows of a head

    def attended(self, block: int, call: Call, output: torch.Tensor, batch: Batch) -> None:
        turn = self.turns[call.module]
        self.turns[call.module] += 1
        if turn % self.every:
            return
        softmax = Softmax(call)
        queries = spaced(softmax.text(batch.lead), self.samples, turn // self.every)
        weights, places = softmax.weights(queries)
        selected = _largest(weights, HELD)
        places = places.expand_as(weights)
        counted, length = selected.sum(dim=-1), places.sum(dim=-1)  # (B, Hq, R)
        values = softmax.values()
        self.bounds[block] = max(self.bounds.get(block, 0.0), softmax.scale / 4)
        self.means.add(
            block,
            call.module,
            share=(counted / length).mean(dim=2),
            distance=_distance(weights, selected, values).mean(dim=2),
            sensitivity=(weights * (1 - weights)).amax(dim=-1).mean(dim=2) * softmax.scale,
        )
        summed = output if call.summed is None else call.summed
        apart, some = _separable(summed[:, queries].transpose(1, 2).to(values), values, selected, places)
        usable = some.sum(dim=2)  # (B, Hq)
        apart = (apart * some).sum(dim=2) / usable.clamp(min=1)
        self.means.add(block, call.module, separability=apart, usable=(usable > 0))
        for row_length, row_counted in zip(length.flatten().tolist(), counted.flatten().tolist(), strict=True):
            self.lengths[block][row_length] += row_counted
            self.seen[block][row_length] += 1

    def rows(self) -> dict[int, dict]:
        """Layer -> the keys above."""
        found = {}
        for layer, means in self.means.rows():
            lengths = sorted(self.lengths[layer - 1])
            separability = zip(means["separability"].tolist(), means["usable"].tolist(), strict=True)
            found[layer] = {
                "attended_share": means["share"].tolist(),
                "separability": [share / usable if usable else None for share, usable in separability],
                "selection_distance": means["distance"].tolist(),
                "gradient_sensitivity": means["sensitivity"].tolist(),
                "gradient_bound": self.bounds[layer - 1],
                "attended_by_length": {
                    "length": lengths,
                    "tokens": [self.lengths[layer - 1][n] / self.seen[layer - 1][n] for n in lengths],
                },
            }
        return found


def _largest(weights: torch.Tensor, held: float) -> torch.Tensor:
    """bool (..., P): the fewest of the largest weights (..., P) that sum to at least `held`."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # what larger ones hold already
    return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, order, before < held)


def _distance(weights: torch.Tensor, selected: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(B, Hq, R): |sum of p v over selected - over others| / sum of p |v|; 0 where every value is zero.

    weights and selected (B, Hq, R, P), values (B, H, P, E).
    """
    signed = _by_key_head(torch.where(selected, weights, -weights), values) @ values
    bound = (_by_key_head(weights, values) @ values.norm(dim=-1, keepdim=True)).squeeze(-1)
    distance = signed.norm(dim=-1) / bound.clamp(min=torch.finfo(bound.dtype).tiny)
    return distance.view(weights.shape[:3])


def _separable(
    output: torch.Tensor, values: torch.Tensor, selected: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, Hq, R): share of the selected nearer to output (B, Hq, R, E) than all others; whether there are others."""
    distances = torch.cdist(_by_key_head(output, values), values, compute_mode=EXACT)
    distances, others = distances.view(selected.shape), places & ~selected  # (B, Hq, R, P)
    radius = distances.masked_fill(~others, torch.inf).amin(dim=-1, keepdim=True)
    nearer = (selected & (distances < radius)).sum(dim=-1) / selected.sum(dim=-1)
    return nearer, others.any(dim=-1)


def _by_key_head(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """rows (B, Hq, R, ...) -> (B, H, G R, ...), as the heads that share a key head share its values."""
    return rows.unflatten(1, (values.shape[1], -1)).flatten(2, 3)
