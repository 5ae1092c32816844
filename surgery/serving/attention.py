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
# What a stray token gives as its value: far beyond real ones, and finite in every dtype of a cache. Not a number would
# stay behind in blocks of the cache, where kernels multiply what they mask by 0: vLLM's for CPUs made later requests
# not a number too.
LOUD = 64.0


def rows_of(input_ids: torch.Tensor, positions: torch.Tensor, placeholders: torch.Tensor) -> torch.Tensor:
    """(T,) which row of a table of slots each token takes: its slot, TEXT, or n (a stray) where an id that is no
    placeholder stands at the position of a slot. `placeholders` (n,) are the ids that requests begin with."""
    n_slots = len(placeholders)
    expected = placeholders[positions.clamp(max=n_slots - 1)]
    taken = torch.where(input_ids == expected, positions, n_slots)
    return torch.where(positions < n_slots, taken, TEXT)


def local_heads(slots: torch.Tensor, heads: int, rank: int, ranks: int) -> torch.Tensor:
    """Of `slots` (n, all key/value heads, D) those `heads` that a rank of a tensor-parallel group keeps.

    As vLLM's QKVParallelLinear does: heads are cut into equal shares, and with more ranks than heads, neighbours have
    the same one. A layer that holds all heads on every rank keeps them all. ValueError where they cannot be shared.
    """
    shares = slots.shape[1] // heads
    if shares * heads != slots.shape[1] or ranks % shares:
        raise ValueError(f"{slots.shape[1]} key/value heads in the checkpoint, and {heads} on each of {ranks} ranks")
    return slots.narrow(1, rank // (ranks // shares) * heads, heads)


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


def replaced(states: torch.Tensor, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`states` (T, H, D) or (T, H * D) with those of a slot in the place of each token that has a row in `table`."""
    states = states.view(-1, *table.shape[1:])
    rows = rows.narrow(0, 0, states.shape[0])
    return torch.where((rows >= 0)[:, None, None], table[rows.clamp(min=0)], states)


def add_slots(attention: Attention, n_slots: int, rows: torch.Tensor) -> None:
    """Give an attention layer of vLLM its slots: not a number, until they are loaded."""
    sizes = (("slot_key", attention.head_size, load_keys), ("slot_value", attention.head_size_v, load_values))
    for name, size, load in sizes:
        # The cache is of the model's dtype, or narrower: a slot is rounded as the prefix' own keys would be.
        table = nn.Parameter(torch.full((n_slots + 1, attention.num_kv_heads, size), torch.nan), requires_grad=False)
        table.weight_loader = load  # type: ignore[attr-defined]
        attention.register_parameter(name, table)
    attention.register_buffer("slot_rows", rows, persistent=False)
    attention.__class__ = _with_slots(type(attention))  # type: ignore[arg-type]


@functools.cache
def _with_slots(kind: type) -> type:
    return type(kind.__name__, (SlotAttention, kind), {"__module__": __name__})


def load_keys(table: nn.Parameter, slots: torch.Tensor) -> None:
    """Load the keys of `slots`, (n, all key/value heads, D), into `table`, (n + 1, heads of this rank, D).

    The last row is that of strays: all that looks at the first slot looks at them.
    """
    _load(table, slots)
    table.data[-1].copy_(table.data[0])


def load_values(table: nn.Parameter, slots: torch.Tensor) -> None:
    """As `load_keys` does; a stray's value is so loud that its request becomes noise."""
    _load(table, slots)
    table.data[-1].fill_(LOUD)
    table.data[-1, :, ::2].neg_()


def _load(table: nn.Parameter, slots: torch.Tensor) -> None:
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    mine = local_heads(slots, table.shape[1], rank, ranks)
    if mine.shape != (table.shape[0] - 1, *table.shape[1:]):
        raise ValueError(f"slots of shape {tuple(slots.shape)} do not fit vLLM's {tuple(table.shape)}, less one row")
    if not bool(torch.isfinite(slots).all()):
        raise ValueError("a slot is not a finite number")
    table.data[:-1].copy_(mine)
