"""The structure of an encoder of images, found as that of a language model is: by running it on the meta device.

A checkpoint may hold more (a text tower, a classifier, a language model): the *tower* is the model inside
that is called with pixels alone; of several, one inside the other, the innermost.
"""

from __future__ import annotations

import collections
import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel, brief
from .calls import Call
from .classes import ANY, models_of, of_auto
from .patching import Patching
from .sites import Anatomy, blocks_of, read_as_config, sites_of
from .structure import SEAM, on_meta

REGISTERS = ("num_register_tokens", "num_registers")  # as families call how many of them there are
OFF_THE_SEAM = "its attention does not go through transformers' AttentionInterface, where it could be seen"


def parse_encoder(config: dict) -> tuple[PreTrainedConfig, Any]:
    """The transformers config of a raw config.json, and the class that the checkpoint is of: what `architectures` names
    where that is a class of this config, or what AutoModel loads."""
    parsed = read_as_config(config)
    kind: Any = of_auto(ANY, type(parsed))
    if kind is None:
        raise UnsupportedModel(f"config.json: model_type {parsed.model_type!r} is no model that {ANY} loads")
    named = parsed.architectures[0] if parsed.architectures else kind.__name__
    found: Any = vars(sys.modules[kind.__module__]).get(named)
    if found in models_of(type(parsed)).values():
        return parsed, found
    return parsed, kind


def examine_encoder(config: dict) -> Anatomy:
    """What `config` (a raw config.json) describes, without weights; its `patching` is there.

    UnsupportedModel where no part of it reads pixels alone, where that does not attend through transformers'
    AttentionInterface, or where its tokens are not a grid of patches.
    """
    return _examine(*parse_encoder(config))


def _examine(parsed: PreTrainedConfig, kind: Any) -> Anatomy:
    try:
        with on_meta():
            model = kind._from_config(copy.deepcopy(parsed), dtype=torch.float32).eval()
    except Exception as error:  # of any class: model code trusts its config
        raise UnsupportedModel(f"{parsed.model_type}: no model can be built of its config ({brief(error)})") from error
    refused = UnsupportedModel(
        f"{parsed.model_type}: no part of it reads images alone; give --text to survey a language model"
    )
    found: Anatomy | None = None
    for name, part in model.named_modules():
        if found is not None and not name.startswith(found.lead):
            break
        if isinstance(part, PreTrainedModel) and part.main_input_name == "pixel_values":
            try:
                found = _examined(parsed, model, name, part)  # the innermost: a classifier has its encoder inside
            except UnsupportedModel as error:  # another inside of it may do
                refused = error
    if found is None:
        raise refused
    return found


def _examined(parsed: PreTrainedConfig, model: PreTrainedModel, name: str, tower: PreTrainedModel) -> Anatomy:
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
    key = next((key for key in REGISTERS if getattr(tower.config, key, None)), None)
    registers = 0 if key is None else min(getattr(tower.config, key), max(special - 1, 0))
    patching = Patching(size, channels, patch, special, registers, key)
    return _anatomy(parsed, model, name, tower, calls, patching)


@dataclass(frozen=True)
class Emptied:
    """What leaves registers out: entries of config.json, and tensors by name within the trunk that have no rows then,
    with their shapes."""

    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def without_registers(anatomy: Anatomy) -> Emptied:
    """What becomes of the model without its registers. UnsupportedModel where its config does not lead there."""
    patching = anatomy.patching
    assert patching is not None and patching.register_key is not None
    kind, key = anatomy.model_type, patching.register_key
    config = copy.deepcopy(anatomy.config)
    places = {"": config, **{name: part for name in config.sub_configs if (part := getattr(config, name, None))}}
    where, holder = next((name, part) for name, part in places.items() if getattr(part, key, None))
    setattr(holder, key, 0)
    without = _examine(config, anatomy.model_class)
    shapes = {
        name: (tuple(before.shape), tuple(after.shape))
        for (name, before), (_, after) in zip(
            anatomy.blank.named_parameters(), without.blank.named_parameters(), strict=True
        )
    }
    left = without.patching
    tensors = {name.removeprefix(anatomy.lead): after for name, (before, after) in shapes.items() if before != after}
    if (
        left is None or left.registers or left.special != patching.special - patching.registers
        or without.sites != anatomy.sites or any(0 not in shape for shape in tensors.values()) or not tensors
    ):  # fmt: skip
        raise UnsupportedModel(f"{kind}: with {key} 0 in its config it is not the same encoder without its registers")
    return Emptied({key: 0} if not where else {where: {key: 0}}, tensors)


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


def _anatomy(
    config: PreTrainedConfig, model: PreTrainedModel, name: str, tower: PreTrainedModel, calls: list[Call],
    patching: Patching,
) -> Anatomy:  # fmt: skip
    names = {module: name for name, module in tower.named_modules()}
    for module, count in collections.Counter(call.module for call in calls).items():
        if count != 1:
            raise UnsupportedModel(f"{config.model_type}: {names[module]} attends {count} times in one forward pass")
    blocks, block_of = blocks_of(config.model_type, tower, [names[call.module] for call in calls], [])
    sites = sites_of(calls, names, block_of)
    return Anatomy(
        model_type=config.model_type, model_class=type(model), config_class=type(config), trunk=name,
        trunk_class=type(tower).__name__, blocks=blocks, sites=sites, mixers=(), indexers=(), max_positions=None,
        max_length=None, vocab_size=None, config=config, blank=model, patching=patching,
    )  # fmt: skip
