"""Index keys: what an indexer of sparse attention knows of a prefix."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..anatomy.mixers import Indexer
from ..anatomy.sites import Anatomy
from .base import Keep, Kind


class IndexKeys(Kind):
    name = "index keys"
    key = "indexers"
    held = "index_keys"

    def shapes(self, n: int, declared: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """key (n, width) of each indexer."""
        return {f"{indexer}.{self.held}.key": (n, entry["key"]) for indexer, entry in declared.items()}

    def values(self, held: Any) -> dict[str, torch.Tensor]:
        return {"key": held()}

    @contextlib.contextmanager
    def reading(self, anatomy: Anatomy, trunk: torch.nn.Module, keep: Keep) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            for indexer in anatomy.indexers:
                module = trunk.get_submodule(indexer.name)
                names = [*inspect.signature(module.forward).parameters]
                told = functools.partial(keep, f"{indexer.name}.{self.held}.key")
                entering = functools.partial(_entering, indexer, names, told)
                undo.callback(module.register_forward_pre_hook(entering, with_kwargs=True).remove)
            yield


class _Telling:
    """A cache in which nothing is kept, and that tells the keys it is given."""

    def __init__(self, told: Callable[[torch.Tensor], None]) -> None:
        self.told = told

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        self.told(indexer_key_states[0].clone())
        return indexer_key_states


def _entering(
    indexer: Indexer, names: Sequence[str], told: Callable[[torch.Tensor], None], module: torch.nn.Module,
    args: tuple[Any, ...], kwargs: dict[str, Any],
) -> tuple[tuple[()], dict[str, Any]]:  # fmt: skip
    return (), {**dict(zip(names, args, strict=False)), **kwargs, indexer.cache: _Telling(told)}
