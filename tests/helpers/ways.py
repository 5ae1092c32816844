"""Every way in which a text is fed to a model: at once, padded, with a cache, and what each must leave the same."""

from __future__ import annotations

import inspect

import torch

LENGTH, PADDING = 40, 5  # past every window (8) and chunk (16)


def plain(model, text):
    return model(input_ids=text, use_cache=False).logits


def padded(model, text, lead=0):
    """After padding. With `lead` tokens of the text left out, positions are given, which padding does not move."""
    padding = torch.zeros(len(text), PADDING, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(text)], dim=1)
    ids, given = torch.cat([padding, text], dim=1), {}
    if lead and "position_ids" in inspect.signature(model.forward).parameters:
        given = {"position_ids": torch.arange(-PADDING, text.shape[1]).clamp(min=0).expand(ids.shape)}
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits[:, PADDING + lead :]


def cached(model, text, lead=0):
    """In three pieces, the last of them one token. With `lead` tokens in front, which belong to the first piece and are
    left out, positions are given, as `generate` gives them."""
    known = inspect.signature(model.forward).parameters
    if "past_key_values" not in known:
        return None
    cache, pieces, start = None, [], 0
    for piece in text.tensor_split((lead + LENGTH // 2, lead + LENGTH - 1), dim=1):
        places = torch.arange(start, start + piece.shape[1]).expand(piece.shape)
        given = {"position_ids": places} if lead and "position_ids" in known else {}
        output = model(input_ids=piece, past_key_values=cache, use_cache=True, **given)
        cache, start = output.past_key_values, start + piece.shape[1]
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)[:, lead:]


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
