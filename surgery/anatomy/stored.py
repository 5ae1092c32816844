"""Names under which a checkpoint stores the parameters of its model, and their values as it would store them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

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
    names = (f"{anatomy.lead}{name}", name)  # checkpoints of a bare trunk (GPT-2's own) leave the lead out
    if (stored := next((known for known in names if known in layout.tensors), None)) is not None:
        return stored
    earlier = (_before_renaming(anatomy, known) for known in names)
    return next((stored for stored in earlier if stored in layout.tensors), None)


def _before_renaming(anatomy: Anatomy, name: str) -> str:
    """The name that transformers changes to `name` when it loads; `name` itself where it changes none to it, or joins
    several tensors to one."""
    known, prefix = _conversions(anatomy.blank), anatomy.blank.base_model_prefix
    stored, _ = rename_source_key(name, known.back, [], reverse=True)
    again, joined = rename_source_key(stored, known.renamings, known.converters, prefix, known.there)
    whole, _ = rename_source_key(name, [], [], prefix, known.there)
    return stored if joined is None and again == whole and whole in known.there else name


class _Conversions(NamedTuple):
    """What transformers does to the names of a model's tensors when it loads them: renamings, the same backwards, and
    what joins or splits tensors. `there`: the names that they come to."""

    renamings: list[Any]
    back: list[Any]
    converters: list[Any]
    there: dict[str, Any]


@functools.lru_cache(maxsize=1)
def _conversions(model: PreTrainedModel) -> _Conversions:
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return _Conversions(
        renamings, [one.reverse_transform() for one in reversed(renamings)],
        [entry for entry in mapping if isinstance(entry, WeightConverter)], model.state_dict(keep_vars=True),
    )  # fmt: skip


def splits(anatomy: Anatomy) -> bool:
    """Whether transformers may make several tensors of one when it loads the model."""
    return any(len(one.target_patterns) > 1 for one in _conversions(anatomy.blank).converters)


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
