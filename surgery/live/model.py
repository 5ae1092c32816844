"""A model in memory together with what is known of its structure: the two travel as one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel

from ..anatomy.sites import ADDED, Anatomy
from .layerwise import Layerwise
from .port import TEXT, Port


@dataclass(frozen=True)
class Live:
    """A model with weights, the anatomy of its type, and what it reads: a causal language model reads text."""

    model: PreTrainedModel
    anatomy: Anatomy
    port: Port = TEXT

    @property
    def trunk(self) -> PreTrainedModel:
        """The innermost model that contains all sites."""
        return cast(PreTrainedModel, self.model.get_submodule(self.anatomy.trunk))

    @property
    def layers(self) -> Layerwise | None:
        """What brings its weights, where they are not all in memory."""
        return getattr(self.model, "layerwise", None)

    @property
    def device(self) -> torch.device:
        """Where token ids go: to the embedding, or to the CPU where that is offloaded and accelerate moves them on."""
        if self.layers is not None:
            return self.layers.device
        first = self.model.get_input_embeddings() if self.port.predicts else self.model
        device = next(first.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def parameters(self) -> int:
        """How many numbers it computes with: those of the original, packed or not, and what was added."""
        added = (p.numel() for name, p in self.model.named_parameters() if {*name.split(".")} & {*ADDED})
        return self.anatomy.blank.num_parameters() + sum(added)

    @contextlib.contextmanager
    def apart(self) -> Iterator[Live]:
        """Within the block, the same weights under slots and settings of their own, for one of several jobs that are
        done `together`. A resident model is itself: its jobs follow each other."""
        if self.layers is None:
            yield self
            return
        with self.layers.twin() as model:
            yield Live(model, self.anatomy, self.port)
