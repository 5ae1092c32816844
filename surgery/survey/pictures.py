"""What a reader wants to see rather than average: one sequence's activations, and the attention of a few heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..anatomy.calls import Call
from ..live.stream import Batch, Observer
from .softmax import Softmax

TOKENS = 48  # shown of the first sequence
DIMS = 64  # shown of the stream: the loudest, and others evenly spaced between them
LOUDEST = 8
HEADS = 4  # shown: from the strongest sink to the weakest


class Landscape(Observer):
    """|activation| of the first tokens of the first sequence, in the layer where the largest one stands."""

    def __init__(self) -> None:
        self.layer: int | None = None
        self.tokens: list[int] = []
        self._states: torch.Tensor | None = None  # (t, d)
        self._seen: set[int] = set()

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        if layer in self._seen:
            return
        self._seen.add(layer)
        shown = states[0, batch.lead : batch.lead + TOKENS].abs().float().cpu()
        if self._states is None or shown.max() > self._states.max():
            self.layer, self._states = layer, shown
            self.tokens = batch.tokens[0, batch.lead : batch.lead + TOKENS].tolist()

    def to_dict(self) -> dict:
        """`layer`, `tokens` (ids), `dims`, and `values` (token x dim)."""
        if self._states is None:
            raise ValueError("no text has passed, so there is nothing to show")
        width = self._states.shape[1]
        loudest = self._states.amax(dim=0).topk(min(LOUDEST, width)).indices.tolist()
        spaced = range(0, width, max(1, -(-width // (DIMS - len(loudest)))))
        dims = sorted({*loudest, *spaced})
        return {"layer": self.layer, "tokens": self.tokens, "dims": dims, "values": self._states[:, dims].tolist()}


class AttentionMaps(Observer):
    """Attention weights of the first sequence's first tokens, slots in front; of all heads, until four are chosen.

    `heads` (block, head) are those to show, so that two models can be compared, if the model has them all.
    """

    def __init__(self, heads: Sequence[tuple[int, int]] = ()) -> None:
        self._heads = tuple(heads)
        self._weights: dict[int, torch.Tensor] = {}  # block -> (Hq, t, n + t), half precision
        self._slots: dict[int, int] = {}
        self.tokens: list[int] = []

    def attention(self, block: int, call: Call, batch: Batch) -> None:
        if block in self._weights:
            return
        stop = min(batch.lead + TOKENS, call.query.shape[2])
        softmax = Softmax(call.of_row(0))
        rows = softmax.weights(torch.arange(stop))[0][0]  # (Hq, t, n + S and a sink logit)
        self._weights[block], self._slots[block] = rows[..., : softmax.n + stop].half().cpu(), softmax.n
        self.tokens = batch.tokens[0, :stop].tolist()

    def to_list(self) -> list[dict]:
        """Four heads from the strongest sink to the weakest, or those asked for: `block`, `head`, `slots`, `tokens`
        (ids), `weights`."""
        scored = sorted(
            (-_sink(weights, self._slots[block]), block, head)
            for block, heads in self._weights.items()
            for head, weights in enumerate(heads.float())
        )
        ranked = [scored[round(i * (len(scored) - 1) / (HEADS - 1))] for i in range(HEADS)] if scored else []
        chosen = list(dict.fromkeys((block, head) for _, block, head in ranked))
        if self._heads and {*self._heads} <= {(block, head) for _, block, head in scored}:
            chosen = list(self._heads)
        return [
            {
                "block": block,
                "head": head,
                "slots": self._slots[block],
                "tokens": self.tokens,
                "weights": [[round(w, 4) for w in row] for row in self._weights[block][head].float().tolist()],
            }
            for block, head in chosen
        ]


def _sink(weights: torch.Tensor, n: int) -> float:
    """The largest mean weight on one slot or on position 0."""
    return weights[:, : n + 1].mean(dim=0).max().item()
