"""Quantised weights of a checkpoint that is there, held against what a run makes of the source's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoint.layout import Layout, read_layout, read_tensor
from ..checkpoint.manifest import MANIFEST, Manifest
from ..converted.described import Described
from ..verification.checks import Found
from ..words import listing

if TYPE_CHECKING:
    from ..operations.base import Operation
    from .again import Again


def same_quantised(described: Described, manifest: Manifest, again: Again, directory: Path) -> Found:
    """What the recipe quantises is what the manifest says is quantised, each weight is the source's, rounded as the
    recipe says, to the bit.

    What an operation that cannot be repeated may have changed before it was rounded is not looked at: that is said.
    `directory` holds the source as plain files.
    """
    layout, original = read_layout(described.root), read_layout(directory)
    planned = {(name, of) for of, instead in again.changes.replaced.items() for name in instead}
    claimed = {(name, entry.of) for name, entry in manifest.tensors.items() if entry.status in ("quantised", "emptied")}
    if other := sorted(planned ^ claimed, key=str):
        does = "quantises" if other[0] in planned else "does not quantise"
        return False, f"{other[0][0]}: the recipe {does} it, and {MANIFEST} says otherwise"
    same, left = 0, again.open | set(again.tensors)
    for operation in again.plan.recipe.changes:
        for stored, instead in again.plan.by_operation[operation.name].replaced.items():
            if stored in left:
                continue
            if wrong := _differs(operation, again, layout, stored, read_tensor(original, stored), set(instead)):
                return False, f"{wrong} is not what {operation.name} makes of {stored} of {again.plan.source.spec}"
            same += 1
    replaced = {name for changes in again.plan.by_operation.values() for name in changes.replaced}
    told = f"{same} weights rounded as computed again from {again.plan.source.spec}, to the bit"
    if same == len(replaced):
        return True, told
    names = listing([change.name for change in again.plan.recipe.changes if change.changes_weights][:-1], 8)
    note = f"{len(replaced) - same} quantised weights were changed by {names} before: the manifest alone holds them"
    return True, f"{told}; {note}", (note,)


def _differs(
    operation: Operation, again: Again, layout: Layout, stored: str, weight: torch.Tensor, names: set[str]
) -> str | None:
    """The first tensor that is not what `operation` makes of `weight`, which the source calls `stored`."""
    wanted = operation.rewrite(None, again.plan.target, stored, weight)
    for name in sorted(names):
        if name.endswith("input_scale"):  # of text
            continue
        if not torch.equal(read_tensor(layout, name), wanted[name]):
            return name
    return None
