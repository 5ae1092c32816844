"""Tensors of the source that a recipe may change, and the names under which a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..anatomy.linears import linears
from ..anatomy.sites import Anatomy, blank_model
from ..checkpoint.layout import Layout
from ..checkpoint.values import as_stored
from ..errors import SourceError, UnsupportedModel
from ..recipe import Lora, Recipe


def changeable(config: dict, anatomy: Anatomy, recipe: Recipe, layout: Layout) -> dict[str, str]:
    """Stored tensor name -> "changed", or "may change" where calibration text decides; {} for most recipes.

    UnsupportedModel where LoRA or smoothing is to change what the checkpoint stores in another form than the model has
    it.
    """
    if not recipe.changes_weights:
        return {}
    model, found = blank_model(config), {}
    trunk = model.get_submodule(anatomy.trunk)
    if recipe.smoothing is not None:
        renamed = []
        for block in anatomy.blocks:
            for name, module in trunk.get_submodule(block).named_modules(prefix=block):
                linear = isinstance(module, (nn.Linear, Conv1D))
                for part, parameter in module.named_parameters(recurse=False):
                    stored = _stored(layout, anatomy, f"{name}.{part}")
                    if stored is not None and (linear or parameter.ndim == 1):
                        found[stored] = "may change"
                    elif linear:
                        renamed.append(f"{anatomy.lead}{name}.{part}")
        if renamed and not found:
            stored_name(layout, anatomy, renamed[0])  # raises
    if recipe.tune is not None and recipe.tune.lora is not None:
        for name in targeted(list(linears(model, anatomy)), recipe.tune.lora):
            found[stored_name(layout, anatomy, f"{anatomy.lead}{name}.weight")] = "changed"
    return found


def stored_name(layout: Layout, anatomy: Anatomy, name: str) -> str:
    """The name in the checkpoint of the causal LM's parameter `name`; UnsupportedModel where there is none."""
    stored = _stored(layout, anatomy, name.removeprefix(anatomy.lead))
    if stored is None:
        raise UnsupportedModel(
            f"{layout.root} does not store {name} as it stands in the model (transformers renames or joins tensors "
            "when it loads), so it cannot be changed; leave lora and smoothing out, or save the model again first."
        )
    return stored


def _stored(layout: Layout, anatomy: Anatomy, name: str) -> str | None:
    # Checkpoints of a bare trunk (GPT-2's own) leave the prefix out.
    return next((stored for stored in (f"{anatomy.lead}{name}", name) if stored in layout.tensors), None)


def stored_values(layout: Layout, anatomy: Anatomy, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Changed parameters of the causal LM by their names in the checkpoint, in the dtypes that it stores them in."""
    return {stored_name(layout, anatomy, name): stored_value(layout, anatomy, name, w) for name, w in weights.items()}


def stored_value(layout: Layout, anatomy: Anatomy, name: str, weight: torch.Tensor) -> torch.Tensor:
    """`weight`, of the causal LM's parameter `name`, in the dtype that the checkpoint stores it in."""
    return as_stored(layout.tensors[stored_name(layout, anatomy, name)], weight)


def targeted(names: Sequence[str], lora: Lora) -> list[str]:
    """Of the linear layers `names`, those that `lora.targets` means; SourceError for a target that means none."""
    if lora.targets == "all":
        return list(names)
    for target in lora.targets:
        if not any(_means(target, name) for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise SourceError(f"tune.lora.targets: {target!r} is no linear layer of this model; it has {known}.")
    return [name for name in names if any(_means(target, name) for target in lora.targets)]


def _means(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")
