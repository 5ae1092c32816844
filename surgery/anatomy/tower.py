"""The tower of an encoder, run on the meta device."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel, brief
from .calls import Call
from .patching import TOKENS, Handed
from .structure import SEAM, Rule, on_meta

OFF_THE_SEAM = "its attention does not go through transformers' AttentionInterface, where it could be seen"


# What towers want beside patches that are cut already; and what decides which patches they drop, in which order.
PLACES, NOISE = ("pixel_attention_mask", "spatial_shapes"), "noise"
DROPS = "mask_ratio"  # how many of them, as configs call it


def given_to(
    input_: str, given: torch.Tensor, handed: Handed = "whole", patch: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What a tower is called with: what is `given` by the name of its input.

    "packed", of pixels (N, C, H, W) patches of (H, W): (N, P, H * W * C), row by row, with a mask (N, P) and the shape
    of the grid (N, 2). "ordered", with the order of its patches (N, P): that of the grid.
    """
    if handed == "whole" or patch is None:
        return {input_: given}
    (count, channels, height, width), (high, wide) = given.shape, patch
    rows, columns = height // high, width // wide
    if handed == "ordered":
        order = torch.arange(rows * columns, dtype=torch.float32, device=given.device)
        return {input_: given, NOISE: order.expand(count, -1)}
    cut = given.reshape(count, channels, rows, high, columns, wide).permute(0, 2, 4, 3, 5, 1)
    mask = torch.ones(count, rows * columns, dtype=torch.long, device=given.device)
    shapes = torch.tensor([[rows, columns]] * count, device="cpu")  # which is looked at, also without weights
    return {input_: cut.reshape(count, rows * columns, -1), **dict(zip(PLACES, (mask, shapes), strict=True))}


def handed_to(tower: PreTrainedModel) -> Handed:
    """What the tower is called with, by what it takes."""
    takes = {*inspect.signature(tower.forward).parameters}
    if {*PLACES} <= takes:
        return "packed"
    return "ordered" if NOISE in takes and hasattr(tower.config, DROPS) else "whole"


def dropping_none(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config, of an encoder that learnt with patches dropped at random, so that it sees all of them."""
    if getattr(config, DROPS, None):
        setattr(config, DROPS, 0.0)
    return config


def calls_of(
    tower: PreTrainedModel, shape: tuple[int, ...], handed: Handed = "whole", patch: tuple[int, int] | None = None,
    rules: list[Rule] | None = None,
) -> list[Call]:  # fmt: skip
    """The attention calls of the tower, given one input of this shape; with `rules`, given an attention mask too, and
    what the tower then makes its masks by goes into them."""
    kind = tower.config.model_type
    calls: list[Call] = []
    try:
        with on_meta(tower, calls, rules):
            kind_of = torch.long if tower.main_input_name == TOKENS else torch.float32
            given = torch.zeros(1, *shape, device="meta", dtype=kind_of)
            masked = {} if rules is None else {"attention_mask": torch.ones(1, *shape, device="meta", dtype=kind_of)}
            tower(**given_to(tower.main_input_name, given, handed, patch), **masked)
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
