"""Put slots into a live model and take them out again; bring families that are off the seam onto it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..runtime.eab_families import ADAPTERS
from ..runtime.eab_runtime import install, require_slots
from .sites import Anatomy

Slots = dict[str, tuple[torch.Tensor, torch.Tensor]]  # site name -> key (n, H, D), value (n, H, E)


@contextlib.contextmanager
def installed(model: PreTrainedModel, anatomy: Anatomy, eab: dict, slots: Slots) -> Iterator[PreTrainedModel]:
    """`model` with `slots` in place, described by `eab`; taken out again at the end, weights untouched.

    The slots keep their own dtype, so that a float64 model can be compared exactly.
    """
    trunk = model.get_submodule(anatomy.trunk)
    configs = {id(m.config): m.config for m in (model, trunk)}.values()
    before = [(config, config._attn_implementation_internal) for config in configs]
    with install(model, eab, ADAPTERS.get(anatomy.model_type)):
        for name, (key, value) in slots.items():
            module = trunk.get_submodule(name).attention_bias
            module.key = torch.nn.Parameter(key, requires_grad=False)
            module.value = torch.nn.Parameter(value, requires_grad=False)
        require_slots(trunk)
        try:
            for config, _ in before:
                config._attn_implementation_internal = "eab"
            yield model
        finally:
            for config, implementation in before:
                config._attn_implementation_internal = implementation


@contextlib.contextmanager
def on_the_seam(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[None]:
    """The original model so that `observing` sees its attention: with no slots, where its family needs an adapter."""
    trunk = model.get_submodule(anatomy.trunk)
    if anatomy.model_type not in ADAPTERS or getattr(trunk.config, "eab", None) is not None:
        yield
        return
    parameter = next(model.parameters())
    empty = {
        site.name: tuple(
            torch.empty(0, site.kv_heads, dim, dtype=parameter.dtype) for dim in (site.key_dim, site.value_dim)
        )
        for site in anatomy.sites
    }
    with installed(model, anatomy, anatomy.eab(0, "as_prefix"), empty):
        yield
