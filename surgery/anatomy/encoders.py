"""The structure of an encoder of images, of sound or of text, found as that of a language model is: by running it on
the meta device.

A checkpoint may hold more (a text tower, a classifier, a language model, a decoder): the *tower* is the model inside
that is called with pixels, with sound, or with token ids, alone; of several, one inside the other, the innermost.
"""

from __future__ import annotations

import collections
import copy
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel, brief
from .calls import Call
from .classes import ANY, models_of, of_auto
from .parsed import read_as_config
from .patching import PIXELS, SOUND, TOKENS, Patching, Reads
from .sites import Anatomy, blocks_of, refuse_config, sites_of
from .sound import frames_of
from .structure import on_meta
from .text import is_tower, places_of, texts_of
from .tower import calls_of, dropping_none, handed_to, pair

REGISTERS = ("num_register_tokens", "num_registers")  # as families call how many of them there are

NOTHING = "no part of it reads"
_NONE = {
    "images": f"{NOTHING} images alone; give --text for a model of text",
    "audio": f"{NOTHING} sound alone; give --images for an encoder of images, --text for a model of text",
    "text": f"{NOTHING} text alone; give --images for an encoder of images, --audio for one of sound",
}


def parse_encoder(config: dict) -> tuple[PreTrainedConfig, Any]:
    """The transformers config of a raw config.json, and the class that the checkpoint is of: what `architectures` names
    where that is a class of this config, or what AutoModel loads."""
    parsed = dropping_none(read_as_config(config))
    kind: Any = of_auto(ANY, type(parsed))
    if kind is None:
        raise UnsupportedModel(f"config.json: model_type {parsed.model_type!r} is no model that {ANY} loads")
    named = parsed.architectures[0] if parsed.architectures else kind.__name__
    found: Any = vars(sys.modules[kind.__module__]).get(named)
    if found in models_of(type(parsed)).values():
        return parsed, found
    return parsed, kind


def require_class(anatomy: Anatomy) -> None:
    """UnsupportedModel where the checkpoint is of a class that no Auto class loads, so that what it has beside the
    encoder (CLIP's projection) would be lost in what is written."""
    named = (anatomy.config.architectures or [""])[0]
    own: Any = vars(sys.modules[anatomy.model_class.__module__]).get(named)
    if own is not None and own is not anatomy.model_class:
        raise UnsupportedModel(
            f"{anatomy.model_type}: config.json says {named}, which no Auto class loads, so a converted one could not "
            f"be loaded; save its {anatomy.model_class.__name__}, and convert that"
        )


def examine_encoder(config: dict, reads: Reads | None = None) -> Anatomy:
    """What `config` (a raw config.json) describes, without weights; its `patching` is there. `reads`: which encoder is
    meant, where there may be several; None: that of images, or else that of sound.

    UnsupportedModel where no part of it reads pixels, sound or text alone, where that does not attend through
    transformers' AttentionInterface, or where its tokens are neither a grid of patches nor a row.
    """
    return _examine(*parse_encoder(config), reads)


def _examine(parsed: PreTrainedConfig, kind: Any, reads: Reads | None = None) -> Anatomy:
    try:
        with on_meta():
            model = kind._from_config(copy.deepcopy(parsed), dtype=torch.float32).eval()
    except Exception as error:  # of any class: model code trusts its config
        raise UnsupportedModel(f"{parsed.model_type}: no model can be built of its config ({brief(error)})") from error
    wanted: list[Reads] = ["images", "audio"] if reads is None else [reads]
    refused: UnsupportedModel | None = None
    for one in wanted:
        found, error_ = _innermost(parsed, model, one)
        if found is not None:
            return found
        refused = refused or error_
    raise refused or UnsupportedModel(f"{parsed.model_type}: {_NONE[wanted[0]]}")


def _innermost(
    parsed: PreTrainedConfig, model: PreTrainedModel, reads: Reads
) -> tuple[Anatomy | None, UnsupportedModel | None]:
    """The innermost tower that `reads` this, and why the last of others was refused."""
    found: Anatomy | None = None
    refused: UnsupportedModel | None = None
    for name, part in model.named_modules():
        if found is not None and not name.startswith(found.lead):
            break
        if isinstance(part, PreTrainedModel) and _may_read(model, name, reads):
            try:
                found = _examined(parsed, model, name, part)  # the innermost: a classifier has its encoder inside
            except UnsupportedModel as error:  # another inside of it may do
                refused = error
    return found, refused


def _may_read(model: PreTrainedModel, name: str, reads: Reads) -> bool:
    if reads == "text":
        return is_tower(model, name)
    return model.get_submodule(name).main_input_name in ((PIXELS,) if reads == "images" else SOUND)


def _examined(parsed: PreTrainedConfig, model: PreTrainedModel, name: str, tower: PreTrainedModel) -> Anatomy:
    if tower.main_input_name == TOKENS:
        for one in (parsed, tower.config):
            refuse_config(one)
        patching, calls = texts_of(parsed.model_type, tower)
        return _anatomy(parsed, model, name, tower, calls, patching)
    look = _patches if tower.main_input_name == PIXELS else frames_of
    patching, calls = look(parsed.model_type, tower)
    if any(call.causal and call.mask is None for call in calls):
        raise UnsupportedModel(f"{parsed.model_type}: its tokens see only those before them, as a language model's do")
    return _anatomy(parsed, model, name, tower, calls, patching)


def _patches(kind: str, tower: PreTrainedModel) -> tuple[Patching, list[Call]]:
    """What becomes of an image, and the attention calls."""
    size, patch, handed = pair(tower.config, "image_size"), pair(tower.config, "patch_size"), handed_to(tower)
    if (
        handed == "packed"
        and patch is not None
        and isinstance(count := getattr(tower.config, "num_patches", None), int)
    ):
        side = math.isqrt(count)
        size = side * patch[0], side * patch[1]
    if size is None or patch is None:
        raise UnsupportedModel(f"{kind}: its config has no image_size and patch_size, so no grid of patches")
    shape = (getattr(tower.config, "num_channels", 3), *size)
    calls = calls_of(tower, shape, handed, patch)
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    special = min((call.query.shape[2] for call in calls), default=0) - rows * columns
    if special < 0 or any(call.query.shape[2] != special + rows * columns for call in calls):
        raise UnsupportedModel(
            f"{kind}: an image of {size[0]} x {size[1]} is not {rows} x {columns} tokens in all of its "
            "layers, so what stands where is not known"
        )
    key = next((key for key in REGISTERS if getattr(tower.config, key, None)), None)
    registers = 0 if key is None else min(getattr(tower.config, key), max(special - 1, 0))
    return Patching(PIXELS, shape, patch, patch, special, registers, key, handed), calls


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
    without = _examine(config, anatomy.model_class, "images")
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
    vocab_size = getattr(tower.config, "vocab_size", None)
    return Anatomy(
        model_type=config.model_type, model_class=type(model), config_class=type(config), trunk=name,
        trunk_class=type(tower).__name__, blocks=blocks, sites=sites, mixers=(), indexers=(),
        max_positions=places_of(tower) if patching.is_text else None, max_length=None,
        vocab_size=vocab_size if patching.is_text else None, config=config, blank=model, patching=patching,
    )  # fmt: skip
