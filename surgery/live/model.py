"""A model in memory together with what is known of its structure: the two travel as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel

from ..anatomy.sites import Anatomy


@dataclass(frozen=True)
class Live:
    """A causal language model with weights, and the anatomy of its type."""

    model: PreTrainedModel
    anatomy: Anatomy

    @property
    def trunk(self) -> PreTrainedModel:
        """The innermost model that contains all sites."""
        return cast(PreTrainedModel, self.model.get_submodule(self.anatomy.trunk))

    @property
    def device(self) -> torch.device:
        """Where token ids go: to the embedding, or to the CPU where that is offloaded and accelerate moves them on."""
        device = next(self.model.get_input_embeddings().parameters()).device
        return torch.device("cpu") if device.type == "meta" else device
