"""config.json of a stranger, before model code sees it: what in it chooses code, and what is too much.

Whatever is asked of the whole file holds of the dicts inside as well: transformers makes configs of those too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DamagedCheckpoint, SourceError
from ..words import named
from .regular import read_json

CONFIG = "config.json"
MAX_CONFIG = 16_000_000  # bytes; the largest that are known have a tenth of it
MOST_VALUES = 2**17  # in it: transformers copies all of them again and again
# How a model is computed, which is not a part of it: kernels and rewrites that transformers would load, some of them
# from the hub. It writes none of these keys itself.
_IMPLEMENTATION = re.compile(r"_?\w*implementation(_internal)?|_?flash_attn_\w+")
_CHOICES = {"fusion_config", "kernel_config", "use_kernels", "use_kernel", "distributed_config"}
# What makes transformers read other weights than those that lie here.
_ELSEWHERE = {"transformers_weights", "backbone", "use_pretrained_backbone"}
LARGEST = 2**63  # beyond it a number fits no integer of torch
# What transformers counts up to in Python while it reads a config or builds a model. Layers are bounded by the headers.
_COUNT = re.compile(r"_?(num|n)_(?!\w*(vocab|embd|embed|position|ctx|token|pixel|param))\w+")
_LAYERS = re.compile(r"_?(num_|n_)?\w*layers?|depths?|num_blocks|n_blocks")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST, _MOST_LABELS, _SPARE_LAYERS = 2**20, 2**15, 256
_FIRST_INDEX = re.compile(r"(?:^|\.)(\d{1,9})(?:\.|$)")


def read_config(root: Path) -> dict[str, Any]:
    """config.json of the directory `root` as it stands; DamagedCheckpoint where it is no sane JSON object."""
    path = root / CONFIG
    config = read_json(path, MAX_CONFIG)
    for count, (key, value) in enumerate(entries(config), 1):
        if count > MOST_VALUES:
            raise DamagedCheckpoint(f"{path} holds more than {MOST_VALUES:,} values, which no config does; correct it.")
        if type(value) is int and abs(value) >= LARGEST:
            raise DamagedCheckpoint(f"{path}: {named(key)} is a number of {len(str(abs(value)))} digits; correct it.")
    return config


def entries(value: object, within: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a config, at any depth; items of lists have the key of the list."""
    if isinstance(value, dict):
        for key, item in value.items():
            dotted = f"{within}.{key}" if within else str(key)
            yield dotted, item
            yield from entries(item, dotted)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, (dict, list)):
                yield from entries(item, within)
            else:
                yield within, item


def _last(dotted: str) -> str:
    return dotted.rpartition(".")[2]


def code_choices(config: Mapping[str, Any]) -> list[str]:
    """Dotted keys by which `config` chooses kernels, code or weights from elsewhere; the `auto_map` at its top is not
    among them."""
    return [key for key, value in entries(dict(config)) if _chooses(key, value) or key.endswith(".auto_map")]


def _chooses(dotted: str, value: object) -> bool:
    key = _last(dotted)
    elsewhere = key in _ELSEWHERE and (isinstance(value, str) or value is True)
    return elsewhere or key in _CHOICES or _IMPLEMENTATION.fullmatch(key) is not None


def without_choices(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """`config` without what chooses code; SourceError for what would have transformers read other weights."""
    for key, value in entries(dict(config)):
        if _last(key) in _ELSEWHERE and _chooses(key, value):
            raise SourceError(
                f"{where}: {named(key)} makes transformers load {named(value)}, which is no part of this checkpoint; "
                "remove that key."
            )
    return {key: _cleaned(value) for key, value in config.items() if key == "auto_map" or not _chooses(key, value)}


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _cleaned(v) for k, v in value.items() if k != "auto_map" and not _chooses(str(k), v)}
    return [_cleaned(item) for item in value] if isinstance(value, list) else value


# ---- too much


def stack_size(names: Iterable[str]) -> int:
    """How many layers the names of tensors have room for: one more than the largest first number in a name."""
    found = (_FIRST_INDEX.search(name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def require_countable(config: Mapping[str, Any], names: Iterable[str], where: Path) -> None:
    """DamagedCheckpoint where `config`, which stands in the file `where`, counts further than the tensors of these
    names could fill, so that reading it, or building its model, would not end. Whether the two fit exactly is another
    question."""
    stack = stack_size(names)
    for dotted, value in entries(dict(config)):
        key = _last(dotted)
        if type(value) is not int:
            continue
        few = dotted.removeprefix("text_config.") in _DEPTHS and value < 1
        if few or _LAYERS.fullmatch(key) and value > 4 * stack + _SPARE_LAYERS:
            held = f"and the tensors beside it are of {stack}"
        elif key == "num_labels" and value > _MOST_LABELS or _COUNT.fullmatch(key) and value > _MOST:
            held = "more than any model has"
        else:
            continue
        raise DamagedCheckpoint(f"{where}: {named(dotted)} is {value:,}, {held}; correct it, or download it again.")
