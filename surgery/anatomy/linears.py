"""The linear layers of a model: what quantisation rounds, LoRA adds to and smoothing scales."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModel
from .sites import ADDED, Anatomy


def linears(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, nn.Module]:
    """Name in the trunk -> every linear layer inside its blocks.

    UnsupportedModel where blocks hold matrices in other modules (experts fused into one tensor): a figure of a model
    quantised in part would look like one of the whole.
    """
    trunk, found, left = model.get_submodule(anatomy.trunk), {}, []
    for block in anatomy.blocks:
        for name, module in trunk.get_submodule(block).named_modules(prefix=block):
            if isinstance(module, (nn.Linear, Conv1D)):
                found[name] = module
            elif any(part in ADDED for part in name.split(".")):
                continue
            elif any(p.ndim > 1 for p in module.parameters(recurse=False)):
                left.append(name)
    if left or not found:
        raise UnsupportedModel(
            f"{left[0] if left else anatomy.trunk} holds weights that are no linear layer, out of reach of quantised "
            "verification and of LoRA; leave 'quantised' and 'lora' out of the recipe."
        )
    return found
