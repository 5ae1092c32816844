"""Families whose attention does not go through transformers' AttentionInterface (the seam), brought onto it.

A class here is mixed in front of the family's attention class. It overrides the one method in which that computes
attention, and calls `attend` there with what the family computes: query, key, value, mask, scale, and a bias on the
logits where it has one (ALiBi). Everything else, weights and cache included, stays the family's own; `self` is that
class too, and so of type Any.

To add a family, enter its model type in `ADAPTERS` (below), with a class from here: one may serve several types.

* Take the innermost class whose own method computes softmax(QK^T)V; one call of it must be one attention.
* Override that method, or its `_attn` where there is one. Keep the names under which its caller passes things, let
  `**kwargs` take the rest, and let `attend` replace what lies between the key/value cache and the output. Pass the mask
  on as it comes: bool (B, 1, T, n + S), True where visible, slots first, or None for plain causal.
* Return what the native method returns, in its layout: `attend` gives (B, T, H, D).
* Leave out cross-attention: a config that asks for it is refused before. The cache may be an `EncoderDecoderCache`.
* A bias by place (ALiBi) is computed over slots and keys from `places`, in the family's own rounding.

`surgery run --no-verify` on a small model shows whether it is right: plain, padded and cached, the fold is compared
with original + prefix before anything is written. In the tests, a row of `families.yaml` holds it to that.

Notation: B batch, H heads, T queries, S keys, D head dim, n slots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .eab_added import put_in_front
from .eab_positions import places, slot_count

Attended = tuple[Tensor, Tensor | None]  # output and weights; these are None unless the implementation is eager


def attend(
    site: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention through the interface: query (B, H, T, D), key, value (B, H or fewer, S, D) -> (B, T, H, D), weights.

    `scale` multiplies the logits; `bias` (B or 1, H, 1, n + S) is added to the product. `dropout` is a probability, and
    counts in training only. `site.config` is the trunk's config where the family's class keeps none.
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(site.config._attn_implementation, None)  # type: ignore[arg-type]
    if function is None:
        raise ValueError(
            f"attention implementation {site.config._attn_implementation!r} is not one that {type(site).__name__} "
            "with slots can use"
        )
    dropout = dropout if site.training else 0.0
    extra = {} if bias is None else {"logit_bias": bias}
    found: Attended = function(site, query, key, value, mask, dropout=dropout, scaling=scale, **extra)
    return found


# ---- ALiBi: the bias of a key is its place times the slope of the head; a slot carries its own distance


class Bloom:
    def forward(
        self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None,
        layer_past: Any = None, use_cache: bool = False, output_attentions: bool = False, **kwargs: Any,
    ) -> Attended:  # fmt: skip
        from transformers.models.bloom.modeling_bloom import build_alibi_tensor, dropout_add

        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        slopes = build_alibi_tensor(torch.ones(1, 2, device=key.device), self.num_heads, torch.float32)[:, :, 1:]
        place = places(attention_mask, slot_count(self), key.shape[2], key.device)
        bias = (slopes * place[:, None, None]).to(query.dtype)  # rounded as Bloom rounds it
        out, weights = attend(
            self, query, key, value, attention_mask, self.inv_norm_factor, bias, self.attention_dropout.p
        )
        return dropout_add(self.dense(out.flatten(2)), residual, self.hidden_dropout, self.training), weights


class Falcon:
    """Rotary or ALiBi, by config. With its `use_alibi` off, the trunk writes no ALiBi over the mask of the slots."""

    def forward(
        self: Any, hidden_states: Tensor, alibi: Tensor | None, attention_mask: Tensor | None,
        position_ids: Tensor | None = None, layer_past: Any = None, use_cache: bool = False,
        output_attentions: bool = False, position_embeddings: Any = None, **kwargs: Any,
    ) -> Attended:  # fmt: skip
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb, build_alibi_tensor

        query, key, value = (part.transpose(1, 2) for part in self._split_heads(self.query_key_value(hidden_states)))
        if not self.config.alibi:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        bias = None
        if self.config.alibi:
            slopes = build_alibi_tensor(torch.ones(1, 2, device=key.device), self.num_heads, torch.bfloat16)[:, :, 1:]
            place = places(attention_mask, slot_count(self), key.shape[2], key.device)
            # Falcon multiplies in bfloat16: beyond 256 places this rounds, and a slot must round as the prefix did.
            bias = (slopes * place[:, None, None]).to(query.dtype) * self.inv_norm_factor
        dropout = self.attention_dropout.p if self.config.alibi else 0.0  # as Falcon does
        out, weights = attend(self, query, key, value, attention_mask, self.inv_norm_factor, bias, dropout)
        return self.dense(out.flatten(2)), weights


class Mpt:
    def forward(
        self: Any, hidden_states: Tensor, position_bias: Tensor, past_key_values: Any = None,
        attention_mask: Tensor | None = None, **kwargs: Any,
    ) -> Attended:  # fmt: skip
        from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        heads = (self.n_heads, self.head_dim)
        query, key, value = (part.unflatten(-1, heads).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        slopes = -build_mpt_alibi_tensor(self.n_heads, 2, device=key.device)[:, :, :1]  # of places -1, 0
        place = places(attention_mask, slot_count(self), key.shape[2], key.device)
        bias = slopes * (place - place[:, -1:])[:, None, None]  # MPT counts back from the last key
        out, weights = attend(self, query, key, value, attention_mask, self.softmax_scale, bias, self.attn_dropout_p)
        return self.out_proj(out.flatten(2)), weights


# ---- positions from the trunk


class GPTJ:
    """GPT-J and CodeGen. They compute logits in float32 whatever the weights are."""

    def _scale(self: Any) -> float:
        scale: float = 1 / self.scale_attn
        return scale

    def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Attended:
        narrow = value.dtype
        query, key, value = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (query, key, value))
        out, weights = attend(self, query, key, value, attention_mask, self._scale(), dropout=self.attn_dropout.p)
        return out.transpose(1, 2).to(narrow), weights


class GPTNeo(GPTJ):
    """Every other layer is local: a window over places, of which the trunk's mask knows nothing."""

    def _scale(self: Any) -> float:
        return 1.0

    def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Attended:
        if self.attention_type == "local":
            attention_mask = self._windowed(attention_mask, query.shape[2], key.shape[2], query.device)
        return super()._attn(query, key, value, attention_mask)

    def _windowed(self: Any, mask: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
        n = slot_count(self)
        place = places(mask, n, keys, device)[:, None, None]  # (B, 1, 1, n + S)
        if mask is None:
            first = 0 if queries > 1 else keys - 1
            own = n + first + torch.arange(queries, device=device).view(1, 1, -1, 1)
            mask = place <= own
        else:  # a query stands where the last key that it sees stands
            own = torch.where(mask, place, -1).amax(dim=-1, keepdim=True)
        near: Tensor = own - place < self.config.window_size
        if n and self.config.eab["slots_visible"] == "always":
            near[..., :n] = True
        return mask & near


class GPTNeoXJapanese:
    def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Attended:
        scale, dropout = 1 / self.norm_factor, self.attention_dropout.p
        out, weights = attend(self, query, key, value, attention_mask, scale, dropout=dropout)
        return out.transpose(1, 2), weights


class OpenAIGPT:
    """No cache, and a mask of its own: additive (B, 1, 1, S) for padding, or None, beside a triangle in the site."""

    def _attn(
        self: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> list[Tensor | None]:  # fmt: skip
        if attention_mask is not None:
            real = attention_mask >= 0
            text = real & torch.ones(q.shape[2], k.shape[3], dtype=torch.bool, device=q.device).tril()
            slots = text.new_ones(*text.shape[:3], slot_count(self))
            attention_mask = torch.cat([slots, text], dim=-1)
        scale = v.shape[-1] ** -0.5 if self.scale else 1.0
        out, weights = attend(self, q, k.transpose(2, 3), v, attention_mask, scale, dropout=self.attn_dropout.p)
        return [out.transpose(1, 2), weights]


def projected(
    projections: Iterable[Any], hidden_states: Tensor, head_dim: int, cache: Any, layer_idx: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, T, D) of this call, key and value (B, H, S, D) with what the cache holds."""
    query, key, value = (
        project(hidden_states).unflatten(-1, (-1, head_dim)).transpose(1, 2) for project in projections
    )
    if cache is not None:
        key, value = getattr(cache, "self_attention_cache", cache).update(key, value, layer_idx)
    return query, key, value


class Bert:
    """RemBERT and Megatron-BERT, as decoders."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None,
        **kwargs: Any,
    ) -> Attended:  # fmt: skip
        projections, head_dim = (self.query, self.key, self.value), self.attention_head_size
        states = projected(projections, hidden_states, head_dim, past_key_values, self.layer_idx)
        out, weights = attend(self, *states, attention_mask, head_dim**-0.5, dropout=self.dropout.p)
        return out.flatten(2), weights


class XGLM:
    def forward(
        self: Any, hidden_states: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Attended:  # fmt: skip
        projections = (self.q_proj, self.k_proj, self.v_proj)
        states = projected(projections, hidden_states, self.head_dim, past_key_values, self.layer_idx)
        out, weights = attend(self, *states, attention_mask, self.scaling, dropout=self.dropout)
        return self.out_proj(out.flatten(2)), weights


@dataclass(frozen=True)
class Adapter:
    """How one family gets onto the seam.

    Args:
        site: name of the family's attention class, exactly.
        mixin: the class above that goes in front of it.
        whole_mask: the model's code looks into the mask, and cannot do with None where attention is plain causal.
        trunk_settings: attributes to set on the trunk, where its code would otherwise get in the way.
    """

    site: str
    mixin: type
    whole_mask: bool = False
    trunk_settings: Mapping[str, object] = field(default_factory=dict)

    def bring_onto_seam(self, model: PreTrainedModel) -> contextlib.ExitStack:
        """Put the mixin in front of every site in `model`; closing what is returned undoes it."""
        undo = contextlib.ExitStack()
        if self.site not in (kinds := {type(module).__name__ for module in model.modules()}):
            named = ", ".join(sorted(kind for kind in kinds if "Attention" in kind))
            raise ValueError(
                f"the adapter is for a class {self.site}, which this model does not have (it has: {named})"
            )
        for module in model.modules():
            if type(module).__name__ == self.site:
                self._adapt(module, model.config, undo)
            for name, setting in self.trunk_settings.items():
                if hasattr(module, name):
                    undo.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, setting)
        return undo

    def _adapt(self, module: Any, config: PreTrainedConfig, undo: contextlib.ExitStack) -> None:
        put_in_front(module, self.mixin, undo)
        if not hasattr(module, "config"):
            module.config = config
            undo.callback(delattr, module, "config")


ADAPTERS: dict[str, Adapter] = {
    "bloom": Adapter("BloomAttention", Bloom),
    "codegen": Adapter("CodeGenAttention", GPTJ),
    "falcon": Adapter("FalconAttention", Falcon, whole_mask=True, trunk_settings={"use_alibi": False}),
    "gpt_neo": Adapter("GPTNeoSelfAttention", GPTNeo),
    "gpt_neox_japanese": Adapter("GPTNeoXJapaneseAttention", GPTNeoXJapanese),
    "gptj": Adapter("GPTJAttention", GPTJ),
    "megatron-bert": Adapter("MegatronBertSelfAttention", Bert),
    "mpt": Adapter("MptAttention", Mpt, whole_mask=True),
    "openai-gpt": Adapter("Attention", OpenAIGPT),
    "rembert": Adapter("RemBertSelfAttention", Bert),
    "xglm": Adapter("XGLMAttention", XGLM),
}
