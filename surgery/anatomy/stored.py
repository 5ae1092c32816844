"""Names under which a checkpoint stores the parameters of its model, and their values as it would store them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..checkpoint.layout import Layout
from ..checkpoint.values import as_stored
from ..errors import UnsupportedModel
from .sites import Anatomy

if TYPE_CHECKING:
    import torch


EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
NO_LIMIT = 2**31  # of token ids, where nothing says how many there are


def find_stored(layout: Layout, anatomy: Anatomy, name: str) -> str | None:
    """The name in the checkpoint of the trunk's parameter `name`; None where it does not stand there by itself."""
    # Checkpoints of a bare trunk (GPT-2's own) leave the lead out.
    for known in (f"{anatomy.lead}{name}", name):
        if known in layout.tensors:
            return known
        if (stored := _before_renaming(anatomy, known)) in layout.tensors:
            return stored
    return None


def _before_renaming(anatomy: Anatomy, name: str) -> str:
    """The name that transformers changes to `name` when it loads; `name` itself where it changes none to it, or joins
    several tensors to one."""
    model = anatomy.blank
    renamings, converters = _conversions(model)
    back = [one.reverse_transform() for one in reversed(renamings)]
    stored, _ = rename_source_key(name, back, [], reverse=True)
    there = model.state_dict(keep_vars=True)
    again, joined = rename_source_key(stored, renamings, converters, model.base_model_prefix, there)
    whole, _ = rename_source_key(name, [], [], model.base_model_prefix, there)
    return stored if joined is None and again == whole and whole in there else name


@functools.lru_cache(maxsize=1)
def _conversions(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """Renamings, and what joins or splits tensors."""
    mapping = get_model_conversion_mapping(model)
    return (
        [entry for entry in mapping if isinstance(entry, WeightRenaming)],
        [entry for entry in mapping if isinstance(entry, WeightConverter)],
    )


def splits(anatomy: Anatomy) -> bool:
    """Whether transformers may make several tensors of one when it loads the model."""
    return any(len(one.target_patterns) > 1 for one in _conversions(anatomy.blank)[1])


def stored_name(layout: Layout, anatomy: Anatomy, name: str) -> str:
    """The name in the checkpoint of the causal LM's parameter `name`; UnsupportedModel where there is none."""
    stored = find_stored(layout, anatomy, name.removeprefix(anatomy.lead))
    if stored is None:
        raise UnsupportedModel(
            f"{layout.root} does not store {name} as it stands in the model (transformers renames or joins tensors "
            "when it loads), so it cannot be changed; leave out what would change it, or save the model again first."
        )
    return stored


def stored_values(layout: Layout, anatomy: Anatomy, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Changed parameters of the causal LM by their names in the checkpoint, in the dtypes that it stores them in."""
    return {stored_name(layout, anatomy, name): stored_value(layout, anatomy, name, w) for name, w in weights.items()}


def stored_value(layout: Layout, anatomy: Anatomy, name: str, weight: torch.Tensor) -> torch.Tensor:
    """`weight`, of the causal LM's parameter `name`, in the dtype that the checkpoint stores it in."""
    return as_stored(layout.tensors[stored_name(layout, anatomy, name)], weight)


def vocabulary_size(layout: Layout, anatomy: Anatomy) -> int:
    """How many token ids the model has embeddings for, from headers; else as its config says."""
    for info in layout.tensors.values():
        if info.name.endswith(EMBEDDINGS) and info.shape:
            return info.shape[0]
    return NO_LIMIT if anatomy.vocab_size is None else anatomy.vocab_size
