"""Perplexity by depth: what the stream after each block would predict, through the final norm and the output layer.

The logit lens (nostalgebraist 2020), on a few positions of each sequence: a layer costs a few rows of logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..anatomy.sites import Anatomy
from .likelihood import perplexity
from .stream import Batch, Observer

POSITIONS = 8  # per sequence, evenly spaced
AGREES = 1e-3  # nats: how far the lens of the last layer may be from the model's own prediction


class LogitLens(Observer):
    """Mean NLL of the next token by layer. Without rows where the last layer's lens is not the model's own prediction.

    That is so where logits are scaled or capped after the output layer; the lens of other layers would mislead then.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self._head = model.get_output_embeddings()
        self._norm = final_norm(model, anatomy)
        self._nll: dict[int, list[float]] = {}
        self._own: list[float] = []

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        if self._norm is None or self._head is None:
            return
        place = _places(batch)
        predicted = self._head(self._norm(states[:, place]))
        self._nll.setdefault(layer, []).extend(_losses(predicted, batch, place))

    def logits(self, logits: torch.Tensor, batch: Batch) -> None:
        place = _places(batch)
        self._own.extend(_losses(logits[:, place], batch, place))

    def rows(self) -> dict[int, dict]:
        """Layer -> `lens_ppl`."""
        mean = {layer: sum(losses) / len(losses) for layer, losses in self._nll.items() if losses}
        if not mean or abs(mean[max(mean)] - sum(self._own) / len(self._own)) > AGREES:
            return {}
        return {layer: {"lens_ppl": perplexity(nll)} for layer, nll in mean.items()}


def final_norm(model: PreTrainedModel, anatomy: Anatomy) -> nn.Module | None:
    """The norm between the last block and the output layer: the one that stands behind the blocks in the trunk."""
    trunk = model.get_submodule(anatomy.trunk)
    stacks = {name.split(".")[0] for name in anatomy.blocks}
    children = list(trunk.named_children())
    after = [i for i, (name, _) in enumerate(children) if name in stacks]
    norms = [child for _, child in children[max(after) + 1 :] if "norm" in type(child).__name__.lower()]
    return norms[0] if len(norms) == 1 else None


def _places(batch: Batch) -> torch.Tensor:
    """Positions in the row whose next token is scored."""
    return torch.linspace(batch.lead, batch.tokens.shape[1] - 2, POSITIONS).long().unique()


def _losses(logits: torch.Tensor, batch: Batch, place: torch.Tensor) -> list[float]:
    targets = batch.tokens[:, place + 1].to(logits.device)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").tolist()
