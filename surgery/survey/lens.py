"""Perplexity by depth: what the stream after each block would predict, through the final norm and the output layer.

The logit lens (nostalgebraist 2020), on a few positions of each sequence: a layer costs as many rows of logits.
"""

from __future__ import annotations

import math

import torch

from ..live.likelihood import token_losses
from ..live.model import Live
from ..live.places import final_norm
from ..live.stream import Batch, Observer
from ..words import factor
from .attention import spaced

POSITIONS = 16  # per sequence, evenly spaced
OWN = -1  # a layer of its own: what the model itself predicts
AGREES = 1e-3  # nats: how far the lens of the last layer may be from the model's own prediction


class LogitLens(Observer):
    """Mean NLL of the next token by layer. Without rows where the last layer's lens is not the model's own prediction.

    That is so where logits are scaled or capped after the output layer; the lens of other layers would mislead then.
    """

    def __init__(self, live: Live, positions: int = POSITIONS) -> None:
        self._positions = positions
        self._head = live.model.get_output_embeddings()
        self._norm = final_norm(live)
        self._ready: dict[Batch, dict[int, torch.Tensor]] = {}  # by layer, what goes into the output layer (B, P, d)
        self._nll: dict[int, float] = {}  # layer -> sum over what was scored
        self._scored = 0

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        if self._norm is None or self._head is None:
            return
        if states.shape[-1] == self._head.weight.shape[-1]:  # else several streams, which something joins first
            self._ready.setdefault(batch, {})[layer] = self._norm(states[:, self._places(batch)])

    def logits(self, logits: torch.Tensor, batch: Batch) -> None:
        place, ready = self._places(batch), self._ready.pop(batch, {})
        targets = batch.tokens[:, place + 1].flatten()
        self._add(OWN, token_losses(logits[:, place].flatten(0, 1), targets))
        self._scored += len(targets)
        # As many layers at a time as the text has rows: each product reads the whole output layer.
        together = max(1, batch.tokens.shape[1] // len(place))
        layers = sorted(ready)
        for start in range(0, len(layers), together):
            some = layers[start : start + together]
            rows = torch.cat([ready[layer].flatten(0, 1).to(logits.device) for layer in some])
            losses = token_losses(self._head(rows), targets.repeat(len(some)))
            for layer, part in zip(some, losses.split(len(targets)), strict=True):
                self._add(layer, part)

    def _places(self, batch: Batch) -> torch.Tensor:
        """Positions in the row whose next token is scored, others in each batch."""
        return spaced(range(batch.lead, batch.tokens.shape[1] - 1), self._positions, batch.index)

    def rows(self) -> dict[int, dict]:
        """Layer -> `lens_ppl`."""
        mean = {layer: total / self._scored for layer, total in self._nll.items()}
        own, last = mean.pop(OWN, math.nan), mean.get(max(mean, default=0), math.nan)
        if not abs(last - own) <= AGREES:
            return {}
        return {layer: {"lens_ppl": factor(nll)} for layer, nll in mean.items()}

    def _add(self, layer: int, losses: torch.Tensor) -> None:
        self._nll[layer] = self._nll.get(layer, 0.0) + losses.double().sum().item()
