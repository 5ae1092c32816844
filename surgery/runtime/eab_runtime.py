"""Explicit attention bias (EAB) at run time: slots in every attention site of a causal language model.

A converted checkpoint was folded from a prefix of n tokens: the keys and values that the prefix has in every layer are
constants, and are stored as slots. The text sits at positions n, n+1, ... as it did behind the prefix, and a slot is
visible to a query exactly where the model's own mask would have shown it the prefix token. Three things do this:

* `Slots`, a module in each site that holds its slots;
* an attention function and a mask function, registered with transformers under the names in `IMPLEMENTATIONS`;
* a forward hook on the trunk (the innermost model that contains all sites) that shifts positions by n.

`config.eab` describes what is installed: `n_slots`, `slots_visible` ("as_prefix" or "always"), and `sites`, which maps
the name of each site within the trunk to [kv_heads, key_dim, value_dim].
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .eab_kernel import slot_attention
from .eab_positions import own_query_scale, shift_positions

# What a user may ask for, and the name under which we register our version of it.
IMPLEMENTATIONS = {"sdpa": "eab", "eager": "eab_eager"}

# Tensors that callers hand through the attention interface and that do not change plain attention.
HARMLESS_TENSORS = {"position_ids", "num_items_in_batch", "cache_position", "labels"}

# Arguments of `from_pretrained` that would split the model over devices by tensor.
PARALLEL_ARGUMENTS = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


class Slots(nn.Module):
    """The slots of one site: key (n, kv_heads, key_dim), value (n, kv_heads, value_dim), as if rotary was applied."""

    def __init__(self, n_slots: int, kv_heads: int, key_dim: int, value_dim: int):
        super().__init__()
        # Never uninitialised memory: a slot that no checkpoint fills is NaN, and `require_slots` refuses it.
        self.key = nn.Parameter(torch.full((n_slots, kv_heads, key_dim), float("nan"), dtype=torch.float32))
        self.value = nn.Parameter(torch.full((n_slots, kv_heads, value_dim), float("nan"), dtype=torch.float32))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key, self.value


# ---- attention and mask, called by every site through transformers' interfaces


def eab_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, softcap=None, s_aux=None,
    query_scale=None, need_weights=False, **kwargs,
):  # fmt: skip
    """The attention function of a site with slots, in the calling convention of `ALL_ATTENTION_FUNCTIONS`.

    query (B, Hq, T, D), key (B, H, S, D), value (B, H, S, E) -> output (B, T, Hq, E) and weights (B, Hq, T, S) or None.
    """
    for name, argument in kwargs.items():
        if isinstance(argument, torch.Tensor) and name not in HARMLESS_TENSORS:
            raise ValueError(f"attention with slots does not know the argument {name!r} and will not ignore it")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(
            "attention with slots is defined for causal attention only: a prefix is not constant without it"
        )
    if query_scale is not None:
        query = (query * query_scale).to(query.dtype)
    slot_key, slot_value = module.attention_bias()
    mask, slot_mask = attention_mask, None
    if mask is not None:
        n = slot_key.shape[0]
        if mask.ndim != 4 or mask.shape[-1] != n + key.shape[2]:
            raise ValueError(
                f"the attention mask has shape {tuple(mask.shape)}; with slots it needs {n} + {key.shape[2]} columns "
                "(slots first): pass a 2-D mask and let the model expand it"
            )
        slot_mask, mask = mask[..., :n], mask[..., n:]
        if slot_mask.dtype != torch.bool:
            slot_mask = slot_mask >= 0
    causal = mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        # An empty static cache: everything past the queries is still unwritten.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    out, weights = slot_attention(
        query, key, value, slot_key, slot_value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal, mask=mask, slot_mask=slot_mask, dropout=dropout, softcap=softcap, sink_logits=s_aux,
        need_weights=need_weights,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), weights


def eab_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, local_size=None,
    allow_is_causal_skip=True, use_vmap=False, device="cpu", config=None, **kwargs,
):  # fmt: skip
    """The mask function that goes with it: bool (B, 1, T, n + S), slots first, or None where plain causal is right.

    In a row with P padding tokens on its left, the prefix would have stood at P .. P+n-1 and text token i at i + n. The
    model's own `mask_function` is asked about those places, so windows, chunks and what comes next need no code here.
    """
    n, always = config.eab["n_slots"], config.eab["slots_visible"] == "always"
    if not getattr(config, "is_causal", True):
        raise ValueError(
            "slots need causal attention: is_causal=False in the config would make this model bidirectional"
        )
    if use_vmap or (q_length > 1 and not allow_is_causal_skip):
        # A rule that looks tokens up (which image, which document) must not be asked about place i + n.
        raise ValueError(
            "slots do not support masks that group tokens (packed sequences, token_type_ids of images, custom mask "
            "functions): pass plain text with a 2-D attention_mask"
        )

    def shifted(batch, head, q, kv):
        return mask_function(batch, head, q + n, kv + n)

    text = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset,
        mask_function=shifted,
        attention_mask=attention_mask,
        # The window must hold the text and the prefix for the mask to be skipped.
        local_size=local_size if local_size is None or always else local_size - n,
        allow_is_causal_skip=allow_is_causal_skip,
        device=device,
    )  # fmt: skip
    if text is None:
        return None
    if always:
        return torch.cat([text.new_ones(*text.shape[:-1], n), text], dim=-1)
    if attention_mask is None:
        padding = torch.zeros(batch_size, dtype=torch.long, device=device)
    else:
        padding = (attention_mask.long().cumsum(dim=-1) == 0).sum(dim=-1)

    def slots(batch, head, q, slot):
        return mask_function(batch, head, q + n, padding[batch] + slot)

    slot_mask = sdpa_mask(
        batch_size, q_length, n, q_offset, 0, mask_function=slots, allow_is_causal_skip=False, device=device
    )
    return torch.cat([slot_mask.expand(*text.shape[:-1], n), text], dim=-1)


for _wanted, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, functools.partial(eab_attention, need_weights=_wanted == "eager"))
    AttentionMaskInterface.register(_name, eab_mask)


# ---- installation


def _guard_site(n: int, config, site, args, kwargs):
    """Forward pre-hook of each site: no call without its slots; queries scaled by place are scaled for place + n."""
    for asked in (config, getattr(site, "config", config)):
        if asked._attn_implementation not in IMPLEMENTATIONS.values():
            raise ValueError(
                f"attention implementation {asked._attn_implementation!r} would leave out the slots of this model: "
                "use set_attn_implementation('sdpa') or 'eager'"
            )
    if (scale := own_query_scale(n, site, args, kwargs)) is not None:
        kwargs = {**kwargs, "query_scale": scale}
    return args, kwargs


def find_trunk(model: PreTrainedModel, sites) -> tuple[str, PreTrainedModel]:
    """The model inside `model` within which the site names are valid, and its name ('' for `model` itself)."""
    first = next(iter(sites))
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            try:
                module.get_submodule(first)
            except AttributeError:
                continue
            return name, module
    raise ValueError(f"{type(model).__name__} has no attention site named {first!r}")


def install(model: PreTrainedModel, eab: dict) -> list:
    """Put empty slots into every site of `model` and hook them up; returns the hooks' handles.

    Sets `config.eab` on the trunk's config. The attention implementation must be set by the caller.
    """
    n = eab["n_slots"]
    _, trunk = find_trunk(model, eab["sites"])
    trunk.config.eab = eab
    handles = []
    for name, (kv_heads, key_dim, value_dim) in eab["sites"].items():
        site = trunk.get_submodule(name)
        site.attention_bias = Slots(n, kv_heads, key_dim, value_dim)
        guard = functools.partial(_guard_site, n, trunk.config)
        handles.append(site.register_forward_pre_hook(guard, with_kwargs=True))
    names = list(inspect.signature(trunk.forward).parameters)
    shift = functools.partial(shift_positions, n, names)
    handles.append(trunk.register_forward_pre_hook(shift, with_kwargs=True))
    return handles


def require_slots(model: nn.Module) -> None:
    """Raise unless the model has slots and all of them that are in memory are finite."""
    slots = [(name, module) for name, module in model.named_modules() if isinstance(module, Slots)]
    if not slots:
        raise ValueError(f"{type(model).__name__} has no slots of this runtime")
    for name, module in slots:
        for part, tensor in module.named_parameters():
            if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{name}.{part} is missing from the checkpoint or not finite: the slots of this model are lost"
                )


class AttentionBiasMixin:
    """Mixed into a model class of transformers, it makes the class load and run with slots."""

    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        install(self, config.eab)
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) | {"attention_bias"}

    def initialize_weights(self):
        # transformers initialises what a checkpoint lacks through each inner model's own class, which knows no slots:
        # they would stay uninitialised memory.
        super().initialize_weights()
        for module in self.modules():
            for slot in module.parameters() if isinstance(module, Slots) else ():
                if not slot.is_meta and not getattr(slot, "_is_hf_initialized", False):
                    slot.data.fill_(float("nan"))

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        wanted = "sdpa" if attn_implementation is None else attn_implementation
        wanted = IMPLEMENTATIONS.get(wanted, wanted)
        if wanted not in IMPLEMENTATIONS.values():
            raise ValueError(
                f"attention implementation {attn_implementation!r} has no version with slots; "
                f"use one of {sorted(IMPLEMENTATIONS)}"
            )
        return wanted

    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        return self._check_and_adjust_attn_implementation(requested_attention)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if any(kwargs.get(name) is not None for name in PARALLEL_ARGUMENTS):
            raise ValueError("tensor parallelism has no plan for slots yet: load with device_map instead")
        loaded = super().from_pretrained(*args, **kwargs)
        require_slots(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


def inherit_conversions(derived: type, base: type, derived_type: str, base_type: str) -> None:
    """Give a derived model type the tensor renames and fusions that transformers applies to its base when loading.

    transformers looks them up by class name and by model type, and skips custom code that has not registered its own.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    for name, source in ((derived.__name__, base.__name__), (derived_type, base_type)):
        mapping = get_checkpoint_conversion_mapping(source)
        if mapping is not None and get_checkpoint_conversion_mapping(name) is None:
            register_checkpoint_conversion_mapping(name, mapping)
