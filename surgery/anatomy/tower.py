"""The tower of an encoder, run on the meta device."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel, brief
from .calls import Call
from .structure import SEAM, on_meta

OFF_THE_SEAM = "its attention does not go through transformers' AttentionInterface, where it could be seen"


PLACES = ("pixel_attention_mask", "spatial_shapes")  # what towers want beside patches that are cut already


def given_to(input_: str, given: torch.Tensor, packed: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """What a tower is called with: what is `given` by the name of its input. Of pixels (N, C, H, W) that it wants
    `packed`, patches of (H, W): (N, P, H * W * C), row by row, with a mask (N, P) and the shape of the grid (N, 2)."""
    if packed is None:
        return {input_: given}
    (count, channels, height, width), (high, wide) = given.shape, packed
    rows, columns = height // high, width // wide
    cut = given.reshape(count, channels, rows, high, columns, wide).permute(0, 2, 4, 3, 5, 1)
    mask = torch.ones(count, rows * columns, dtype=torch.long, device=given.device)
    shapes = torch.tensor([[rows, columns]] * count, device="cpu")  # which is looked at, also without weights
    return {input_: cut.reshape(count, rows * columns, -1), **dict(zip(PLACES, (mask, shapes), strict=True))}


def wants_packed(tower: PreTrainedModel) -> bool:
    return {*PLACES} <= {*inspect.signature(tower.forward).parameters}


def calls_of(
    tower: PreTrainedModel, shape: tuple[int, ...], packed: tuple[int, int] | None = None
) -> list[Call]:  # fmt: skip
    """The attention calls of the tower, given one input of this shape."""
    kind = tower.config.model_type
    calls: list[Call] = []
    try:
        with on_meta(tower, calls):
            tower(**given_to(tower.main_input_name, torch.zeros(1, *shape, device="meta"), packed))
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
