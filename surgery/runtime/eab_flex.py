"""Attention over the text by PyTorch's FlexAttention, which gives its log-sum-exp on GPUs too.

With it slots join the softmax of the text afterwards, and no key of the cache is copied at any step. On GPUs the kernel
is compiled the first time; elsewhere PyTorch writes all logits out (and says so), which is right and slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Place = Any  # an index, as a tensor: of the batch, of a query head, of a query, of a key


def flexible(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """query (B, Hq, T, D), key (B, H, S, D), value (B, H, S, E) -> output (B, Hq, T, E) and log-sum-exp (B, Hq, T).

    `mask` (B or 1, Hq or 1, T, S): bool (True: visible) or additive. `causal`: query i sees keys 0..i.
    """
    try:
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention
    except ImportError as error:
        raise ValueError("flex_attention with slots needs torch 2.9 or newer: use 'sdpa'") from error
    kernel: Any = flex_attention if query.device.type == "cpu" or torch.compiler.is_compiling() else _compiled()
    block_mask = _causal(query.shape[2], str(query.device)) if causal else None
    out, aux = kernel(
        query, key, value, score_mod=None if mask is None else _seen(mask, query), block_mask=block_mask, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return out, aux.lse


def _seen(mask: Tensor, query: Tensor) -> Callable[[Tensor, Place, Place, Place, Place], Tensor]:
    """What FlexAttention asks of each logit: hidden ones are lowest, not -inf, so that each row has a log-sum-exp."""
    rows = mask.expand(query.shape[0], query.shape[1], -1, -1)
    low = torch.finfo(query.dtype).min / 2  # compiled kernels multiply it by log2(e)

    def hide(logit: Tensor, row: Place, head: Place, at: Place, to: Place) -> Tensor:
        return torch.where(rows[row, head, at, to], logit, low)

    def add(logit: Tensor, row: Place, head: Place, at: Place, to: Place) -> Tensor:
        return (logit + rows[row, head, at, to]).clamp(min=low)

    return hide if mask.dtype == torch.bool else add


@functools.lru_cache(maxsize=4)
def _causal(length: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(row: Place, head: Place, at: Place, to: Place) -> Tensor:
        past: Tensor = at >= to
        return past

    return create_block_mask(seen, None, None, length, length, device=device)


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
