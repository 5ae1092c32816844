"""vLLM's models with slots: a class for every one that vLLM knows, derived when it is asked for.

`SurgeryEabLlamaForCausalLM` is an attribute of this module, and so on. No code here knows a family.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
import vllm
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models import ModelRegistry
from vllm.v1.attention.backend import AttentionType

from .attention import add_slots
from .names import ENTRY, FORMAT, PREFIX, VLLM, layer_of, slot_of
from .slots import rows_of

SPARE = 1024  # tokens that padding may add to the largest batch


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX):
        return derived(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def derived(architecture: str) -> type:
    """The class with slots of the architecture `SurgeryEab...`, from vLLM's own of the same name without that."""
    base = ModelRegistry.models[architecture.removeprefix(PREFIX)].load_model_cls()
    # vLLM asks some classes for their name: it stays.
    return type(base.__name__, (WithSlots, base), {"__module__": __name__, "__doc__": WithSlots.__doc__})


class WithSlots(nn.Module):
    """A model of vLLM whose requests begin with n placeholders: at their positions each attention layer has its slots.

    What the placeholders themselves become nobody reads. The text sees the slots alone, from position n on.
    """

    slot_rows: torch.Tensor
    placeholders: torch.Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        entry = served(vllm_config)
        config = vllm_config.model_config.hf_config
        named = config.architectures
        config.architectures = [name.removeprefix(PREFIX) for name in named]
        try:  # some look up their own name there
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            config.architectures = named
        self.register_buffer("placeholders", torch.tensor(entry["placeholder_ids"]), persistent=False)
        # One buffer that never moves: a captured graph reads it where it was.
        tokens = vllm_config.scheduler_config.max_num_batched_tokens + SPARE
        self.register_buffer("slot_rows", torch.zeros(tokens, dtype=torch.int64), persistent=False)
        self.slot_sites = sites_of(self)
        for attention in self.slot_sites.values():
            add_slots(attention, len(entry["placeholder_ids"]), self.slot_rows)

    def __call__(self, input_ids: torch.Tensor | None, positions: torch.Tensor, *args, **kwargs):
        """Before the forward pass, compiled or not: which tokens are placeholders. Both (T,)."""
        if input_ids is None or positions.ndim != 1:
            raise ValueError("slots need the token ids of a text, and one position for each")
        self.slot_rows[: len(positions)].copy_(rows_of(input_ids, positions, self.placeholders))
        return super().__call__(input_ids, positions, *args, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        slots: dict[tuple[int, str], torch.Tensor] = {}
        loaded = super().load_weights(_without_slots(weights, slots))  # type: ignore[misc]  # of the model it is mixed into
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        for layer, attention in self.slot_sites.items():
            for kind, table in (("key", attention.slot_key), ("value", attention.slot_value)):
                if (layer, kind) not in slots:
                    raise ValueError(f"the checkpoint has no {kind} slots for layer {layer}; export it again")
                table.weight_loader(table, slots[layer, kind])
                if loaded is not None:
                    loaded.add(names[id(table)])
        return loaded


def served(vllm_config: VllmConfig) -> dict:
    """The entry of config.json that says how requests begin; ValueError where slots would not be what they should."""
    model = vllm_config.model_config
    if not vllm.__version__.startswith(f"{VLLM}."):
        raise ValueError(f"the plugin knows vLLM {VLLM}, and this is {vllm.__version__}; install that version")
    entry = getattr(model.hf_config, ENTRY, None)
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise ValueError(f"config.json has no {ENTRY} of format {FORMAT}; export the checkpoint again")
    if getattr(model, "enable_prompt_embeds", False):
        raise ValueError("prompt embeddings have no token ids, by which slots are placed; serve without them")
    if model.uses_mrope:
        raise ValueError("slots are placed by one position a token, and this model has several")
    if vllm_config.parallel_config.use_ubatching:
        raise ValueError("batches cut in two (dual batch overlap) are not served with slots; serve without it")
    return entry


def sites_of(model: nn.Module) -> dict[int, Attention]:
    """Layer -> its attention layer, of those that fill a cache; ValueError for a layer of another kind."""
    sites: dict[int, Attention] = {}
    for module in model.modules():
        if not isinstance(module, AttentionLayerBase):
            continue
        if not isinstance(module, Attention) or module.attn_type != AttentionType.DECODER:
            raise ValueError(f"a layer of kind {type(module).__name__} has no keys and values that slots could replace")
        if module.kv_sharing_target_layer_name is not None:
            continue  # it reads the cache of another
        layer = layer_of(module.layer_name)
        if layer in sites:
            raise ValueError(f"layer {layer} attends twice, and a checkpoint has slots for one attention a layer")
        sites[layer] = module
    if not sites:
        raise ValueError(f"no layer of {type(model).__name__} on this rank attends, so there is no place for slots")
    return sites


def _without_slots(
    weights: Iterable[tuple[str, torch.Tensor]], slots: dict[tuple[int, str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` but those of slots, which are put into `slots` as they come by."""
    for name, tensor in weights:
        if (slot := slot_of(name)) is None:
            yield name, tensor
        else:
            slots[slot] = tensor
