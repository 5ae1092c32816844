"""Attention with slots: softmax over the keys of the text and a few constant keys k', with constant values v'.

    Attention(Q, K, V; k', v') = softmax(Q [k'^T  K^T] * scale) [v' ; V]                (Sun et al. 2024, eq. 3)

Two paths compute it. They agree to rounding; the first needs no longer mask and no concatenated keys:

* merged: any flash kernel returns o = softmax(QK^T)V and its log-sum-exp L per query. With slot logits
  s_j = q.k'_j * scale and w = softmax([L, s_1 .. s_n]), the result is w_0 * o + sum_j w_j v'_j.
  Cost O(T n d) on top of the kernel.
  FlexAttention gives the same on GPUs (`eab_flex`). Of a single query all logits are written out instead.
* concatenated: slots are put in front of the keys and PyTorch does the rest. It carries gradients, dropout, soft-capped
  logits and attention weights, and runs on every device. Of causal attention it makes no mask, which would keep
  PyTorch from its flash kernels: with as many queries in front as there are slots, it is causal again.

Notation: B batch, Hq query heads, H key/value heads, T queries, S keys, D key dim, E value dim, n slots.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eab_flex import flexible


def slot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    need_weights: bool = False,
    slot_weights: bool = False,
    flex: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over text and slots in one softmax.

    Args:
        query: (B, Hq, T, D); key: (B, H, S, D); value: (B, H, S, E), Hq a multiple of H.
        slot_key: (n, H, D); slot_value: (n, H, E).
        scale: factor on every logit, slots included.
        causal: query i sees keys 0..i (needs S == T and no mask).
        mask: (B or 1, Hq or 1, T, S), bool (True: visible) or additive. None: all keys visible, unless `causal`.
        slot_mask: (B or 1, Hq or 1, T or 1, n), bool or additive. None: every slot visible to every query.
        dropout: probability on the attention weights. softcap: c * tanh(logits / c) before masking.
        sink_logits: (Hq,) learned logits that take a share of the softmax and give no value (GPT-OSS).
        need_weights: also return the weights over the S real keys, (B, Hq, T, S); their rows sum to less than 1.
        flex: take FlexAttention for the text, on whatever device, where nothing needs gradients or weights.
        slot_weights: those weights shall be over slots and keys, slots first, (B, Hq, T, n + S); rows sum to 1.

    Returns:
        (B, Hq, T, E) in the dtype of `query`, and the weights or None. A row that sees nothing at all stays finite.
    """
    if causal and (mask is not None or query.shape[2] != key.shape[2]):
        raise ValueError("causal=True needs as many keys as queries and no mask")
    if torch.is_autocast_enabled(query.device.type):  # what it would do to plain attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (states.to(dtype) for states in (query, key, value))
    low = torch.finfo(query.dtype).min
    if mask is not None and mask.dtype != torch.bool:
        # Kernels want the mask in the dtype of the query, and no -inf: a row of them has no log-sum-exp.
        mask = mask.to(query.dtype).clamp(min=low)
    if slot_mask is not None and slot_mask.dtype != torch.bool:
        slot_mask = slot_mask.to(query.dtype).clamp(min=low)
    plain = softcap is None and not need_weights
    one = query.shape[2] == 1 and query.dtype in (torch.float32, torch.float64)
    if plain and not dropout and not _needs_grad(query, key, value, slot_key, slot_value, mask):
        if one or flex or _has_kernel(query, value):
            inputs = (query, key, value, slot_key, slot_value, scale, causal, mask, slot_mask, sink_logits)
            merging = _of_one_query if one else functools.partial(_merged, flex=flex)
            if not torch.is_autocast_enabled(query.device.type):
                return merging(*inputs), None
            with torch.autocast(query.device.type, enabled=False):  # merged in the dtype of the log-sum-exp
                return merging(*inputs), None
    if not plain or sink_logits is not None:
        out, weights = _eager(
            query, key, value, slot_key, slot_value, scale, causal, mask, slot_mask, dropout, softcap, sink_logits
        )
        return out, (weights if slot_weights else weights[..., slot_key.shape[0] :]) if need_weights else None
    return _concatenated(query, key, value, slot_key, slot_value, scale, causal, mask, slot_mask, dropout), None


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None,
    is_causal: bool | None, need_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What a module without slots computes: of a decoder that shares its config with the encoder which has them."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out, weights = slot_attention(
        query, key, value, key.new_empty(0, key.shape[1], key.shape[3]), value.new_empty(0, *value.shape[1::2]),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        causal=causal and mask is None and query.shape[2] > 1, mask=mask, dropout=dropout, need_weights=need_weights,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), weights


