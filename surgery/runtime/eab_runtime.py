"""Explicit attention bias (EAB) at run time: slots in every attention site of a causal language model.

A converted checkpoint was folded from a prefix of n tokens: the keys and values that the prefix has in every layer are
constants, and are stored as slots. The text sits at positions n, n+1, ... as it did after the prefix, and a slot is
visible to a query exactly where the model's own mask would have shown it the prefix token. Three things do this:

* `Slots`, a module in each site that holds its slots (n may be 0: then nothing moves, and masks are the model's own);
* an attention function and a mask function, registered with transformers under the names in `IMPLEMENTATIONS`;
* a forward hook on the trunk (the innermost model that contains all sites) that shifts positions by n.

`config.eab` describes what is installed: `n_slots`, `slots_visible` ("as_prefix" or "always"), `trunk`, the name of the
trunk's class, and `sites`, which maps the name of each site in it to [kv_heads, key_dim, value_dim]. `mixers` are those
modules beside the sites that hand a state from token to token (`eab_mixers`), `indexers` those that choose what sparse
attention sees (`eab_indexer`). Where needed, `max_length` bounds the positions on which the fold is exact, and
`whole_mask` says that the model's code cannot do without a mask; `sees_all`, that every query sees every slot, and no
position moves: the trunk is an encoder.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .eab_added import Added, require_added
from .eab_indexer import install_indexers
from .eab_kernel import plain_attention, slot_attention
from .eab_masks import biased, eab_mask, selected, slots_and_text
from .eab_mixers import install_mixers
from .eab_positions import number_text, scale_queries, shift_positions

# What a user may ask for, and the name under which we register our version of it.
IMPLEMENTATIONS = {"sdpa": "eab", "eager": "eab_eager", "flex_attention": "eab_flex"}
NAMES = frozenset(IMPLEMENTATIONS.values())
# Tensors that callers hand through the attention interface and that do not change plain attention.
HARMLESS_TENSORS = {"position_ids", "num_items_in_batch", "cache_position", "labels"}

ENCODER = {"sees_all": True}  # what a model beside an encoder is taken for: its sites have no slots

# Modules whose parameters stay float32.
HELD = {"attention_bias", "remembered_inputs", "index_keys"}

# Arguments of `from_pretrained` that would split the model over devices by tensor.
PARALLEL_ARGUMENTS = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


class Slots(Added):
    """The slots of one site: key (n, kv_heads, key_dim), value (n, kv_heads, value_dim), as if rotary was applied.
    `shown`: attention weights that a caller asks for have columns for them too. `sees_all`: in an encoder."""

    key: Tensor
    value: Tensor
    shown = False

    def __init__(self, n_slots: int, kv_heads: int, key_dim: int, value_dim: int, sees_all: bool = False):
        super().__init__()
        self.sees_all = sees_all
        for name, dim in (("key", key_dim), ("value", value_dim)):
            if n_slots:
                self.add_parameter(name, n_slots, kv_heads, dim)
            else:  # no checkpoint holds tensors of nothing
                self.register_buffer(name, torch.empty(0, kv_heads, dim, dtype=torch.float32), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value


# ---- attention and mask, called by every site through transformers' interfaces


def eab_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, query_scale: Tensor | None = None, logit_bias: Tensor | None = None,
    indices: Tensor | None = None, need_weights: bool = False, flex: bool = False, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The attention function of a site with slots, in the calling convention of `ALL_ATTENTION_FUNCTIONS`.

    query (B, Hq, T, D), key (B, H, S, D), value (B, H, S, E) -> output (B, T, Hq, E) and weights (B, Hq, T, S) or None;
    (B, Hq, T, n + S), slots first, where slots are `shown`. `logit_bias` (B or 1, Hq, 1, n + S), slots first, is added
    to the scaled logits (ALiBi). `indices` (B, T, k) are the places, slots first, that an indexer has chosen for each
    query. A site with a `head_norm` (`eab_head_norm`) has its output normed here, before the model's own code sees it.
    """
    if unknown := [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in HARMLESS_TENSORS]:
        raise ValueError(f"attention with slots does not know the argument {unknown[0]!r} and will not ignore it")
    if not hasattr(module, "attention_bias") and getattr(module.config, "eab", ENCODER).get("sees_all", False):
        return plain_attention(module, query, key, value, attention_mask, dropout, scaling, is_causal, need_weights)
    if module.attention_bias.sees_all is (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(
            "slots of a prefix are for causal attention only, as none is constant without, and an encoder's for none"
        )
    if query_scale is not None:
        query = (query * query_scale).to(query.dtype)
    slot_key, slot_value = module.attention_bias()
    n = slot_key.shape[0]
    if indices is not None:
        attention_mask = selected(attention_mask, indices, n + key.shape[2])
    all_seen: bool = module.attention_bias.sees_all
    slot_mask, mask = (None, attention_mask) if all_seen else slots_and_text(attention_mask, n, key.shape[2])
    queries, keys = query.shape[2], key.shape[2]
    causal = mask is None and queries > 1 and not all_seen
    if getattr(attention_mask, "eab_first_keys", False):
        causal, mask, slot_mask = True, None, None
        key, value = key[:, :, :queries], value[:, :, :queries]
    elif causal and keys > queries:  # the model has dropped all queries but the last (Gemma 4, `logits_to_keep`)
        causal, mask = False, torch.ones(queries, keys, dtype=torch.bool, device=key.device).tril(keys - queries)
        mask = mask[None, None]
    if logit_bias is not None:
        mask, slot_mask, causal = biased(logit_bias, n, key.shape[2], mask, slot_mask, causal)
    out, weights = slot_attention(
        query, key, value, slot_key, slot_value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal, mask=mask, slot_mask=slot_mask, dropout=dropout, softcap=softcap, sink_logits=s_aux,
        need_weights=need_weights, slot_weights=module.attention_bias.shown, flex=flex,
    )  # fmt: skip
    out = out.transpose(1, 2).contiguous()
    return module.head_norm(out) if hasattr(module, "head_norm") else out, weights


for _wanted, _name in IMPLEMENTATIONS.items():
    _attend = functools.partial(eab_attention, need_weights=_wanted == "eager", flex=_wanted == "flex_attention")
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, eab_mask)


