"""What a slot is visible to: the model's own mask, asked as if the prefix still stood in front of the text."""

from __future__ import annotations

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function


def _rule_by_place(mask_function, local_size: int | None, use_vmap: bool, sizes: tuple, device, config):
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


def _without_groups(mask_function, local_size: int | None, sizes: tuple, device):
    """The plain rule, causal or with a window, that `mask_function` comes down to on these tokens, or None."""
    plain = causal_mask_function if local_size is None else sliding_window_causal_mask_function(local_size)
    asked, expected = (
        sdpa_mask(*sizes, mask_function=rule, allow_is_causal_skip=False, device=device)
        for rule in (mask_function, plain)
    )
    return plain if torch.equal(asked, expected) else None


def eab_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, local_size=None,
    allow_is_causal_skip=True, use_vmap=False, device="cpu", config=None, **kwargs,
):  # fmt: skip
    """The mask function that goes with it: bool (B, 1, T, n + S), slots first, or None where plain causal is right.

    In a row with P padding tokens on its left, the prefix would have stood at P .. P+n-1 and text token i at i + n. The
    model's own `mask_function` is asked about those places, so windows, chunks and what comes next need no code here.
    """
    n, always = config.eab["n_slots"], config.eab["slots_visible"] == "always"
    whole = config.eab.get("whole_mask", False)
    if not getattr(config, "is_causal", True):
        raise ValueError(
            "slots need causal attention: is_causal=False in the config would make this model bidirectional"
        )
    if n and (use_vmap or not (allow_is_causal_skip or whole or (q_length == 1 and torch.compiler.is_compiling()))):
        sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
        mask_function = _rule_by_place(mask_function, local_size, use_vmap, sizes, device, config)

    def shifted(batch, head, q, kv):
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
        first.eab_first_keys = True
        return first
    if text is None or n == 0:
        return text
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
