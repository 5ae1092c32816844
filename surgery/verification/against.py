"""A converted checkpoint against its source: what was kept is byte-identical."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..checkpoint.header import TensorInfo
from ..checkpoint.layout import Layout, iter_tensor_chunks
from ..checkpoint.manifest import Manifest
from ..checkpoint.source import Source, source_hashes
from .checks import Found


def same_source(source: Source, manifest: Manifest, hashes: Mapping[str, str] | None = None) -> Found:
    """`hashes` of the source's files, where they have been computed just now."""
    recorded, found = manifest.source.get("sha256"), source_hashes(source) if hashes is None else hashes
    recorded = recorded if isinstance(recorded, dict) else {}
    if source.kind == "gguf":  # one file, whatever it is called by now
        same = [*found.values()] == [*recorded.values()]
        return same, f"{source.spec} is {'' if same else 'not '}what was converted" + ("" if same else " (SHA-256)")
    for name in sorted(found.keys() | recorded.keys()):
        if recorded.get(name) != found.get(name):
            return False, f"{source.spec}: {name} is not the file that was converted (SHA-256 differs)"
    return True, f"{source.spec} is what was converted"


def kept_tensors(
    layout: Layout, manifest: Manifest, original: Layout, hashed: bool, changeable: Collection[str] | None
) -> Found:
    """Every tensor of the source is there: as it was, or changed where an operation of the recipe changes tensors.

    Of one that is stored quantised it is only said that others stand in its place: `steps.again` computes them. Of one
    that was emptied no rows are left, and the rest of its shape.
    """
    quantised = {entry.of for entry in manifest.tensors.values() if entry.status == "quantised"}
    emptied = {entry.of for entry in manifest.tensors.values() if entry.status == "emptied"}

    def identical(a: TensorInfo, b: TensorInfo) -> bool:
        same_file = hashed and manifest.files[a.shard].sha256 == manifest.source["sha256"][b.shard]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and (
            (same_file and a.start == b.start)
            or all(
                x == y
                for x, y in zip(iter_tensor_chunks(layout, a.name), iter_tensor_chunks(original, b.name), strict=True)
            )
        )

    for name, b in sorted(original.tensors.items()):
        may_change = changeable is None or name in changeable
        if name in quantised and may_change:
            continue
        statuses = ("kept", "changed") if may_change else ("kept",)
        a, status = layout.tensors.get(name), getattr(manifest.tensors.get(name), "status", None)
        if a is not None and name in emptied and _without_rows(a, b):
            continue
        if a is None or status not in statuses:
            return False, f"{name} of the source is not kept in the checkpoint"
        if status == "kept" and not identical(a, b):
            return False, f"{name} is not byte-identical to the source"
        if status == "changed" and (a.dtype, a.shape) != (b.dtype, b.shape):
            return False, f"{name} is {a.dtype} of shape {a.shape}, in the source it is {b.dtype} of shape {b.shape}"
        if status == "changed" and identical(a, b):
            return False, f"{name} is said to be changed, but it is byte-identical to the source"
    claimed = {entry.of or name for name, entry in manifest.tensors.items() if entry.status != "added"}
    if invented := sorted(claimed - set(original.tensors)):
        return False, f"{invented[0]} is said to be of the source, but the source has no such tensor"
    changed = sum(entry.status == "changed" for entry in manifest.tensors.values())
    told = [f"{len(original.tensors) - changed - len(quantised | emptied)} tensors byte-identical to the source"]
    told += [f"{changed} changed in place"] if changed else []
    told += [f"{len(quantised)} stored quantised"] if quantised else []
    told += [f"{len(emptied)} without its rows"] if emptied else []
    return True, ", ".join(told)


def _without_rows(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether `a` is `b` but for one size, which is 0."""
    if a.dtype != b.dtype or len(a.shape) != len(b.shape):
        return False
    return [left for left, had in zip(a.shape, b.shape, strict=True) if left != had] == [0]
