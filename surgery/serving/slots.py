"""What slots are to a batch of tokens: which tokens take them, what they replace, which heads a rank keeps. Only torch.

Shapes: T tokens of a batch, n slots, H key/value heads of this rank, D the size of a head.
"""

from __future__ import annotations

import torch

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


def replaced(states: torch.Tensor, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`states` (T, H, D) or (T, H * D) with those of a slot in the place of each token that has a row in `table`."""
    states = states.view(-1, *table.shape[1:])
    rows = rows.narrow(0, 0, states.shape[0])
    return torch.where((rows >= 0)[:, None, None], table[rows.clamp(min=0)], states)


def fill_keys(table: torch.Tensor, slots: torch.Tensor, rank: int, ranks: int) -> None:
    """Write the keys of `slots`, (n, all key/value heads, D), into `table`, (n + 1, heads of this rank, D).

    The last row is that of strays: all that looks at the first slot looks at them.
    """
    _fill(table, slots, rank, ranks)
    table[-1] = table[0]


def fill_values(table: torch.Tensor, slots: torch.Tensor, rank: int, ranks: int) -> None:
    """As `fill_keys` does; a stray's value is so loud that its request becomes noise."""
    _fill(table, slots, rank, ranks)
    table[-1] = LOUD
    table[-1, :, ::2] = -LOUD


def _fill(table: torch.Tensor, slots: torch.Tensor, rank: int, ranks: int) -> None:
    mine = local_heads(slots, table.shape[1], rank, ranks)
    if mine.shape != (table.shape[0] - 1, *table.shape[1:]):
        raise ValueError(f"slots of shape {tuple(slots.shape)} do not fit vLLM's {tuple(table.shape)}, less one row")
    if not bool(torch.isfinite(slots).all()):
        raise ValueError("a slot is not a finite number; export the checkpoint again")
    table[:-1] = mine
