"""Attention sinks (Xiao et al., arXiv 2309.17453): how much attention each head gives to position 0 and to slots."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from ..anatomy.probe import Call
from .stream import Batch, Observer

SINK_SCORE = 0.3  # a head with at least this score counts into the layer's sink rate
BLOCK = 128  # queries at a time: attention is never written out beyond a block of rows


class SinkScores(Observer):
    """Mean over query positions and sequences of each head's attention to position 0, and to each slot."""

    def __init__(self) -> None:
        # By block, and site in it (some blocks hold two): (Hq, 1 + n), position 0 and slots, summed over sequences.
        self.weights: dict[int, dict[nn.Module, torch.Tensor]] = {}
        self.sequences: Counter[nn.Module] = Counter()

    def attention(self, block: int, call: Call, batch: Batch) -> None:
        weights = torch.zeros(call.query.shape[1], 1 + _slot_count(call), dtype=torch.float64)
        queries = call.query.shape[2]
        for start in range(0, queries, BLOCK):
            rows = _attention_rows(call, start, min(start + BLOCK, queries))  # (B, Hq, block, n + S)
            n = rows.shape[-1] - call.key.shape[2]
            seen = torch.cat([rows[..., n : n + 1], rows[..., :n]], dim=-1)
            weights += seen.double().sum(dim=(0, 2)).cpu() / queries
        sites = self.weights.setdefault(block, {})
        sites[call.module] = sites.get(call.module, 0) + weights
        self.sequences[call.module] += call.query.shape[0]

    def rows(self) -> dict[int, dict]:
        """Block -> `sink_score` by head, `slot_score` by head and slot, and `sink_rate` over position 0 and slots."""
        found = {}
        for block, sites in self.weights.items():
            scores = torch.cat([total / self.sequences[site] for site, total in sites.items()])  # heads of all sites
            found[block] = {
                "sink_score": scores[:, 0].tolist(),
                "slot_score": scores[:, 1:].tolist(),
                "sink_rate": (scores.amax(dim=1) >= SINK_SCORE).double().mean().item(),
            }
        return found


def _slot_count(call: Call) -> int:
    slots = getattr(call.module, "attention_bias", None)
    return slots.key.shape[0] if slots is not None else 0


def _attention_rows(call: Call, start: int, stop: int) -> torch.Tensor:
    """Attention weights of queries start..stop over [slots, keys]: (B, Hq, stop - start, n + S)."""
    groups = call.query.shape[1] // call.key.shape[1]
    keys = call.key
    n = _slot_count(call)
    if n:
        slot_keys = call.module.attention_bias()[0].to(keys.dtype).transpose(0, 1)
        keys = torch.cat([slot_keys.expand(keys.shape[0], -1, -1, -1), keys], dim=2)
    logits = (call.query[:, :, start:stop] @ keys.repeat_interleave(groups, dim=1).transpose(2, 3)).float() * call.scale
    if (softcap := call.arguments.get("softcap")) is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if (bias := call.arguments.get("logit_bias")) is not None:
        logits = logits + bias
    if call.mask is None:
        place = torch.arange(keys.shape[2], device=keys.device) - n
        hidden = place[None, :] > torch.arange(start, stop, device=keys.device)[:, None]
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    elif call.mask.dtype == torch.bool:
        logits = logits.masked_fill(~call.mask[:, :, start:stop], torch.finfo(logits.dtype).min)
    else:
        logits = logits + call.mask[:, :, start:stop]
    if (sinks := call.arguments.get("s_aux")) is not None:
        extra = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.softmax(torch.cat([logits, extra], dim=-1), dim=-1)[..., :-1]
    return torch.softmax(logits, dim=-1)
