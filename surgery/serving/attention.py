"""vLLM's Attention layer with slots: the keys and values of the first n positions are those of the checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention

from .slots import fill_keys, fill_values, replaced

Fill = Callable[[torch.Tensor, torch.Tensor, int, int], None]


class SlotAttention:
    """What `add_slots` puts in front of the class of an attention layer.

    `slot_key`, `slot_value`: (n + 1, H, D) parameters, the last row for strays. `slot_rows`: the
    buffer of the whole model that says which rows the tokens of this batch take.
    """

    slot_key: nn.Parameter
    slot_value: nn.Parameter
    slot_rows: torch.Tensor

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs):
        key = replaced(key, self.slot_key, self.slot_rows)
        value = replaced(value, self.slot_value, self.slot_rows)
        return super().forward(query, key, value, *args, **kwargs)  # type: ignore[misc]


def add_slots(attention: Attention, n_slots: int, rows: torch.Tensor) -> None:
    """Give an attention layer of vLLM its slots: not a number, until they are loaded."""
    sizes = (("slot_key", attention.head_size, fill_keys), ("slot_value", attention.head_size_v, fill_values))
    for name, size, fill in sizes:
        # The cache is of the model's dtype, or narrower: a slot is rounded as the prefix' own keys would be.
        table = nn.Parameter(torch.full((n_slots + 1, attention.num_kv_heads, size), torch.nan), requires_grad=False)
        table.weight_loader = loader(fill)  # type: ignore[attr-defined]
        attention.register_parameter(name, table)
    attention.register_buffer("slot_rows", rows, persistent=False)
    attention.__class__ = _with_slots(type(attention))  # type: ignore[arg-type]


@functools.cache
def _with_slots(kind: type) -> type:
    return type(kind.__name__, (SlotAttention, kind), {"__module__": __name__})


def loader(fill: Fill) -> Callable[[nn.Parameter, torch.Tensor], None]:
    """A weight loader as vLLM's parameters have: it is given what the checkpoint holds, for all ranks."""

    def load(table: nn.Parameter, slots: torch.Tensor) -> None:
        fill(table.data, slots, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())

    return load
