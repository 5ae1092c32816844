"""The seam: each attention site of a transformers model asks `ALL_ATTENTION_FUNCTIONS` for its function, then calls it.

`observing` stands at that point. It changes nothing about which function or which mask a model gets; it sees each call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Call:
    """One attention call: query (B, Hq, T, D), key (B, H, S, D), value (B, H, S, E), after rotary and norms."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    arguments: dict = field(default_factory=dict)

    @property
    def scale(self) -> float:
        scaling = self.arguments.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling


@contextlib.contextmanager
def observing(observe: Callable[[Call], None], compute: bool = True) -> Iterator[None]:
    """While active, `observe` sees every attention call in this process, before it is computed.

    With `compute=False` attention is left out and gives an empty tensor of the right shape: for the meta device.
    """
    ask = ALL_ATTENTION_FUNCTIONS.get_interface

    def interface(name, default):
        attend = ask(name, default)

        def attention(module, query, key, value, attention_mask=None, **arguments):
            observe(Call(module, query, key, value, attention_mask, arguments))
            if compute:
                return attend(module, query, key, value, attention_mask, **arguments)
            batch, heads, length = query.shape[:3]
            return query.new_empty(batch, length, heads, value.shape[-1]), None

        return attention

    ALL_ATTENTION_FUNCTIONS.get_interface = interface
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface  # the instance attribute; the class's method is back
