"""Every way in which a text is fed to a model: at once, padded, with a cache, and what each must leave the same."""

from __future__ import annotations

import inspect

import torch

LENGTH, PADDING = 40, 5  # past every window (8) and chunk (16)


def plain(model, text):
    return model(input_ids=text, use_cache=False).logits


def padded(model, text):
    padding = torch.zeros(len(text), PADDING, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(text)], dim=1)
    return model(input_ids=torch.cat([padding, text], dim=1), attention_mask=mask, use_cache=False).logits[:, PADDING:]


def cached(model, text):
    """In three pieces, the last of them one token."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return None
    cache, pieces = None, []
    for piece in text.tensor_split((LENGTH // 2, LENGTH - 1), dim=1):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def only_the_last(model, text):
    """Some models drop queries on the way where few logits are asked for."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    return model(input_ids=text, use_cache=False, logits_to_keep=5).logits


def eager(model, text):
    parts = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values()
    ours = [config for config in parts if config._attn_implementation_internal == "eab"]
    for config in ours:
        config._attn_implementation_internal = "eab_eager"
    logits = plain(model, text)
    for config in ours:
        config._attn_implementation_internal = "eab"
    return logits


WAYS = {way.__name__: way for way in (plain, padded, cached, only_the_last, eager)}
