"""Integrity of a converted checkpoint: the files are those of the manifest, and the tensors are what they claim to be.

Each check stands for itself: a manifest whose hashes were computed anew after a change hide it from the first only.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoint.layout import Layout, Stored, read_layout, read_tensor
from ..checkpoint.manifest import MANIFEST, Manifest
from ..checkpoint.quantised import KEY, sealed
from ..checkpoint.source import Source
from ..converted.described import Described, read_described
from ..errors import SurgeryError
from ..progress import Advance, unseen
from ..words import count_of
from .against import kept_tensors, same_source
from .checks import Check, Found, check
from .files import known_kinds, same_code, same_files

SCALES = ("weight_scale", "input_scale")  # what names of scales end in, of weights that a run quantised

if TYPE_CHECKING:
    from ..operations.base import Operation


def check_integrity(
    root: Path,
    manifest: Manifest,
    described: Described | SurgeryError,
    operations: Sequence[type[Operation]],
    changeable: Collection[str] | None,
    source: Source | None,
    source_dir: Path | None,
    advance: Advance = unseen,
    hashes: Mapping[str, str] | None = None,
) -> list[Check]:
    """Every check on the files in `root`; against `source` (plain files in `source_dir`) where it is given.

    `described`: what config.json says, or why that cannot be read (`read_config`). `operations`: all there are; each
    knows what config.json asks for on its behalf. `changeable`: tensors of the source that operations of the recipe may
    change, None where nothing says which. `hashes`: of the source's files, where they were computed just now.
    """
    checks = [check("files", lambda: same_files(root, manifest, advance))]
    code = check("code", lambda: same_code(root, _said(described)))
    try:
        layout = read_layout(root)
    except SurgeryError as error:  # and then nothing can be said of whether config.json fits them
        shards = {entry.shard for entry in manifest.tensors.values()}
        contents = check("contents", lambda: known_kinds(root, shards))
        return [*checks, code, contents, Check("tensors", False, str(error))]
    checks += [check("config", lambda: _config(_said(described), manifest)), code]
    checks.append(check("contents", lambda: known_kinds(root, layout.shards)))
    checks.append(check("tensors", lambda: _tensors(layout, manifest)))
    checks += _added(layout, manifest, described, operations)
    if quantised := [name for name, entry in manifest.tensors.items() if entry.status == "quantised"]:
        checks.append(check("scales", lambda: _scales(layout, quantised)))
    if source is not None and source_dir is not None:
        checks.append(check("source", lambda: same_source(source, manifest, hashes)))
        # Where both sides' files have just been hashed, equal hashes are equal files, and need not be read once more.
        hashed = checks[0].passed and checks[-1].passed and source.kind != "gguf"
        checks.append(
            check("kept tensors", lambda: kept_tensors(layout, manifest, read_layout(source_dir), hashed, changeable))
        )
    return checks


def read_config(root: Path) -> Described | SurgeryError:
    """What config.json of a converted checkpoint says, or the error that says why it cannot be read."""
    try:
        return read_described(root)
    except SurgeryError as error:
        return error


def _said(described: Described | SurgeryError) -> Described:
    if isinstance(described, SurgeryError):
        raise described
    return described


def _config(described: Described, manifest: Manifest) -> Found:
    slots, norms = described.eab, described.head_norm
    if sealed(described.config) != manifest.quantised:  # before anything is loaded as it says
        return False, f"config.json: {KEY} is not the one that the run wrote, as {MANIFEST} says"
    described.anatomy  # noqa: B018  raises where config.json is not such as a run writes for this model
    found = f"config.json describes {count_of(slots.n_slots, 'slot')} in each of {count_of(len(slots.sites), 'site')}"
    others = ((slots.mixers, "mixer"), (slots.indexers, "indexer"))
    found += "".join(f", and what {count_of(len(named), word)} had of the prefix" for named, word in others if named)
    return True, found if norms is None else f"{found}, and norms in {len(norms.sites)} of them"


def _tensors(layout: Layout, manifest: Manifest) -> Found:
    found = {t.name: (t.shard, t.dtype, list(t.shape)) for t in layout.tensors.values()}
    planned = {name: (t.shard, t.dtype, list(t.shape)) for name, t in manifest.tensors.items()}
    for name in sorted(found.keys() | planned.keys()):
        if found.get(name) != planned.get(name):
            return False, f"{name} is {found.get(name, 'missing')}, planned was {planned.get(name, 'nothing')}"
    return True, f"{len(found)} tensors as planned, each in one shard"


def _scales(layout: Layout, quantised: Sequence[str]) -> Found:
    """What the numbers of quantised weights are multiplied by, and their inputs divided by, are positive numbers."""
    scales = [name for name in quantised if name.endswith(SCALES)]
    for name in scales:
        if not bool(((found := read_tensor(layout, name)).isfinite() & (found > 0)).all()):
            return False, f"{name} holds what is no positive number"
    return True, f"{len(scales)} scales of quantised weights and their inputs, all positive"


def _added(
    layout: Layout, manifest: Manifest, described: Described | SurgeryError, operations: Sequence[type[Operation]]
) -> list[Check]:
    """What operations added: everything that config.json asks for on their behalf is there, and nothing else is."""
    if isinstance(described, SurgeryError):
        return [Check("slots", False, str(described))]
    try:
        kinds = {kind: tensors for operation in operations for kind, tensors in operation.asks(described).items()}
    except SurgeryError as error:
        return [Check("added", False, str(error))]
    added = sorted(name for name, entry in manifest.tensors.items() if entry.status == "added")
    endings = [ending for tensors in kinds.values() for ending in tensors]
    unknown = [name for name in added if not any(_is_named(name, ending) for ending in endings)]
    # Into the first site of an encoder a test-time register comes as zeros, and without biases leaves as such.
    first = next(iter(described.eab.sites)) if described.eab.sees_all else None
    checks = [
        check(kind, functools.partial(_of_kind, kind, tensors, layout, added, unknown, first))
        for kind, tensors in kinds.items()
    ]
    if unknown and not kinds:
        checks.append(Check("added", False, f"{unknown[0]} was added, but config.json does not know it"))
    return checks


def _is_named(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _of_kind(
    kind: str, tensors: Mapping[str, Stored], layout: Layout, added: list[str], unknown: list[str], first: str | None
) -> Found:  # fmt: skip
    """The tensors of one kind have the shapes that config.json says, and hold something, if not of the site `first`."""
    expected = {}
    for ending, stored in tensors.items():
        named = [name for name in added if _is_named(name, ending)]
        if len(named) != 1 or named[0] not in layout.tensors:
            return False, f"{ending} is missing: config.json asks for it"
        expected[named[0]] = stored
    if unknown:
        return False, f"{unknown[0]} was added, but config.json does not know it"
    for name, stored in expected.items():
        info = layout.tensors[name]
        if (info.dtype, info.shape) != (stored.dtype, stored.shape):
            asked = f"config.json says {stored.dtype} of shape {stored.shape}"
            return False, f"{name} is {info.dtype} of shape {info.shape}, {asked}"
        tensor = read_tensor(layout, name)
        if not bool(torch.isfinite(tensor).all()):
            return False, f"{name} holds NaN or Inf"
        of_first = first is not None and f"{first}." in name
        if bool((tensor == 0).all()) and not of_first and not name.endswith(".gate"):  # which leaves a head as it is
            return False, f"{name} is all zeros: its {kind} are lost"
    return True, f"{len(expected)} tensors of {kind}, finite"
