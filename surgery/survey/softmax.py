"""Rows of an attention call's softmax, and what is needed of them without writing the rows down.

A row is one query of the text. It spreads its weight over *places*: slots, keys, and a learned sink logit where the
site has one (GPT-OSS), which is a slot with value zero. The weights over all places sum to 1.

With s the logits over places, Z = logsumexp(s) and p = exp(s - Z), the entropy of a row is -sum p log p = Z - E_p[s].
As s_j = scale * q.k_j, E_p[s] = scale * q.(sum_j p_j k_j): attention with the keys as values. A flash kernel gives that
sum and Z, so T x T is never written. Soft-capped or biased logits and other devices than the CPU go in blocks of rows.

Notation: B sequences, Hq query heads, H key heads (G = Hq / H), T queries, R of them looked at, S keys, D key dim,
n slots, P = n + S places, and one more with a sink logit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..anatomy.calls import Call
from ..runtime.eab_masks import selected

BLOCK = 128  # rows at a time where logits or masks are written out


@dataclass(frozen=True)
class Sinks:
    """Weights of R rows on places that are the same for all; a prefix of `lead` tokens before the text counts as slots.

    first: (B, Hq, R) of the text's first token. slots: (B, Hq, R, n + lead). learned: (B, Hq, R), of the sink logit, or
    None.
    """

    first: torch.Tensor
    slots: torch.Tensor
    learned: torch.Tensor | None


@dataclass(frozen=True)
class Rows:
    """Sinks of R rows, their entropy (B, Hq, R) in nats, and how many places they see, (B or 1, Hq or 1, R)."""

    sinks: Sinks
    entropy: torch.Tensor
    places: torch.Tensor

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        def join(columns):
            return None if columns[0] is None else torch.cat(columns, dim=2)

        sinks = [[getattr(part.sinks, name) for part in parts] for name in Sinks.__dataclass_fields__]
        return cls(
            Sinks(*map(join, sinks)), join([part.entropy for part in parts]), join([part.places for part in parts])
        )


class Softmax:
    """An attention call, ready to be looked at: everything that changes its logits, in float32 or wider."""

    def __init__(self, call: Call) -> None:
        arguments = call.arguments
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        self.query = call.query.to(dtype)  # (B, Hq, T, D)
        if (factor := arguments.get("query_scale")) is not None:  # the runtime scales queries by place (Llama 4)
            self.query = self.query * factor
        self.key = call.key.to(dtype)  # (B, H, S, D)
        self.slot_key = _slots(call, 0, self.key)  # (H, n, D)
        self.call, self.scale = call, call.scale
        self.softcap: float | None = arguments.get("softcap")
        self.bias: torch.Tensor | None = arguments.get("logit_bias")  # (B or 1, Hq, 1, P)
        self.mask: torch.Tensor | None = call.mask  # (B or 1, Hq or 1, T, P), None: causal, or all is seen
        if (indices := arguments.get("indices")) is not None:
            self.mask = selected(self.mask, indices, self.slot_key.shape[1] + self.key.shape[2])
        learned = arguments.get("s_aux")
        self.learned = None if learned is None else learned.detach().to(dtype)  # (Hq,)
        self.n = self.slot_key.shape[1]
        if self.mask is not None and self.n and self.mask.shape[-1] == self.key.shape[2]:  # an encoder's: all see them
            self.mask = F.pad(self.mask, (self.n, 0), value=self.mask.dtype == torch.bool)
        # A model that has dropped all queries but the last keeps every key: query i stands at key `offset` + i.
        self.offset = self.key.shape[2] - self.query.shape[2]

    def text(self, lead: int) -> range:
        """The queries of the text, which starts at key `lead`."""
        return range(max(lead - self.offset, 0), self.query.shape[2])

    def sinks(self, queries: torch.Tensor, lead: int = 0) -> Sinks | None:
        """Sinks of the rows `queries` (R,), without a look at other keys; None where the kernel left no Z."""
        if self.call.lse is None or not self._is_plain():
            return None
        return self._near(queries, lead, self.call.lse[:, :, queries])[0]

    def rows(self, queries: torch.Tensor, lead: int = 0) -> Rows:
        """Statistics of the rows `queries` (R,), in ascending order, of the text that starts at key `lead`."""
        if not self._is_plain():
            return Rows.joined([self._from_weights(part, lead) for part in queries.split(BLOCK)])
        if self.mask is None and self.offset == 0 and len(queries) == self.query.shape[2]:
            return self._from_kernel(queries, lead, whole=True)
        return Rows.joined([self._from_kernel(part, lead, whole=False) for part in queries.split(BLOCK)])

    def weights(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax of the rows `queries` (R,), written out: (B, Hq, R, P), slots first, then keys, then the sink logit.

        And which places they see, bool (B or 1, Hq or 1, R, P).
        """
        keys = torch.cat([self.slot_key.expand(len(self.key), -1, -1, -1), self.key], dim=2)  # (B, H, P, D)
        logits = self._products(queries, keys)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.bias is not None:
            logits = logits + self.bias
        low = torch.finfo(logits.dtype).min
        if self.mask is not None and self.mask.dtype != torch.bool:
            logits = (logits + self.mask[:, :, queries]).clamp(min=low)
        seen = self._seen(queries, keys.shape[2])
        logits = logits.masked_fill(~seen, low)
        if self.learned is not None:
            logits, seen = torch.cat([logits, self._learned(logits)], dim=-1), F.pad(seen, (0, 1), value=True)
        return torch.softmax(logits, dim=-1), seen

    def values(self) -> torch.Tensor:
        """The value of each place, (B, H, P, E)."""
        values = self.call.value.to(self.key.dtype)
        values = torch.cat([_slots(self.call, 1, values).expand(len(values), -1, -1, -1), values], dim=2)
        return values if self.learned is None else F.pad(values, (0, 0, 0, 1))

    def _is_plain(self) -> bool:
        """Whether logits are nothing but products, of which some are hidden, on a device whose kernel gives Z."""
        hides = self.mask is None or self.mask.dtype == torch.bool
        return self.query.device.type == "cpu" and self.softcap is None and self.bias is None and hides

    def _products(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Logits of the rows `queries` with keys (B, H, P, D), before anything else: (B, Hq, R, P)."""
        query = self.query if len(queries) == self.query.shape[2] else self.query[:, :, queries]
        grouped = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # (B, H, G R, D)
        return (grouped @ keys.transpose(2, 3)).unflatten(2, (-1, len(queries))).flatten(1, 2) * self.scale

    def _seen(self, queries: torch.Tensor, stop: int) -> torch.Tensor:
        """Which of the first `stop` slots and keys the rows `queries` see: bool (B or 1, Hq or 1, R, stop)."""
        if self.mask is None:
            place = torch.arange(stop, device=self.key.device) - self.n
            if not self.call.causal:
                return torch.ones_like(place, dtype=torch.bool).expand(1, 1, len(queries), -1)
            return (place <= (queries.to(place.device) + self.offset)[:, None])[None, None]
        rows = self.mask[:, :, queries, :stop]
        return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2

    def _places(self, queries: torch.Tensor) -> torch.Tensor:
        """How many places the rows `queries` see: (B or 1, Hq or 1, R)."""
        if self.mask is None and not self.call.causal:
            seen = torch.full_like(queries, self.n + self.key.shape[2])[None, None]
        elif self.mask is None:
            seen = (queries + self.offset + 1 + self.n)[None, None]
        else:
            seen = self._seen(queries, self.mask.shape[-1]).sum(dim=-1)
        return seen + int(self.learned is not None)

    def _learned(self, logits: torch.Tensor) -> torch.Tensor:
        """The sink logit beside logits (B, Hq, R, ...): (B, Hq, R, 1)."""
        assert self.learned is not None
        return self.learned.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)

    def _from_weights(self, queries: torch.Tensor, lead: int) -> Rows:
        weights, seen = self.weights(queries)
        learned = weights[..., -1] if self.learned is not None else None
        sinks = Sinks(weights[..., self.n + lead], weights[..., : self.n + lead], learned)
        return Rows(sinks, torch.special.entr(weights).sum(dim=-1), seen.sum(dim=-1))

    def _from_kernel(self, queries: torch.Tensor, lead: int, whole: bool) -> Rows:
        query, key, mask = self.query, self.key, None
        causal = whole and self.call.causal
        if not whole:  # the kernel takes additive masks only, and no -inf
            last = int(queries[-1]) + self.offset + 1  # where no later key is seen
            stop = last if self.call.causal else key.shape[2]
            query, key = query[:, :, queries], key[:, :, :stop]
            hidden = ~self._seen(queries, self.n + stop)[..., self.n :]
            mask = torch.zeros((), dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)
        mean_key, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, key, 0.0, causal, attn_mask=mask, scale=self.scale
        )
        sinks, extra, total = self._near(queries, lead, lse)
        expected = (lse - total).exp() * self.scale * (query * mean_key).sum(dim=-1)
        expected = expected + ((extra - total.unsqueeze(-1)).exp() * extra).sum(dim=-1)
        return Rows(sinks, (total - expected).clamp(min=0), self._places(queries))

    def _near(self, queries: torch.Tensor, lead: int, lse: torch.Tensor) -> tuple[Sinks, torch.Tensor, torch.Tensor]:
        """Of lse (B, Hq, R) over keys: sinks, logits of slots and sink logit (B, Hq, R, ..), and Z over all places."""
        # Few places, one by one: slots, the tokens of a prefix, the first of the text.
        near = torch.cat([self.slot_key.expand(len(self.key), -1, -1, -1), self.key[:, :, : lead + 1]], dim=2)
        low = torch.finfo(near.dtype).min
        logits = self._products(queries, near).masked_fill(~self._seen(queries, near.shape[2]), low)
        extra, lse = logits[..., : self.n], lse.to(logits)
        if self.learned is not None:
            extra = torch.cat([extra, self._learned(logits)], dim=-1)
        total = lse if extra.shape[-1] == 0 else torch.logaddexp(lse, extra.logsumexp(dim=-1))
        weights = (logits - total.unsqueeze(-1)).exp()
        learned = (extra[..., -1] - total).exp() if self.learned is not None else None
        return Sinks(weights[..., -1], weights[..., :-1], learned), extra, total


def _slots(call: Call, part: int, like: torch.Tensor) -> torch.Tensor:
    """Keys (0) or values (1) of the site's slots, (H, n, D or E); n = 0 where it has none."""
    slots = getattr(call.module, "attention_bias", None)
    if slots is None:
        return like.new_empty(like.shape[1], 0, like.shape[3])
    return slots()[part].detach().to(like).transpose(0, 1)
