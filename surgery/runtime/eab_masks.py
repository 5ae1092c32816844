"""What a slot is visible to: the model's own mask, asked as if the prefix still stood in front of the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

Rule = Callable[..., Any]  # (batch, head, query, key), each a place -> whether the query sees the key
Sizes = tuple[int, int, int, int, int]  # batch, T, S, and the places at which queries and keys begin


def _written_out(rule: Rule, sizes: Sizes, device: torch.device) -> Tensor:
    """The mask (B, 1, T, S) of a rule, also where it is plain causal."""
    mask = sdpa_mask(*sizes, mask_function=rule, allow_is_causal_skip=False, device=device)
    assert mask is not None
    return mask


def _rule_by_place(
    mask_function: Rule, local_size: int | None, use_vmap: bool, sizes: Sizes, device: torch.device,
    config: PreTrainedConfig,
) -> Rule:  # fmt: skip
    """A rule that may be asked about place i + n; ValueError where `mask_function` groups tokens.

    A rule that looks tokens up (which image, which document) must not be asked so. Multimodal models hand one over with
    every text (Gemma 4), even where there is no image in it: then the plain rule, causal or with a window, says the
    same, and takes its place. A chunk is not compared: to some tokens it looks like a window.
    """
    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    plain = None if use_vmap or chunked else _without_groups(mask_function, local_size, sizes, device)
    q_length = sizes[1]
    if plain is None and q_length > 1:
        raise ValueError(
            "slots do not support masks that group tokens (packed sequences, images, custom mask functions): pass "
            "plain text with a 2-D attention_mask"
        )
    return plain or mask_function


def _without_groups(mask_function: Rule, local_size: int | None, sizes: Sizes, device: torch.device) -> Rule | None:
    """The plain rule, causal or with a window, that `mask_function` comes down to on these tokens, or None."""
    plain: Rule = causal_mask_function if local_size is None else sliding_window_causal_mask_function(local_size)
    same = torch.equal(_written_out(mask_function, sizes, device), _written_out(plain, sizes, device))
    return plain if same else None


def eab_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Rule = causal_mask_function, attention_mask: Tensor | None = None, local_size: int | None = None,
    allow_is_causal_skip: bool = True, use_vmap: bool = False, device: Any = "cpu", config: Any = None, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """The mask function that goes with it: bool (B, 1, T, n + S), slots first, or None where plain causal is right.

    In a row with P padding tokens on its left, the prefix would have stood at P .. P+n-1 and text token i at i + n. The
    model's own `mask_function` is asked about those places, so windows, chunks and what comes next need no code here.
    """
    # In an encoder slots are visible wherever anything is, and have no columns. Beside one there may be models of text,
    # which are handed our name with it.
    eab = getattr(config, "eab", None)
    if eab is None or eab.get("sees_all", False):
        plain = eab is not None and attention_mask is None and local_size is None
        if plain and kwargs.get("allow_is_bidirectional_skip", False):
            return None  # also while it is traced, when transformers would write it out for as many tokens as there are
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip and eab is None, use_vmap=use_vmap, device=device, **kwargs,
        )  # fmt: skip
    n, always = config.eab["n_slots"], config.eab["slots_visible"] == "always"
    whole = config.eab.get("whole_mask", False)
    if not getattr(config, "is_causal", True):
        raise ValueError(
            "slots need causal attention: is_causal=False in the config would make this model bidirectional"
        )
    if n and (use_vmap or not (allow_is_causal_skip or whole or (q_length == 1 and torch.compiler.is_compiling()))):
        sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
        mask_function = _rule_by_place(mask_function, local_size, use_vmap, sizes, device, config)

    def shifted(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Any:
        return mask_function(batch, head, q + n, kv + n)

    text = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset,
        mask_function=shifted,
        attention_mask=attention_mask,
        # The window must hold the text and the prefix for the mask to be skipped.
        local_size=local_size if local_size is None or always else local_size - n,
        allow_is_causal_skip=allow_is_causal_skip and not whole,
        use_vmap=use_vmap and n == 0,
        device=device,
    )  # fmt: skip
    if text is None and kv_length > q_length > 1:
        # An empty static cache: plain causal over its first keys, of which the rest are unwritten. The mark spares the
        # kernel the mask; if the model cuts rows out of it, the mark is gone and the mask holds.
        first = torch.ones(q_length, n + kv_length, dtype=torch.bool, device=device).tril(n)[None, None]
        first.eab_first_keys = True  # type: ignore[attr-defined]
        return first
    if text is None or n == 0:
        return text
    if always:
        return torch.cat([text.new_ones(*text.shape[:-1], n), text], dim=-1)
    if attention_mask is None:
        padding = torch.zeros(batch_size, dtype=torch.long, device=device)
    else:
        padding = (attention_mask.long().cumsum(dim=-1) == 0).sum(dim=-1)

    def slots(batch: Tensor, head: Tensor, q: Tensor, slot: Tensor) -> Any:
        return mask_function(batch, head, q + n, padding[batch] + slot)

    slot_mask = _written_out(slots, (batch_size, q_length, n, q_offset, 0), device)
    return torch.cat([slot_mask.expand(*text.shape[:-1], n), text], dim=-1)


def slots_and_text(mask: Tensor | None, n: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """A mask (B, 1, T, n + S) -> that of the slots, bool, and that of the text; None and None where there is none."""
    if mask is None:
        return None, None
    if mask.ndim != 4 or mask.shape[-1] != n + keys:
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)}; with slots it needs {n} + {keys} columns "
            "(slots first): pass a 2-D mask and let the model expand it"
        )
    slots = mask[..., :n]
    return slots if slots.dtype == torch.bool else slots >= 0, mask[..., n:]


def selected(mask: Tensor | None, indices: Tensor, places: int) -> Tensor:
    """A mask (B, 1, T, P) less what an indexer left out: `indices` (B, T, k) of the `places` P that each query sees."""
    chosen = torch.zeros(*indices.shape[:2], places, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    if mask is None:
        return chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def biased(
    bias: Tensor, n: int, keys: int, mask: Tensor | None, slot_mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, bool]:
    """Masks with a bias on the logits written into them: additive (B or 1, Hq, T or 1, S), and the same for slots."""
    if causal:
        mask = torch.ones(keys, keys, dtype=torch.bool, device=bias.device).tril()[None, None]
    low = torch.finfo(bias.dtype).min
    slots, text = bias[..., :n], bias[..., n : n + keys]
    slots = slots if slot_mask is None else torch.where(slot_mask, slots, low)
    return text if mask is None else torch.where(mask, text, low), slots, False
