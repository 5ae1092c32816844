"""The kinds of parts in which a checkpoint carries a prefix, in the order in which they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Kind
from .index_keys import IndexKeys
from .remembered import RememberedInputs
from .slots import Slots

KINDS: tuple[Kind, ...] = (Slots(), RememberedInputs(), IndexKeys())


def shapes(eab: Mapping[str, Any]) -> dict[Kind, dict[str, tuple[int, ...]]]:
    """Of each kind that `config.eab` declares, the names of its tensors within the trunk, and their shapes."""
    n = eab["n_slots"]
    return {kind: kind.shapes(n, eab[kind.key]) for kind in KINDS if n and eab.get(kind.key)}


def every_shape(eab: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The same, of all kinds together, in the order of the file."""
    return {name: shape for of_kind in shapes(eab).values() for name, shape in of_kind.items()}
