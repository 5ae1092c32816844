"""Open a model layer by layer: built by transformers as ever, its tensors left in their files, sorted into units."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ..anatomy.packed import unpacked, unpacking_each
from ..anatomy.sites import Anatomy
from ..checkpoint.layout import Layout, read_layout
from ..checkpoint.reading import without_values
from .layerwise import Layerwise, Unit

OUTSIDE = "what is outside of the blocks"

Finish = Callable[[PreTrainedModel, PreTrainedConfig, torch.dtype], PreTrainedModel]


@dataclass(frozen=True)
class ByLayers:
    """The structure of a model whose weights come layer by layer, and how many bytes of them may be there at a time;
    `aside`: bytes of hidden states that may wait in memory for their next layer."""

    anatomy: Anatomy
    room: int
    aside: int


@contextlib.contextmanager
def loading_by(by_layers: ByLayers | None, directory: Path) -> Iterator[Finish]:
    """Within the block, `from_pretrained(directory)` builds a model without reading its weights; afterwards, what is
    yielded makes it one that has them when they are called for. Of None, all is as ever. Packed weights are unpacked:
    all at once, or each when it comes."""
    if by_layers is None:
        yield unpacked
        return
    layout = read_layout(directory)
    with _weights_left(layout) as kept:

        def finish(model: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
            layers = Layerwise(model, layout, kept[0], units_of(model, by_layers.anatomy, layout, kept[0]))
            layers.unpacking(unpacking_each(model, config, dtype))
            layers.pin(by_layers.room)
            layers.aside = by_layers.aside
            model.layerwise = layers  # type: ignore[assignment]
            return model

        yield finish


@contextlib.contextmanager
def _weights_left(layout: Layout) -> Iterator[list[LoadStateDictConfig]]:
    """Within the block, transformers' `from_pretrained` leaves the weights of the model that it builds where they are.

    It sees tensors of the names and shapes in `layout`, on the meta device: what it reports of them is what it would
    report, and what it computes itself (rotary frequencies) is there. Yields a list, which then holds how it would have
    loaded them.
    """
    kept: list[LoadStateDictConfig] = []

    def load(model: PreTrainedModel, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        config = next(one for one in (*args, *kwargs.values()) if isinstance(one, LoadStateDictConfig))
        kept.append(config)
        on_meta = dataclasses.replace(config, device_map={"": torch.device("meta")})
        report, _ = convert_and_load_state_dict_in_model(model, without_values(layout), on_meta)
        return report, None

    kind: Any = PreTrainedModel
    before = vars(kind)["_load_pretrained_model"]
    kind._load_pretrained_model = staticmethod(load)
    try:
        yield kept
    finally:
        kind._load_pretrained_model = before


# ---- what belongs to which unit


def units_of(model: PreTrainedModel, anatomy: Anatomy, layout: Layout, config: LoadStateDictConfig) -> list[Unit]:
    """The blocks, the embedding and the output layer of a `model` on the meta device, and all else as the last unit.

    That has no gate. Tied weights are of one unit, under all their names.
    """
    names = {module: name for name, module in model.named_modules()}
    ends = [names[end] for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end in names]
    _stand_in(model, ends, torch.device((config.device_map or {"": "cpu"})[""]))
    stored = _stored_names(model, layout, config)
    groups: dict[str, list[str]] = {}  # by their first gate
    owner: dict[int, str] = {}
    for gate in dict.fromkeys([*(f"{anatomy.lead}{block}" for block in anatomy.blocks), *ends]):
        own = [id(tensor) for _, _, tensor in _homes(model, gate)]
        first = next((owner[one] for one in own if one in owner), gate)  # what shares a tensor goes together
        groups.setdefault(first, []).append(gate)
        owner.update(dict.fromkeys(own, first))
    units = []
    for name, gates in [*groups.items(), ("", [])]:
        homes = tuple(home for home in _homes(model, "") if owner.get(id(home[2]), "") == name)
        ids = {id(tensor) for _, _, tensor in homes}
        tensors = tuple(tensor for tensor, found in stored.items() if found in ids)
        sizes = {id(tensor): tensor.nbytes for _, _, tensor in homes}
        stored_bytes = sum(layout.tensors[tensor].nbytes for tensor in tensors)
        loaded = max(sum(sizes.values()), size_of(map(anatomy.blank.get_submodule, gates), model.dtype))
        units.append(Unit(name or OUTSIDE, tuple(gates), tensors, homes, stored_bytes, loaded))
    return units


def size_of(modules: Iterable[nn.Module], dtype: torch.dtype) -> int:
    """Bytes of their parameters as they compute, each once."""
    every = {id(p): p for module in modules for p in module.parameters()}.values()
    return sum(p.numel() * (dtype.itemsize if p.is_floating_point() else p.itemsize) for p in every)


def _stand_in(model: PreTrainedModel, ends: Iterable[str], device: torch.device) -> None:
    """NaN of no size in place of the weights of `ends`: some models (Llama 4) ask on which device these are."""
    instead: dict[int, nn.Parameter] = {}
    places = [home for end in dict.fromkeys(ends) for home in _homes(model, end)]
    for _, _, tensor in places:
        nothing = torch.full((1,), float("nan"), dtype=tensor.dtype, device=device).expand(tensor.shape)
        instead.setdefault(id(tensor), nn.Parameter(nothing, requires_grad=False))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = instead.get(id(parameter), parameter)


def _homes(model: nn.Module, lead: str) -> list[tuple[str, str, torch.Tensor]]:
    """Where the stored tensors of the module `lead` are: of a tied one, all places."""
    found = []
    for path, module in model.get_submodule(lead).named_modules(prefix=lead):
        buffers = {
            name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        for name, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                found.append((path, name, tensor))
    return found


def _stored_names(model: PreTrainedModel, layout: Layout, config: LoadStateDictConfig) -> dict[str, int]:
    """Name in the checkpoint -> id of the tensor of `model` that it goes to; of several (fused the other way), one."""
    mapping = config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    there = model.state_dict(keep_vars=True)
    found = {}
    for name in layout.tensors:
        for entries in ((renamings, converters), ([], [])):
            renamed, _ = rename_source_key(name, *entries, model.base_model_prefix, there)  # type: ignore[arg-type]
            if renamed in there:
                found[name] = id(there[renamed])
                break
    return found
