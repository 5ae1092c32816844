"""Put slots and norms into a live model and take them out again; bring families that are off the seam onto it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..anatomy.sites import Anatomy
from ..runtime.eab_families import ADAPTERS
from ..runtime.eab_head_norm import install_norms
from ..runtime.eab_runtime import install, require_added

Slots = dict[str, tuple[torch.Tensor, torch.Tensor]]  # site name -> key (n, H, D), value (n, H, E)
Norms = dict[str, dict[str, torch.Tensor]]  # site name -> weight (E,) or (Hq, E), and gate (Hq,) unless it is pure


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
        for name in () if slots else eab["sites"]:  # of no slots, but several processes compare what a model holds
            module = trunk.get_submodule(name)
            if (beside := next(module.parameters(), None)) is not None and not beside.is_meta:
                module.attention_bias.to(beside.device)
        require_added(trunk)
        try:
            for config, _ in before:
                config._attn_implementation_internal = "eab"
            yield model
        finally:
            for config, implementation in before:
                config._attn_implementation_internal = implementation


@contextlib.contextmanager
def normed(model: PreTrainedModel, anatomy: Anatomy, head_norm: dict, norms: Norms) -> Iterator[PreTrainedModel]:
    """`model`, in which slots are `installed` (none will do), with `norms` in place, described by `head_norm`.

    Taken out again at the end. The norms keep their own dtype.
    """
    trunk = model.get_submodule(anatomy.trunk)
    with install_norms(trunk, head_norm):
        for name, values in norms.items():
            module = trunk.get_submodule(name).head_norm
            for part, value in values.items():
                setattr(module, part, torch.nn.Parameter(value, requires_grad=False))
        require_added(trunk)
        yield model


@contextlib.contextmanager
def on_the_seam(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[None]:
    """The original model so that `observing` sees its attention: with no slots, where its family needs an adapter."""
    trunk = model.get_submodule(anatomy.trunk)
    if anatomy.model_type not in ADAPTERS or getattr(trunk.config, "eab", None) is not None:
        yield
        return
    with installed(model, anatomy, anatomy.eab(0, "as_prefix"), {}):
        yield
