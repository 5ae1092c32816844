"""Positions of a text that stands after a folded prefix: the caller counts from 0, the model from n.

Keys and learned position embeddings of the prefix belong to positions 0 .. n-1, so text token i has to be computed at
n + i. `shift_positions` does that at the trunk (the innermost model that contains all sites); where the caller gives no
positions they are derived first, from the attention mask or from the length of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def _inputs(kwargs: dict[str, Any]) -> Tensor:
    """What a forward is given of the text: ids (B, T), or embeddings (B, T, d) in their place."""
    given: Tensor = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    return given


def text_positions(kwargs: dict[str, Any]) -> Tensor:
    """Positions of the text in the numbering of its caller, which starts at 0: (B or 1, T), from a forward's arguments.

    A 2-D attention mask decides where there is one, so that left padding does not move a row; else the cache's length.
    """
    attention_mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    length, device = _inputs(kwargs).shape[1], _inputs(kwargs).device
    past = 0 if cache is None else cache.get_seq_length()
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return (torch.arange(length, device=device) + past).unsqueeze(0)
    counted = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0).to(device)
    if isinstance(past, Tensor):  # a static cache: its length is data, and slicing by data cannot be compiled
        return counted.index_select(1, past.to(device) + torch.arange(length, device=device))
    if counted.shape[1] < past + length:
        raise ValueError(
            f"attention_mask covers {counted.shape[1]} tokens, but {past} are cached and {length} are given: "
            "it must cover both"
        )
    return counted[:, past : past + length]


def _refuse_packing(positions: Tensor) -> None:
    """Packed sequences (positions that start again, no mask) would need slots at each start: refuse them.

    While a model is traced there are no values to look at: then what comes of it looks, and raises RuntimeError.
    """
    if positions.ndim != 2:
        return
    said = "packed sequences are not supported with slots: pass an attention_mask, one sequence per row"
    counted = positions[:, :1] + torch.arange(positions.shape[1], device=positions.device)
    plain = (positions == counted).all()
    if torch.compiler.is_compiling():
        torch._assert_async(plain, said)
    elif not bool(plain):
        raise ValueError(said)


def number_text(
    names: list[str], wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Forward pre-hook of a multimodal wrapper: positions from its 2-D attention mask, in the numbering of its caller.

    Wrappers hand their language model expanded masks, from which padding can no longer be told.
    """
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and isinstance(mask, Tensor) and mask.ndim == 2:
        kwargs["position_ids"] = text_positions(kwargs)
    return (), kwargs


def shift_positions(
    n: int, max_length: int | None, names: list[str], trunk: PreTrainedModel, args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[()], dict[str, Any]]:  # fmt: skip
    """Forward pre-hook of the trunk: position_ids + n, derived first where the caller gave none.

    `names` are the parameters of the trunk's forward, in order, for arguments given by position. ValueError where a
    position reaches `max_length`: rotary frequencies change there (dynamic NTK, LongRoPE), and the slots would not.
    """
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    mask, cache, positions = kwargs.get("attention_mask"), kwargs.get("past_key_values"), kwargs.get("position_ids")
    use_cache = getattr(trunk.config, "use_cache", False) if kwargs.get("use_cache") is None else kwargs["use_cache"]
    unmasked = mask is None and cache is None and not use_cache
    compiling = torch.compiler.is_compiling()
    if positions is None:
        positions = text_positions(kwargs)
    elif unmasked:
        _refuse_packing(positions)
    if unmasked and compiling:
        # transformers cannot look at values while tracing and would build a packed-sequence mask; ones prevent it.
        inputs = _inputs(kwargs)
        kwargs["attention_mask"] = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    kwargs["position_ids"] = positions = positions + n
    if max_length is not None and bool((positions >= max_length).any()):
        raise ValueError(
            f"this model was converted for texts of up to {max_length - n} tokens: its rotary embeddings change with "
            f"the length of the text beyond {max_length}, and its {n} slots were folded below that"
        )
    return (), kwargs


def own_query_scale(n: int, site: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """(1, 1, T, 1): what the queries of a site must be multiplied with if it scales them by its own count of tokens.

    Llama 4 does so in its layers without rotary; its count includes padding, as in the original. None for other sites.
    """
    if not getattr(site, "attn_temperature_tuning", False) or getattr(site, "use_rope", True):
        return None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length(site.layer_idx)
    place = torch.arange(hidden.shape[1], device=hidden.device) + past + 1.0

    def scale(at: Tensor) -> Tensor:
        scaled: Tensor = torch.log1p(torch.floor(at / site.floor_scale)) * site.attn_scale + 1.0
        return scaled

    return (scale(place + n) / scale(place)).view(1, 1, -1, 1)


def scale_queries(
    n: int, site: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of sites that scale queries by place: they are scaled for place + n."""
    scale = own_query_scale(n, site, args, kwargs)
    return None if scale is None else (args, {**kwargs, "query_scale": scale})


def slot_count(site: Any) -> int:
    """Slots of a site; 0 where none are installed."""
    n: int = site.attention_bias.key.shape[0] if hasattr(site, "attention_bias") else 0
    return n


def places(mask: Tensor | None, n: int, keys: int, device: torch.device) -> Tensor:
    """Where slots and keys stand, counted from the first of the prefix: (B or 1, n + keys).

    Slots at 0 .. n-1, the first real token of a row at n. `keys` left of it are padding, and get numbers below n.
    """
    index = torch.arange(keys, device=device).unsqueeze(0)
    if mask is not None:  # the last query sees every real token of its row, and argmax finds the first of them
        index = index - mask[:, 0, -1, n:].long().argmax(dim=-1, keepdim=True)
    slots = torch.arange(n, device=device).expand(index.shape[0], -1)
    return torch.cat([slots, n + index], dim=1)
