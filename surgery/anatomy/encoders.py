"""The structure of an encoder of images, found as that of a language model is: by running it on the meta device.

A checkpoint may hold more (a text tower, a classifier, a language model): the *tower* is the outermost model inside
that is called with pixels alone.
"""

from __future__ import annotations

import collections
import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel, brief
from .calls import Call
from .classes import ANY, of_auto
from .sites import Anatomy, blocks_of, read_as_config, sites_of
from .structure import SEAM, on_meta

REGISTERS = ("num_register_tokens", "num_registers")  # as families call how many of them there are
OFF_THE_SEAM = "its attention does not go through transformers' AttentionInterface, where it could be seen"


@dataclass(frozen=True)
class Encoder:
    """An encoder: its anatomy, whose names are those within the `tower`, which is named in the whole model.

    `size` (H, W) and `channels` of the images it was made for, `patch` (H, W) of each; of the tokens that an image
    becomes, the first `special` are no patches, and of these `registers` are, by its config.
    """

    anatomy: Anatomy
    tower: str
    size: tuple[int, int]
    channels: int
    patch: tuple[int, int]
    special: int
    registers: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """How many patches an image of this size has, rows and columns."""
        return height // self.patch[0], width // self.patch[1]


def parse_encoder(config: dict) -> tuple[PreTrainedConfig, Any]:
    """The transformers config of a raw config.json, and the class that AutoModel loads for it."""
    parsed = read_as_config(config)
    kind = of_auto(ANY, type(parsed))
    if kind is None:
        raise UnsupportedModel(f"config.json: model_type {parsed.model_type!r} is no model that {ANY} loads")
    return parsed, kind


def examine_encoder(config: dict) -> Encoder:
    """What `config` (a raw config.json) describes, without weights.

    UnsupportedModel where no part of it reads pixels alone, where that does not attend through transformers'
    AttentionInterface, or where its tokens are not a grid of patches.
    """
    parsed, kind = parse_encoder(config)
    try:
        with on_meta():
            model = kind._from_config(copy.deepcopy(parsed), dtype=torch.float32).eval()
    except Exception as error:  # of any class: model code trusts its config
        raise UnsupportedModel(f"{parsed.model_type}: no model can be built of its config ({brief(error)})") from error
    refused = UnsupportedModel(
        f"{parsed.model_type}: no part of it reads images alone; give --text to survey a language model"
    )
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and part.main_input_name == "pixel_values":
            try:
                return _examined(parsed, kind, name, part)
            except UnsupportedModel as error:  # another inside of it may do
                refused = error
    raise refused


def _examined(parsed: PreTrainedConfig, kind: Any, name: str, tower: PreTrainedModel) -> Encoder:
    size, patch = _pair(tower.config, "image_size"), _pair(tower.config, "patch_size")
    if size is None or patch is None:
        raise UnsupportedModel(
            f"{parsed.model_type}: its config has no image_size and patch_size, so no grid of patches"
        )
    channels = getattr(tower.config, "num_channels", 3)
    calls = _calls(tower, torch.zeros(1, channels, *size, device="meta"))
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    special = min((call.query.shape[2] for call in calls), default=0) - rows * columns
    if special < 0 or any(call.query.shape[2] != special + rows * columns for call in calls):
        raise UnsupportedModel(
            f"{parsed.model_type}: an image of {size[0]} x {size[1]} is not {rows} x {columns} tokens in all of its "
            "layers, so what stands where is not known"
        )
    if any(call.causal and call.mask is None for call in calls):
        raise UnsupportedModel(f"{parsed.model_type}: its tokens see only those before them, as a language model's do")
    registers = next((found for key in REGISTERS if (found := getattr(tower.config, key, None))), 0)
    registers = min(registers, max(special - 1, 0))
    return Encoder(_anatomy(parsed, kind, tower, calls), name, size, channels, patch, special, registers)


def _pair(config: PreTrainedConfig, key: str) -> tuple[int, int] | None:
    found = getattr(config, key, None)
    if isinstance(found, int):
        return found, found
    if isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(side, int) for side in found):
        return found[0], found[1]
    return None


def _calls(tower: PreTrainedModel, pixels: torch.Tensor) -> list[Call]:
    kind = tower.config.model_type
    calls: list[Call] = []
    try:
        with on_meta(tower, calls):
            tower(pixel_values=pixels)
    except Exception as error:  # whatever model code raises here, the answer is the same: we cannot read it
        if SEAM in str(error):
            raise UnsupportedModel(f"{kind}: {OFF_THE_SEAM}") from error
        raise UnsupportedModel(f"{kind}: its structure could not be read without weights ({brief(error)})") from error
    if not calls:
        raise UnsupportedModel(f"{kind}: {OFF_THE_SEAM}")
    return calls


def _anatomy(config: PreTrainedConfig, kind: Any, tower: PreTrainedModel, calls: list[Call]) -> Anatomy:
    names = {module: name for name, module in tower.named_modules()}
    for module, count in collections.Counter(call.module for call in calls).items():
        if count != 1:
            raise UnsupportedModel(f"{config.model_type}: {names[module]} attends {count} times in one forward pass")
    blocks, block_of = blocks_of(config.model_type, tower, [names[call.module] for call in calls], [])
    sites = sites_of(calls, names, block_of)
    return Anatomy(
        model_type=config.model_type, model_class=kind, config_class=type(config), trunk="",
        trunk_class=type(tower).__name__, blocks=blocks, sites=sites, mixers=(), indexers=(), max_positions=None,
        max_length=None, vocab_size=None, config=tower.config, blank=tower,
    )  # fmt: skip
