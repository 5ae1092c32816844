"""How long a text may be: the positions of a model, and whether a config's limit on them is only a limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

LIMIT = "max_position_embeddings"
# Rotary kinds that compute nothing from the limit, so that lowering it lowers only the limit.
LIMIT_ONLY_ROPE = {"default", "linear", "llama3", "proportional"}
# OPT, BioGPT and XGLM, like BART, begin their tables with two rows that no position of a text takes.
UNUSED_ROWS = 2


def max_length(config: PreTrainedConfig) -> int | None:
    """Positions below which rotary frequencies do not depend on the length of the text; None if they never do.

    Dynamic NTK stretches them, and LongRoPE changes to another set, for a text longer than the model was trained on.
    Below that length, and only there, the keys of a prefix are constant.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = []
    for kind in _kinds(rope).values():
        name = kind.get("rope_type", kind.get("type"))
        if name == "dynamic":
            limits.append(config.max_position_embeddings)
        elif name == "longrope":
            otherwise = getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
            limits.append(kind.get("original_max_position_embeddings") or otherwise)
    return min(limits, default=None)


def max_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model of this config has; None where there is no end of them."""
    names = (LIMIT, "max_seq_len")  # the latter is MPT's
    limits = (*(getattr(config.get_text_config(), name, None) for name in names), max_length(config))
    return min((limit for limit in limits if limit is not None), default=None)


def is_only_a_limit(config: dict, parsed: PreTrainedConfig, blank: PreTrainedModel) -> bool:
    """Whether nothing is computed from max_position_embeddings, so that another number leaves the model what it is.

    `config` is the raw config.json, `parsed` what transformers made of it, `blank` its model on the meta device. It is
    more than a limit where a table of positions is as long, and where rotary settings are taken from it or depend on
    it. Where a size of the model happens to be the same number, the answer may be no without need.
    """
    limit: Any = config.get(LIMIT)
    rope = getattr(parsed, "rope_parameters", None) or {}
    if {kind.get("rope_type", "default") for kind in _kinds(rope).values()} - LIMIT_ONLY_ROPE:
        return False
    return not _taken_from_limit(config, rope, limit) and not any(
        limit <= length <= limit + UNUSED_ROWS for length in _table_lengths(blank)
    )


def _kinds(rope: dict) -> dict[str, dict]:
    """Rotary settings by layer type; under "" where all layers share them."""
    return {name: kind for name, kind in rope.items() if isinstance(kind, dict)} or {"": rope}


def _taken_from_limit(config: dict, rope: dict, limit: int) -> bool:
    """Whether transformers filled in a rotary setting that the raw config leaves out, with the limit.

    Llama 3's scaling without its original length is such a one.
    """
    written: dict = next((config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)), {})
    for name, kind in _kinds(rope).items():
        given = _kinds(written).get(name, written)
        if any(value == limit and key not in given and key not in config for key, value in kind.items()):
            return True
    return False


def _table_lengths(blank: PreTrainedModel) -> Iterator[int]:
    """Sizes that a table of positions may have: rows of embeddings and of bare matrices, all sizes of larger buffers.

    A sinusoidal table or a causal mask is a buffer. Token embeddings, linear layers and vectors (norms) are none.
    """
    tokens = {id(part) for part in (blank.get_input_embeddings(), blank.get_output_embeddings())}
    for module in blank.modules():
        for buffer in module.buffers(recurse=False):
            yield from buffer.shape if buffer.ndim > 1 else ()
        if isinstance(module, (nn.Linear, Conv1D)) or id(module) in tokens:
            continue
        yield from (p.shape[0] for p in _matrices(module))


def _matrices(module: nn.Module) -> Iterator[torch.Tensor]:
    return (parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 2)