def _concatenated(
    query: Tensor, key: Tensor, value: Tensor, slot_key: Tensor, slot_value: Tensor, scale: float, causal: bool,
    mask: Tensor | None, slot_mask: Tensor | None, dropout: float,
) -> Tensor:  # fmt: skip
    """PyTorch's attention over slots and keys; causal without a mask where every slot is visible."""
    extra = 0
    if slot_key.shape[0]:
        if causal and slot_mask is None:
            extra = slot_key.shape[0]
            query = F.pad(query, (0, 0, extra, 0))
        key, value, mask = _concatenate(query, key, value, slot_key, slot_value, causal and not extra, mask, slot_mask)
        causal = extra > 0
    out = F.scaled_dot_product_attention(
        query, _repeated(key, query), _repeated(value, query), attn_mask=mask, dropout_p=dropout, is_causal=causal,
        scale=scale,
    )  # fmt: skip
    return out[:, :, extra:]


def _needs_grad(*inputs: Tensor | None) -> bool:
    """The lse of the CPU's kernel never carries a gradient, so this is a question of requires_grad, not of training."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether a flash kernel returns its log-sum-exp here: the CPU's does."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def _merged(
    query: Tensor, key: Tensor, value: Tensor, slot_key: Tensor, slot_value: Tensor, scale: float, causal: bool,
    mask: Tensor | None, slot_mask: Tensor | None, sink_logits: Tensor | None, flex: bool,
) -> Tensor:  # fmt: skip
    out: Tensor
    if flex:
        out, lse = flexible(query, key, value, scale, causal, mask)
    else:  # this kernel refuses bool; of a row of -inf it would report lse = 0
        added = None if mask is None else _additive(mask, query.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=added, scale=scale
        )
    if not slot_key.shape[0] and sink_logits is None:
        return out
    return _with_slots(out, lse, query, slot_key, slot_value, scale, slot_mask, sink_logits)


def _of_one_query(
    query: Tensor, key: Tensor, value: Tensor, slot_key: Tensor, slot_value: Tensor, scale: float, causal: bool,
    mask: Tensor | None, slot_mask: Tensor | None, sink_logits: Tensor | None,
) -> Tensor:  # fmt: skip
    """While text is generated, what counts is how few operations there are: few logits, all of them written out.

    No key of the cache is copied, on any device. In half precision the logits would be rounded.
    """
    rows, heads, n = query.shape[0], key.shape[1], slot_key.shape[0]
    grouped = (query * scale).reshape(rows * heads, -1, query.shape[-1])  # (B H, G, D)
    keys, values = slot_key.to(query.dtype).permute(1, 2, 0), slot_value.to(query.dtype).transpose(0, 1)
    if rows > 1:
        keys, values = keys.repeat(rows, 1, 1), values.repeat(rows, 1, 1)  # (B H, D, n), (B H, n, E)
    by_head = (rows, query.shape[1], 1, -1)  # (B, Hq, 1, ..)
    to_slots = _masked((grouped @ keys).view(by_head), slot_mask)
    to_text = _masked((grouped @ key.flatten(0, 1).transpose(1, 2)).view(by_head), mask)
    terms = [to_slots, to_text]
    if sink_logits is not None:
        terms.append(sink_logits.to(query.dtype).view(1, -1, 1, 1).expand(rows, -1, -1, -1))
    weights = torch.softmax(torch.cat(terms, dim=-1), dim=-1).view(*grouped.shape[:2], -1)  # (B H, G, n + S ..)
    texts = weights[..., n : n + key.shape[2]] @ value.flatten(0, 1)
    return torch.baddbmm(texts, weights[..., :n], values).view(*query.shape[:3], value.shape[-1])


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """`logits`, lowest where `mask` hides them; what an additive one adds, added."""
    if mask is None:
        return logits
    low = torch.finfo(logits.dtype).min
    return logits.masked_fill(~mask, low) if mask.dtype == torch.bool else (logits + mask).clamp(min=low)


def _with_slots(
    out: Tensor, lse: Tensor, query: Tensor, slot_key: Tensor, slot_value: Tensor, scale: float,
    slot_mask: Tensor | None, sink_logits: Tensor | None,
) -> Tensor:  # fmt: skip
    """What a kernel says of the text alone, out (B, Hq, T, E) and lse (B, Hq, T), with slots in the same softmax."""
    heads, groups, wide = slot_key.shape[1], query.shape[1] // slot_key.shape[1], lse.dtype
    grouped = query.unflatten(1, (heads, groups))  # (B, H, G, T, D)
    # matmul, not einsum: the same sum in a tenth of the time. (1, H, 1, D, n) and (1, H, 1, n, E) broadcast.
    slots = (slot_key.to(wide) * scale).permute(1, 2, 0)[None, :, None]
    logits = grouped.to(wide) @ slots  # (B, H, G, T, n)
    logits = _masked(logits, None if slot_mask is None else _grouped_mask(slot_mask, heads))
    lse = lse.unflatten(1, (heads, groups)).unsqueeze(-1)  # (B, H, G, T, 1)
    terms = [lse, logits]
    if sink_logits is not None:
        terms.append(sink_logits.to(wide).view(1, heads, groups, 1, 1).expand_as(lse))
    weights = torch.softmax(torch.cat(terms, dim=-1), dim=-1)  # of all text, of each slot, of the sink
    from_slots = weights[..., 1 : 1 + slot_key.shape[0]] @ slot_value.to(wide).transpose(0, 1)[None, :, None]
    merged = torch.addcmul(from_slots, out.unflatten(1, (heads, groups)), weights[..., :1])
    return merged.flatten(1, 2).to(query.dtype)


def _eager(
    query: Tensor, key: Tensor, value: Tensor, slot_key: Tensor, slot_value: Tensor, scale: float, causal: bool,
    mask: Tensor | None, slot_mask: Tensor | None, dropout: float, softcap: float | None, sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every logit written out, softmax in float32 or wider; weights over slots and keys (B, Hq, T, n + S)."""
    keys, values, full_mask = _concatenate(query, key, value, slot_key, slot_value, causal, mask, slot_mask)
    wide = torch.promote_types(query.dtype, torch.float32)
    # In half precision the products of long vectors lose more than the softmax forgives: they are taken in float32.
    logits = query.to(wide) @ keys.to(wide).transpose(2, 3) * scale  # (B, Hq, T, n + S)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if full_mask is not None:
        low = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~full_mask, low) if full_mask.dtype == torch.bool else logits + full_mask
    if sink_logits is not None:
        sinks = sink_logits.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : keys.shape[2]].to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=dropout > 0)
    return weights @ values, weights


