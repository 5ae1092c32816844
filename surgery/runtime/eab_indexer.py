"""Indexers of sparse attention: they choose which keys a query sees, and must be able to choose those of the prefix.

An indexer scores a small key of each token, and attention sees the best of them only. Its keys of the prefix are
constants as well: they are stored, and stand in front of those of the text, as slots do. Above `index_topk` tokens the
same are chosen as after the prefix.

`config.eab` describes them under `indexers`: the name of each in the trunk -> `key`, the width of its keys, and
`cache`, the argument that its cache comes by.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .eab_added import Added, put_in_front


class IndexKeys(Added):
    """An indexer's keys of the prefix: key (n, D)."""

    key: Tensor

    def __init__(self, n: int, arguments: tuple[str, ...], entry: Mapping[str, Any]):
        super().__init__()
        self.arguments, self.cache = arguments, entry["cache"]
        self.add_parameter("key", n, entry["key"])

    def forward(self) -> Tensor:
        return self.key


class _Behind:
    """What an indexer takes for its cache: keys of the text, (B, S, D), come out behind those of the prefix."""

    def __init__(self, cache: Any, keys: Tensor) -> None:
        self.cache, self.keys = cache, keys

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        text = indexer_key_states
        if self.cache is not None:
            text = self.cache.update_indexer(text, layer_idx)
        return torch.cat([self.keys.to(text).expand(len(text), -1, -1), text], dim=1)


class Selecting:
    """In front of an indexer's class."""

    index_keys: IndexKeys

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        keys = self.index_keys
        given = {**dict(zip(keys.arguments, args, strict=False)), **kwargs}
        given[keys.cache] = _Behind(given.get(keys.cache), keys())
        return super().forward(**given)  # type: ignore[misc]


def install_indexers(trunk: nn.Module, n: int, indexers: Mapping[str, Mapping[str, Any]]) -> contextlib.ExitStack:
    """Put empty keys into every indexer; closing what is returned takes them out again."""
    undo = contextlib.ExitStack()
    for name, entry in indexers.items():
        indexer: Any = trunk.get_submodule(name)
        indexer.index_keys = IndexKeys(n, tuple(inspect.signature(indexer.forward).parameters), entry)
        undo.callback(delattr, indexer, "index_keys")
        put_in_front(indexer, Selecting, undo)
    return undo
