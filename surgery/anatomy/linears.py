"""The linear layers of a model: what quantisation rounds, LoRA adds to and smoothing scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import SourceError, UnsupportedModel
from .sites import ADDED, Anatomy

LINEAR = (nn.Linear, Conv1D)  # the latter is GPT-2's, whose weight is (in, out)


def row_dim(module: nn.Module) -> int:
    """The dimension of a linear layer's weight that counts its outputs."""
    return 1 if isinstance(module, Conv1D) else 0


def as_rows(module: Any) -> torch.Tensor:
    """The weight of a linear layer of any kind as (out, in)."""
    weight: torch.Tensor = module.weight
    return weight.transpose(0, row_dim(module))


def means(target: str, name: str) -> bool:
    """Whether `target`, as recipes name layers ("down_proj"), means the layer `name`: its name, or the end of it."""
    return name == target or name.endswith(f".{target}")


def require_known(targets: Sequence[str], names: Sequence[str], key: str) -> None:
    """SourceError for one of `targets` that means none of the linear layers `names`; `key`: of the recipe."""
    for target in targets:
        if not any(means(target, name) for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise SourceError(f"{key}: {target!r} is no linear layer of this model; it has {known}.")


def widths(module: nn.Module) -> tuple[int, int | None]:
    """What a linear layer of any kind maps from and to; (0, None) for any other module."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return getattr(module, "in_features", 0), getattr(module, "out_features", None)


def linears(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, nn.Module]:
    """Name in the trunk -> every linear layer inside its blocks.

    UnsupportedModel where blocks hold matrices in other modules (experts fused into one tensor): a figure of a model
    quantised in part would look like one of the whole. What a mixer holds itself, and its depthwise convolutions, are
    a few numbers a channel, which quantisers leave alone.
    """
    trunk, left = model.get_submodule(anatomy.trunk), []
    mixers = {mixer.name for mixer in anatomy.mixers}
    found: dict[str, nn.Module] = {}
    for block in anatomy.blocks:
        for name, module in trunk.get_submodule(block).named_modules(prefix=block):
            if isinstance(module, LINEAR):
                found[name] = module
            elif any(part in ADDED for part in name.split(".")):
                continue
            elif name in mixers and all(parameter.ndim < 3 for parameter in module.parameters(recurse=False)):
                continue
            elif isinstance(module, nn.Conv1d) and module.groups == module.in_channels:
                continue
            elif any(p.ndim > 1 for p in module.parameters(recurse=False)):
                left.append(name)
    if left or not found:
        raise UnsupportedModel(
            f"{left[0] if left else anatomy.trunk} holds weights that are no linear layer, out of reach of "
            "quantisation and of LoRA; leave 'quantise', 'quantised' and 'lora' out of the recipe."
        )
    return found
