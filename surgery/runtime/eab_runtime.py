"""Explicit attention bias (EAB) at run time: slots in every attention site of a causal language model.

A converted checkpoint was folded from a prefix of n tokens: the keys and values which that prefix has in every layer are
constants, and are stored as slots. The text then sits at positions n, n+1, ... as it did behind the prefix, and a slot is
visible to a query exactly where the model's own mask would have shown it the prefix token. Three things do this:

* `Slots`, a module in each site that holds its slots;
* an attention function and a mask function, registered with transformers under the names in `IMPLEMENTATIONS`;
* a forward hook on the trunk (the innermost model that contains all sites) that shifts positions by n.

`config.eab` describes what is installed: `n_slots`, `slots_visible` ("as_prefix" or "always"), and `sites`, which maps the
name of each site within the trunk to [kv_heads, key_dim, value_dim].
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

# What a user may ask for, and the name under which we register our version of it.
IMPLEMENTATIONS = {"sdpa": "eab", "eager": "eab_eager"}

# Tensors that callers hand through the attention interface and that do not change plain attention.
HARMLESS_TENSORS = {"position_ids", "num_items_in_batch", "cache_position", "labels"}


class Slots(nn.Module):
    """The slots of one site: key (n, kv_heads, key_dim) and value (n, kv_heads, value_dim), as if rotary was applied."""

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
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = mask is None and query.shape[2] > 1
    if causal and not is_causal:
        raise ValueError("attention with slots is defined for causal attention only")
    if causal and key.shape[2] > query.shape[2]:  # an empty static cache: everything past the queries is still unwritten
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
    """The mask function that goes with it: bool (B, 1, T, n + S), slots first, or None where plain causal masking is right.

    In a row with P padding tokens on its left, the prefix would have stood at P .. P+n-1 and text token i at i + n. The
    model's own `mask_function` is asked about those places, so windows, chunks and what comes next need no code here.
    """
    n, always = config.eab["n_slots"], config.eab["slots_visible"] == "always"

    def shifted(batch, head, q, kv):
        return mask_function(batch, head, q + n, kv + n)

    text = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset,
        mask_function=shifted,
        attention_mask=attention_mask,
        # The window must hold the text and the prefix for the mask to be skipped.
        local_size=local_size if local_size is None or always else local_size - n,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap, device=device,
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
        batch_size, q_length, n, q_offset, 0, mask_function=slots, allow_is_causal_skip=False, use_vmap=use_vmap, device=device
    )
    return torch.cat([slot_mask.expand(*text.shape[:-1], n), text], dim=-1)


for _wanted, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, functools.partial(eab_attention, need_weights=_wanted == "eager"))
    AttentionMaskInterface.register(_name, eab_mask)


# ---- positions


def _seen(cache) -> int | torch.Tensor:
    return 0 if cache is None else cache.get_seq_length()


def text_positions(attention_mask, cache, batch: int, length: int, device) -> torch.Tensor:
    """Positions of the text in the numbering of its caller, which starts at 0: (batch or 1, length).

    A 2-D attention mask decides where there is one, so that left padding does not move a row; else the cache's length.
    """
    past = _seen(cache)
    if attention_mask is None or not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return (torch.arange(length, device=device) + past).unsqueeze(0)
    counted = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    if isinstance(past, torch.Tensor):  # a static cache: its length is data, and slicing by data cannot be compiled
        return counted.index_select(1, past.to(device) + torch.arange(length, device=device))
    if counted.shape[1] < past + length:
        raise ValueError(
            f"attention_mask covers {counted.shape[1]} tokens, but {past} are cached and {length} are given: it must cover both"
        )
    return counted[:, past : past + length]


def _refuse_packing(positions: torch.Tensor) -> None:
    """Packed sequences (positions that start again, no mask) would need slots at each start; say so instead of being wrong."""
    if positions.ndim == 2 and bool((positions.diff(dim=-1) != 1).any()):
        raise ValueError("packed sequences are not supported with slots: pass an attention_mask, one sequence per row")


def _shift_positions(n: int, names: list[str], trunk, args, kwargs):
    """Forward pre-hook of the trunk: position_ids + n, derived first where the caller gave none."""
    kwargs = {**dict(zip(names, args)), **kwargs}
    inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    mask, cache, positions = kwargs.get("attention_mask"), kwargs.get("past_key_values"), kwargs.get("position_ids")
    use_cache = getattr(trunk.config, "use_cache", False) if kwargs.get("use_cache") is None else kwargs["use_cache"]
    unmasked = mask is None and cache is None and not use_cache
    compiling = torch.compiler.is_compiling()
    if positions is None:
        positions = text_positions(mask, cache, inputs.shape[0], inputs.shape[1], inputs.device)
    elif unmasked and compiling:
        raise ValueError("pass an attention_mask along with position_ids when compiling a model with slots")
    elif unmasked:
        _refuse_packing(positions)
    if unmasked and compiling:
        # transformers cannot look at values while tracing and would build a packed-sequence mask; a mask of ones prevents it.
        kwargs["attention_mask"] = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    kwargs["position_ids"] = positions + n
    return (), kwargs


def _guard_site(n: int, config, site, args, kwargs):
    """Forward pre-hook of each site: no call without its slots, and queries scaled by position are scaled for position + n."""
    if config._attn_implementation not in IMPLEMENTATIONS.values():
        raise ValueError(
            f"attention implementation {config._attn_implementation!r} would leave out the slots of this model: "
            "use set_attn_implementation('sdpa') or 'eager'"
        )
    if getattr(site, "attn_temperature_tuning", False) and not getattr(site, "use_rope", True):
        # Llama 4 scales the queries of its layers without rotary by their own count of tokens, not by position_ids.
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length(site.layer_idx)
        place = torch.arange(hidden.shape[1], device=hidden.device) + past + 1.0

        def scale(at):
            return torch.log1p(torch.floor(at / site.floor_scale)) * site.attn_scale + 1.0

        kwargs = {**kwargs, "query_scale": (scale(place + n) / scale(place)).view(1, 1, -1, 1)}
    return args, kwargs


# ---- installation


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
    shift = functools.partial(_shift_positions, n, names)
    handles.append(trunk.register_forward_pre_hook(shift, with_kwargs=True))
    return handles


def require_slots(model: nn.Module) -> None:
    """Raise unless every slot that is in memory is finite."""
    for name, module in model.named_modules():
        if isinstance(module, Slots):
            for part, tensor in module.named_parameters():
                if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"{name}.{part} is missing from the checkpoint or not finite: the slots of this model are lost")


class AttentionBiasMixin:
    """Mixed into a model class of transformers, it makes the class load and run with slots."""

    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        install(self, config.eab)
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) | {"attention_bias"}

    def _init_weights(self, module):
        if isinstance(module, Slots):
            nn.init.constant_(module.key, float("nan"))
            nn.init.constant_(module.value, float("nan"))
        else:
            super()._init_weights(module)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        wanted = "sdpa" if attn_implementation is None else attn_implementation
        wanted = IMPLEMENTATIONS.get(wanted, wanted)
        if wanted not in IMPLEMENTATIONS.values():
            raise ValueError(
                f"attention implementation {attn_implementation!r} has no version with slots; use one of {sorted(IMPLEMENTATIONS)}"
            )
        return wanted

    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        return self._check_and_adjust_attn_implementation(requested_attention)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if kwargs.get("tp_plan") is not None or kwargs.get("distributed_config") is not None:
            raise ValueError("tensor parallelism has no plan for slots yet: load with device_map instead")
        loaded = super().from_pretrained(*args, **kwargs)
        require_slots(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


def inherit_conversions(derived: type, base: type, derived_type: str, base_type: str) -> None:
    """Give a derived model type the tensor renames and fusions that transformers applies to its base when loading.

    transformers looks them up by class name and by model type, and skips custom code that has not registered its own.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

    for name, source in ((derived.__name__, base.__name__), (derived_type, base_type)):
        mapping = get_checkpoint_conversion_mapping(source)
        if mapping is not None and get_checkpoint_conversion_mapping(name) is None:
            register_checkpoint_conversion_mapping(name, mapping)
