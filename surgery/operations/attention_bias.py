"""Fold a token prefix into k', v' (EAB): what the prefix looks like to the text is constant, so it can be stored.

The first tokens of a causal model see only themselves. Their keys (after rotary and norms) and values are therefore the
same whatever follows, and attention over [prefix, text] equals attention over the text with those keys and values as
slots. Exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..anatomy.calls import Call, observing
from ..anatomy.sites import Anatomy
from ..errors import UnsupportedModel
from ..live.graft import Slots, installed, on_the_seam
from ..live.stream import input_device

FORMAT = 1


def eab_config(anatomy: Anatomy, prefix: Sequence[int], slots_visible: str) -> dict:
    """`config.eab` of the converted model."""
    return {"format": FORMAT, "prefix_ids": list(prefix), **anatomy.eab(len(prefix), slots_visible)}


def slot_names(anatomy: Anatomy) -> dict[str, tuple[str, int]]:
    """Tensor name in the checkpoint -> (site name, 0 for key or 1 for value)."""
    parts = ("key", "value")
    return {
        f"{anatomy.lead}{site.name}.attention_bias.{part}": (site.name, i)
        for site in anatomy.sites
        for i, part in enumerate(parts)
    }


def slot_tensors(anatomy: Anatomy, n_slots: int) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of every slot tensor, in the order of the file; none without slots."""
    dims = {site.name: (site.kv_heads, (site.key_dim, site.value_dim)) for site in anatomy.sites}
    names = slot_names(anatomy) if n_slots else {}
    return {name: (n_slots, dims[site][0], dims[site][1][part]) for name, (site, part) in names.items()}


def slot_values(anatomy: Anatomy, slots: Slots) -> dict[str, torch.Tensor]:
    """Tensor name -> float32 value, ready to be written."""
    return {
        name: slots[site][part].to("cpu", torch.float32).contiguous()
        for name, (site, part) in (slot_names(anatomy) if slots else {}).items()
    }


@torch.no_grad()
def fold(model: PreTrainedModel, anatomy: Anatomy, prefix: Sequence[int]) -> Slots:
    """Keys and values of `prefix` (token ids) at every site of the original model, in the dtype it runs in."""
    trunk = model.get_submodule(anatomy.trunk)
    names = {trunk.get_submodule(site.name): site.name for site in anatomy.sites}
    slots: Slots = {}

    def keep(call: Call) -> None:
        name = names.get(call.module)
        if name is None or name in slots:
            raise UnsupportedModel(
                f"{anatomy.model_type}: attention ran outside of the sites found at plan "
                f"({name or type(call.module).__name__})"
            )
        slots[name] = (call.key[0].transpose(0, 1).contiguous(), call.value[0].transpose(0, 1).contiguous())

    tokens = torch.tensor([list(prefix)], device=input_device(model))
    with on_the_seam(model, anatomy), observing(keep):
        try:
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        except ValueError as refusal:  # what the runtime says to a call that it cannot serve
            raise UnsupportedModel(f"{anatomy.model_type}: {refusal}") from refusal
    if missing := [site.name for site in anatomy.sites if site.name not in slots]:
        raise UnsupportedModel(f"{anatomy.model_type}: {missing[0]} did not attend while the prefix ran")
    return slots


def grafted(
    model: PreTrainedModel, anatomy: Anatomy, prefix: Sequence[int], slots: Slots, visible: str
) -> contextlib.AbstractContextManager[PreTrainedModel]:
    """The original model with the slots of `prefix` in place, within a `with` block."""
    return installed(model, anatomy, eab_config(anatomy, prefix, visible), slots)
