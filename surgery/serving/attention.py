"""vLLM's Attention layer with slots: the keys and values of the first n positions are those of the checkpoint.

Shapes: T tokens of a batch, n slots, H key/value heads of this rank, D the size of a head.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention

TEXT = -1  # the row of a token that keeps its own key and value


def rows_of(input_ids: torch.Tensor, positions: torch.Tensor, placeholder: int, n_slots: int) -> torch.Tensor:
    """(T,) which row of a table of slots each token takes: its slot, TEXT, or n_slots (not a number) where an id that
    is no placeholder stands at the position of a slot."""
    taken = torch.where(input_ids == placeholder, positions, n_slots)
    return torch.where(positions < n_slots, taken, TEXT)


def local_heads(slots: torch.Tensor, heads: int, rank: int, ranks: int) -> torch.Tensor:
    """Of `slots` (n, all key/value heads, D) those `heads` that a rank of a tensor-parallel group keeps.

    As vLLM's QKVParallelLinear does: heads are cut into equal shares, and with more ranks than heads, neighbours have
    the same one. A layer that holds all heads on every rank keeps them all. ValueError where they cannot be shared.
    """
    shares = slots.shape[1] // heads
    if shares * heads != slots.shape[1] or ranks % shares:
        raise ValueError(f"{slots.shape[1]} key/value heads in the checkpoint, {heads} of them on each of {ranks} ranks")
    return slots.narrow(1, rank // (ranks // shares) * heads, heads)


class SlotAttention:
    """What `add_slots` puts in front of the class of an attention layer.

    `slot_key`, `slot_value`: (n + 1, H, D) parameters, the last row for what is no request of ours. `slot_rows`: the
    buffer of the whole model that says which rows the tokens of this batch take.
    """

    slot_key: nn.Parameter
    slot_value: nn.Parameter
    slot_rows: torch.Tensor

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs):
        key = replaced(key, self.slot_key, self.slot_rows)
        value = replaced(value, self.slot_value, self.slot_rows)
        return super().forward(query, key, value, *args, **kwargs)  # type: ignore[misc]


def replaced(states: torch.Tensor, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`states` (T, H, D) or (T, H * D) with those of a slot in the place of each token that has a row in `table`."""
    states = states.view(-1, *table.shape[1:])
    rows = rows.narrow(0, 0, states.shape[0])
    return torch.where((rows >= 0)[:, None, None], table[rows.clamp(min=0)], states)


def add_slots(attention: Attention, n_slots: int, rows: torch.Tensor) -> None:
    """Give an attention layer of vLLM its slots: not a number, until they are loaded."""
    keys = (attention.num_kv_heads, attention.head_size)
    values = (attention.num_kv_heads, attention.head_size_v)
    for name, dims in (("slot_key", keys), ("slot_value", values)):
        # The cache is of the model's dtype, or narrower: a slot is rounded as the prefix' own keys would be.
        table = nn.Parameter(torch.full((n_slots + 1, *dims), torch.nan), requires_grad=False)
        table.weight_loader = load_slots  # type: ignore[attr-defined]
        attention.register_parameter(name, table)
    attention.register_buffer("slot_rows", rows, persistent=False)
    attention.__class__ = _with_slots(type(attention))


@functools.cache
def _with_slots(kind: type) -> type:
    return type(kind.__name__, (SlotAttention, kind), {"__module__": __name__})


def load_slots(table: nn.Parameter, slots: torch.Tensor) -> None:
    """Load `slots` (n, all key/value heads, D) into `table`, (n + 1, heads of this rank, D).

    The last row makes the key of a stray token not a number, and so all that sees it. Its value is 0: a kernel may
    multiply a value that it masks by 0.
    """
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    mine = local_heads(slots, table.shape[1], rank, ranks)
    if mine.shape != (table.shape[0] - 1, *table.shape[1:]):
        raise ValueError(f"slots of shape {tuple(slots.shape)} do not fit vLLM's {tuple(table.shape)}, less one row")
    if not bool(torch.isfinite(slots).all()):
        raise ValueError("a slot is not a finite number")
    table.data[:-1].copy_(mine)
