"""The tower of an encoder, run on the meta device."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel, brief
from .calls import Call
from .structure import SEAM, on_meta

OFF_THE_SEAM = "its attention does not go through transformers' AttentionInterface, where it could be seen"


def calls_of(tower: PreTrainedModel, shape: tuple[int, ...]) -> list[Call]:
    """The attention calls of the tower, given one input of this shape."""
    kind = tower.config.model_type
    calls: list[Call] = []
    try:
        with on_meta(tower, calls):
            tower(**{tower.main_input_name: torch.zeros(1, *shape, device="meta")})
    except Exception as error:  # whatever model code raises here, the answer is the same: we cannot read it
        if SEAM in str(error):
            raise UnsupportedModel(f"{kind}: {OFF_THE_SEAM}") from error
        raise UnsupportedModel(f"{kind}: its structure could not be read without weights ({brief(error)})") from error
    if not calls:
        raise UnsupportedModel(f"{kind}: {OFF_THE_SEAM}")
    return calls


def pair(config: PreTrainedConfig, key: str) -> tuple[int, int] | None:
    found = getattr(config, key, None)
    if isinstance(found, int):
        return found, found
    if isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(side, int) for side in found):
        return found[0], found[1]
    return None
