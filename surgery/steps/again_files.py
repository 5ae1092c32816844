"""Files of a checkpoint that is there, held against those that a run writes from the source."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.contents import SETTINGS, SIGNATURE, all_files, is_document
from ..checkpoint.manifest import MANIFEST, Manifest
from ..checkpoint.provenance import versions
from ..checkpoint.regular import read_json
from ..checkpoint.stage import Stage
from ..checkpoint.writing import plan_file
from ..converted.files import is_rewritten, rewritten_layout
from ..endings.temporary import temporary
from ..verification.checks import Found
from .emit import emit_beside

if TYPE_CHECKING:
    from .again import Again


def same_files_again(root: Path, again: Again, directory: Path) -> Found:
    """Every file beside the weights is, byte for byte, what a run writes. Generation settings may be others."""
    with _emitted(again, directory) as stage:
        wanted = {path.name: path.read_bytes() for path in stage.iterdir()}
    plan = again.plan
    found = {name: path for name, path in all_files(root).items() if path.is_file()}
    weights = {*plan.shards.values(), plan.added_shard}
    ours = {name for name in found if not is_document(name)} - weights - {MANIFEST, SIGNATURE}
    if missing := sorted(wanted.keys() - found.keys()):
        return False, f"{missing[0]} is missing: a run writes it from {plan.source.spec}"
    notes: list[str] = []
    for name in sorted(ours):
        if name not in wanted and name != SETTINGS:
            return False, f"{name} is there, and a run writes no such file from {plan.source.spec}"
        if name not in wanted or found[name].read_bytes() != wanted[name]:
            if name != SETTINGS:
                return (
                    False,
                    f"{name} is not what a run writes from {plan.source.spec}{_where(found[name], wanted[name])}",
                )
            notes.append(f"{name} is not the source's: generation settings were changed")
    for name, header in _headers(again, directory).items():
        with (root / name).open("rb") as file:
            if file.read(len(header)) != header:
                return False, f"the header of {name} is not what a run writes"
    told = f"{len(wanted) - len(notes)} files byte for byte as a run writes them from {plan.source.spec}"
    return True, "; ".join([told, *notes]), tuple(notes)


def _headers(again: Again, directory: Path) -> dict[str, bytes]:
    """How each file of weights begins: those of the source as they are there, then that of what was added."""
    headers = {}
    for old, new in again.plan.shards.items():
        layout = again.plan.source.layout
        if is_rewritten(layout, old, again.changes.replaced):
            headers[new], _ = rewritten_layout(layout, old, new, again.changes.replaced)
            continue
        with (directory / old).open("rb") as file:
            size = file.read(8)
            headers[new] = size + file.read(int.from_bytes(size, "little"))
    entries = [(name, stored.dtype, stored.shape) for name, stored in again.changes.added.items()]
    if entries:
        headers[again.plan.added_shard], _ = plan_file(again.plan.added_shard, entries, {"format": "pt"})
    return headers


def other_versions(manifest: Manifest) -> str:
    """Which packages are of another version than those that the checkpoint was written with, in words."""
    said = [f"{name} {manifest.versions[name]}, and this is {version}" for name, version in versions().items()
            if str(manifest.versions.get(name, version)) != version]  # fmt: skip
    return f"it was written with {'; '.join(said)}"[:200] if said else ""


@contextlib.contextmanager
def _emitted(again: Again, directory: Path) -> Iterator[Path]:
    """A directory with all that a run writes beside the weights and the card; there for the time of the block."""
    with temporary() as scratch, Stage(scratch / "out") as stage:
        emit_beside(again.plan, stage, directory, again.changes)
        yield stage.path


def _where(path: Path, wanted: bytes) -> str:
    """At which key a JSON file first differs, as the end of a sentence."""
    if path.suffix != ".json":
        return ""
    with temporary() as scratch:
        other = scratch / path.name
        other.write_bytes(wanted)
        key = _first_difference(read_json(path), read_json(other))
    return f" (at {key[:100]})" if key else " (the same content, written otherwise)"


def _first_difference(a: Any, b: Any) -> str:
    """The path to the first value in which two JSON values differ; empty where there is none."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if key not in a or key not in b:
                return key
            if a[key] != b[key] or type(a[key]) is not type(b[key]):
                return ".".join(filter(None, (key, _first_difference(a[key], b[key]))))
    return ""
