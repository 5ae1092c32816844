"""Weight files that are not on this disk: all that is known of them is their headers."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Elsewhere:
    """Files that belong to a directory and are not in it, as those of a checkpoint on the hub.

    `heads(names)` gives of each its size in bytes, and its own bytes from the first to the end of its header.
    """

    names: Collection[str]
    heads: Callable[[Sequence[str]], Mapping[str, tuple[int, bytes]]]

    def holds(self, root: Path, name: str) -> bool:
        """Whether the file is in the directory `root`, or here."""
        return os.path.lexists(root / name) or name in self.names

    def of(self, names: Sequence[str]) -> Mapping[str, tuple[int, bytes]]:
        """Size and first bytes of those of `names` that are here; none are asked for where none are."""
        here = [name for name in names if name in self.names]
        return self.heads(here) if here else {}


NOWHERE = Elsewhere((), lambda names: {})