def _concatenate(
    query: Tensor, key: Tensor, value: Tensor, slot_key: Tensor, slot_value: Tensor, causal: bool, mask: Tensor | None,
    slot_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Slots in front: keys (B, Hq, n + S, D), values (B, Hq, n + S, E), mask (B|1, Hq|1, T, n + S) or None."""
    queries = query.shape[2]
    keys, values = _behind(slot_key, key, query), _behind(slot_value, value, query)
    if causal:
        mask = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None and slot_mask is None:
        return keys, values, None
    if mask is None:
        mask = torch.ones(1, 1, queries, key.shape[2], dtype=torch.bool, device=query.device)
    if slot_mask is None:
        slot_mask = torch.ones(1, 1, queries, slot_key.shape[0], dtype=torch.bool, device=query.device)
    if mask.dtype != slot_mask.dtype:
        mask, slot_mask = _additive(mask, query.dtype), _additive(slot_mask, query.dtype)
    shape = [max(a, b) for a, b in zip(mask.shape[:3], slot_mask.shape[:3], strict=True)]
    return keys, values, torch.cat([slot_mask.expand(*shape, -1), mask.expand(*shape, -1)], dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what to add to logits: 0 or finfo.min, rather than -inf; others as they are."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _grouped_mask(mask: Tensor, heads: int) -> Tensor:
    """(B|1, Hq|1, T, n) -> (B|1, H|1, G|1, T, n)."""
    return mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (heads, -1))


def _behind(slots: Tensor, states: Tensor, query: Tensor) -> Tensor:
    """(n, H, D) in front of (B, H, S, D), for every head of `query`: (B, Hq, n + S, D).

    Repeated before they are put together: of what is n longer than the text, `torch.export` cannot tell, for every
    length of the text, how it lies in memory.
    """
    slots = slots.to(states).transpose(0, 1).expand(states.shape[0], -1, -1, -1)
    return torch.cat([_repeated(slots, query), _repeated(states, query)], dim=2)


def _repeated(states: Tensor, query: Tensor) -> Tensor:
    """(B, H, S, D) -> (B, Hq, S, D): head h serves query heads h * groups ... h * groups + groups - 1."""
    groups = query.shape[1] // states.shape[1]
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)
