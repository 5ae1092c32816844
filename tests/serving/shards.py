"""Runs in the Python of vLLM, `shards.py FOUND`: the heads that a rank gets, of slots and of the projection of keys.

FOUND, a JSON file, has [heads, ranks, of slots, of the projection] for each case; the last two are, by rank, the heads.
vLLM's own QKVParallelLinear loads the projection: all that is made up is the rank.
"""

from __future__ import annotations

import contextlib
import json
import sys
from unittest import mock

import torch
from torch import nn
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear

from surgery.serving import attention
from surgery.serving.slots import fill_keys

CASES = ((2, 1), (4, 2), (4, 4), (2, 4), (1, 4), (8, 2))  # key/value heads, ranks
QUERIES, DIM, HIDDEN, SLOTS = 8, 4, 16, 3


@contextlib.contextmanager
def as_rank(rank: int, ranks: int):
    with contextlib.ExitStack() as stack:
        for module in (linear, parameter, attention):
            for name, value in (("rank", rank), ("world_size", ranks)):
                name = f"get_tensor_model_parallel_{name}"
                stack.enter_context(mock.patch.object(module, name, lambda value=value: value))
        yield


def of_projection(heads: int) -> tuple[list[float], int]:
    layer = linear.QKVParallelLinear(HIDDEN, DIM, QUERIES, heads, bias=False)
    marked = torch.arange(heads).float().repeat_interleave(DIM)[:, None].expand(-1, HIDDEN)  # each row names its head
    layer.weight.weight_loader(layer.weight, marked, "k")
    start = layer.num_heads * DIM
    mine = layer.weight.data[start : start + layer.num_kv_heads * DIM, 0]
    return mine[::DIM].tolist(), layer.num_kv_heads


def of_slots(heads: int, kept: int) -> list[float]:
    table = nn.Parameter(torch.full((SLOTS + 1, kept, DIM), torch.nan), requires_grad=False)
    attention.loader(fill_keys)(table, torch.arange(heads).float().view(1, heads, 1).expand(SLOTS, heads, DIM))
    return table[0, :, 0].tolist()


def main(found_file: str) -> None:
    found = []
    for heads, ranks in CASES:
        slots, projection = [], []
        for rank in range(ranks):
            with as_rank(rank, ranks):
                keys, kept = of_projection(heads)
                projection.append(keys)
                slots.append(of_slots(heads, kept))
        found.append([heads, ranks, slots, projection])
    with open(found_file, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