# ---- installation


def _guard_site(config: PreTrainedConfig, site: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of each site, called for each token that is generated: no call without its slots."""
    own: Any = getattr(site, "config", config)
    for asked in (config,) if own is config else (config, own):
        if asked._attn_implementation_internal not in NAMES:
            raise ValueError(
                f"attention implementation {asked._attn_implementation!r} would leave out the slots and norms of this "
                f"model: set_attn_implementation takes {', '.join(IMPLEMENTATIONS)}"
            )


def find_trunk(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The model inside `model`, or itself, whose class is or derives from one named `kind`."""
    for module in model.modules():
        if any(base.__name__ == kind for base in type(module).__mro__):
            return cast(PreTrainedModel, module)
    raise ValueError(f"{type(model).__name__} has no {kind} inside, where its slots would live")


def install(model: PreTrainedModel, eab: dict[str, Any], adapter: Any = None) -> contextlib.ExitStack:
    """Put empty slots into every site of `model` and hook them up; closing what is returned takes them out again.

    Sets `config.eab` on the trunk's config. The attention implementation must be set by the caller. `adapter` is that
    of `eab_families` for a family whose attention does not go through transformers' interface by itself.
    """
    n = eab["n_slots"]
    trunk = find_trunk(model, eab["trunk"])
    undo = contextlib.ExitStack()
    undo.callback(_put_back, trunk.config, getattr(trunk.config, "eab", None))
    trunk.config.eab = eab
    if adapter is not None:
        undo.enter_context(adapter.bring_onto_seam(trunk))
    for name, (kv_heads, key_dim, value_dim) in eab["sites"].items():
        site = trunk.get_submodule(name)
        site.attention_bias = Slots(n, kv_heads, key_dim, value_dim, eab.get("sees_all", False))
        undo.callback(delattr, site, "attention_bias")
        guard = functools.partial(_guard_site, trunk.config)
        undo.callback(site.register_forward_pre_hook(guard).remove)
        if n and hasattr(site, "attn_temperature_tuning"):
            scale = functools.partial(scale_queries, n)
            undo.callback(site.register_forward_pre_hook(scale, with_kwargs=True).remove)
    if n and not eab.get("sees_all", False):
        undo.enter_context(install_mixers(trunk, n, eab.get("mixers", {})))
        undo.enter_context(install_indexers(trunk, n, eab.get("indexers", {})))
        _move_text(model, trunk, n, eab.get("max_length"), undo)
    return undo


def _move_text(
    model: PreTrainedModel, trunk: PreTrainedModel, n: int, max_length: int | None, undo: contextlib.ExitStack
) -> None:
    """Hooks that put the text after n places."""
    names = list(inspect.signature(trunk.forward).parameters)
    if "position_ids" in names:  # without them positions are relative, and after a prefix the same
        shift = functools.partial(shift_positions, n, max_length, names)
        undo.callback(trunk.register_forward_pre_hook(shift, with_kwargs=True).remove)
    # A wrapper that finds places of images itself (M-RoPE) numbers its text with them.
    if model.config is not trunk.config and not any(hasattr(part, "get_rope_index") for part in model.modules()):
        names = list(inspect.signature(model.forward).parameters)
        if {"position_ids", "attention_mask"} <= set(names):
            number = functools.partial(number_text, names)
            undo.callback(model.register_forward_pre_hook(number, with_kwargs=True).remove)


def _put_back(config: PreTrainedConfig, eab: dict[str, Any] | None) -> None:
    if eab is None:
        del config.eab
    else:
        config.eab = eab


if TYPE_CHECKING:
    Mixed = PreTrainedModel  # what the mixins stand in front of; they derive from no model themselves
else:
    Mixed = object


class AttentionBiasMixin(Mixed):
    """Mixed into a model class of transformers, it makes the class load and run with slots."""

    _supports_flash_attn = False
    _supports_flex_attn = True
    adapter: Any = None  # of eab_families, for a family that needs one

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        asked = config._attn_implementation
        super().__init__(config, *args, **kwargs)
        if not any(isinstance(module, Slots) for module in self.modules()):  # AutoModel may have built the trunk with
            install(self, config.eab, self.adapter)
        # Inner models, which know no slots, may have written their own choice into the config they share or keep.
        for held in (config, find_trunk(self, config.eab["trunk"]).config):
            held._attn_implementation_internal = self._check_and_adjust_attn_implementation(asked)
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) | HELD

    def initialize_weights(self) -> None:
        # transformers initialises what a checkpoint lacks through each inner model's own class, which knows no slots:
        # they would stay uninitialised memory.
        # And it takes no class outside of it to look at what is filled already, and passes over modules (Falcon-H1's
        # trunk fills buffers of its blocks). The code that fills is its own here.
        self.is_custom_code = lambda: False  # type: ignore[method-assign]
        try:
            super().initialize_weights()  # type: ignore[no-untyped-call]
        finally:
            del self.is_custom_code
        for module in self.modules():
            for added in module.parameters() if isinstance(module, Added) else ():
                if not added.is_meta and not getattr(added, "_is_hf_initialized", False):
                    added.data.fill_(float("nan"))

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, allow_all_kernels: bool = False,
        **kwargs: Any,
    ) -> str:  # fmt: skip
        wanted = "sdpa" if attn_implementation is None else attn_implementation
        wanted = IMPLEMENTATIONS.get(wanted, wanted)
        if wanted not in IMPLEMENTATIONS.values():
            raise ValueError(
                f"attention implementation {attn_implementation!r} has no version with slots; "
                f"use one of {sorted(IMPLEMENTATIONS)}"
            )
        if is_init_check and self.adapter is not None:
            return "eager"  # some of these families choose an attention class by this name while they are built
        return wanted

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        return self._check_and_adjust_attn_implementation(requested_attention)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @contextlib.contextmanager
    def slot_attentions(self) -> Iterator[None]:
        """Inside, `output_attentions` has columns for the slots, in front: (B, Hq, T, n + S), as after the prefix."""
        with contextlib.ExitStack() as undo:
            for module in self.modules():
                if isinstance(module, Slots):
                    undo.callback(setattr, module, "shown", module.shown)
                    module.shown = True
            yield

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name) is not None for name in PARALLEL_ARGUMENTS):
            raise ValueError("tensor parallelism has no plan for slots yet: load with device_map instead")
        loaded = super().from_pretrained(*args, **kwargs)
        require_added(loaded[0] if isinstance(loaded, tuple) else loaded)
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
