"""Integrity of a converted checkpoint: the files are those of the manifest, and the tensors are what they claim to be.

Each check stands for itself: a manifest whose hashes were computed anew after a change hide it from the first only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from ..checkpoint.disk import sha256_of
from ..checkpoint.layout import Layout, Stored, TensorInfo, iter_tensor_chunks, read_json, read_layout
from ..checkpoint.manifest import MANIFEST, Manifest
from ..checkpoint.source import ADAPTER, Source, source_hashes
from ..converted.derived import derive
from ..converted.described import Described, read_described
from ..errors import SurgeryError
from ..progress import Advance, unseen

if TYPE_CHECKING:
    from ..operations.base import Operation

Found = tuple[bool, str]
# What git and the hub's client leave in a directory that was uploaded or downloaded; nothing loads from them.
NOT_OURS = (".git", ".gitattributes", ".cache")
_OTHER_VERSION = f"verify with the version in {MANIFEST}, or convert the source again"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `detail` says what was found, in words, naming the file or tensor at fault."""

    name: str
    passed: bool
    detail: str


def integrity_to_dict(checks: list[Check]) -> dict:
    return {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}


def check_integrity(
    root: Path,
    manifest: Manifest,
    described: Described | SurgeryError,
    operations: Sequence[type[Operation]],
    may_change: bool,
    source: Source | None,
    source_dir: Path | None,
    advance: Advance = unseen,
) -> list[Check]:
    """Every check on the files in `root`; against `source` (plain files in `source_dir`) where it is given.

    `described`: what config.json says, or why that cannot be read (`read_config`). `operations`: all there are; each
    knows what config.json asks for on its behalf. `may_change`: whether the recipe changes weights.
    """
    checks = [
        _check("files", lambda: _files(root, manifest, advance)),
        _check("config", lambda: _config(_said(described))),
        _check("code", lambda: _code(root, _said(described))),
    ]
    try:
        layout = read_layout(root)
    except SurgeryError as error:
        return [*checks, Check("tensors", False, str(error))]
    checks.append(_check("tensors", lambda: _tensors(layout, manifest)))
    checks += _added(layout, manifest, described, operations)
    if source is not None and source_dir is not None:
        checks.append(_check("source", lambda: _same_source(source, manifest)))
        # Where both sides' files have just been hashed, equal hashes are equal files, and need not be read once more.
        hashed = checks[0].passed and checks[-1].passed and source.kind != "gguf"
        checks.append(
            _check("kept tensors", lambda: _kept(layout, manifest, read_layout(source_dir), hashed, may_change))
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


def _check(name: str, look: Callable[[], Found]) -> Check:
    try:
        return Check(name, *look())
    except SurgeryError as error:
        return Check(name, False, str(error))
    except OSError as error:
        return Check(name, False, f"{error.filename} cannot be read ({error.strerror})")


def _files(root: Path, manifest: Manifest, advance: Advance) -> Found:
    present = {path.relative_to(root).as_posix(): path for path in root.rglob("*")}
    present = {name: path for name, path in present.items() if name.split("/")[0] not in NOT_OURS}
    for name, path in sorted(present.items()):
        if path.is_symlink() and not _in_hub_cache(root, path):  # links to directories too, which a walk does not enter
            return False, f"{name} is a link, and its target is not part of the checkpoint"
        if not path.is_file() and not path.is_dir():
            return False, f"{name} is not a plain file"
    files = {name for name, path in present.items() if path.is_file()}
    expected = set(manifest.files)
    if missing := sorted(expected - files):
        return False, f"{missing[0]} is missing ({len(missing)} of {len(expected)} files)"
    if extra := sorted(files - expected - {MANIFEST}):
        return False, f"{extra[0]} is not in {MANIFEST} ({len(extra)} files were added)"
    if ADAPTER in files:
        return False, f"{ADAPTER} makes transformers load what it names in place of the model, or on top of it"
    for name, entry in manifest.files.items():
        if present[name].stat().st_size != entry.bytes or sha256_of(present[name], advance) != entry.sha256:
            return False, f"{name} is not the file that was written (SHA-256 differs)"
    return True, f"{len(expected)} files, SHA-256 as written"


def _in_hub_cache(root: Path, link: Path) -> bool:
    """Whether `link` is how the hub's cache keeps a file: snapshots/REVISION/name -> ../../blobs/HASH."""
    return link.is_file() and link.resolve().parent == root.resolve().parent.parent / "blobs"


def _config(described: Described) -> Found:
    slots, norms = described.eab, described.head_norm
    described.anatomy  # noqa: B018  raises where config.json is not such as a run writes for this model
    found = f"config.json describes {slots.n_slots} slots in each of {len(slots.sites)} sites"
    return True, found if norms is None else f"{found}, and norms in {len(norms.sites)} of them"


def _tensors(layout: Layout, manifest: Manifest) -> Found:
    found = {t.name: (t.shard, t.dtype, list(t.shape)) for t in layout.tensors.values()}
    planned = {name: (t.shard, t.dtype, list(t.shape)) for name, t in manifest.tensors.items()}
    for name in sorted(found.keys() | planned.keys()):
        if found.get(name) != planned.get(name):
            return False, f"{name} is {found.get(name, 'missing')}, planned was {planned.get(name, 'nothing')}"
    return True, f"{len(found)} tensors as planned, each in one shard"


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
    checks = [
        _check(kind, functools.partial(_of_kind, kind, tensors, layout, added, unknown))
        for kind, tensors in kinds.items()
    ]
    if unknown and not kinds:
        checks.append(Check("added", False, f"{unknown[0]} was added, but config.json does not know it"))
    return checks


def _is_named(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _of_kind(kind: str, tensors: Mapping[str, Stored], layout: Layout, added: list[str], unknown: list[str]) -> Found:
    """The tensors of one kind have the shapes that config.json says, and hold something."""
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
        with safe_open(layout.root / info.shard, framework="pt") as file:
            tensor = file.get_tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            return False, f"{name} holds NaN or Inf"
        if bool((tensor == 0).all()) and not name.endswith(".gate"):  # a gate of 0 leaves a head as it is
            return False, f"{name} is all zeros: its {kind} are lost"
    return True, f"{len(expected)} tensors of {kind}, finite"


def _code(root: Path, described: Described) -> Found:
    """The Python files are exactly what this version writes (safe to run, and tested), and no other code is named."""
    config = described.config
    try:
        derived = derive(*described.converted)
    except KeyError:
        return False, f"config.json: model_type {config['model_type']!r} is not of the installed transformers"
    if config.get("auto_map") != derived.auto_map:
        return False, f"config.json: auto_map is not what this version of surgery writes; {_OTHER_VERSION}"
    settings = root / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_json(settings):
        return False, "tokenizer_config.json: auto_map names code, and surgery writes none for tokenizers"
    files = derived.files()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if files.pop(name, None) != path.read_text(encoding="utf-8", errors="replace"):
            return False, f"{name} is not what this version of surgery writes; {_OTHER_VERSION}"
    return (False, f"{min(files)} is missing") if files else (True, "Python files as this version writes them")


def _same_source(source: Source, manifest: Manifest) -> Found:
    recorded, found = manifest.source.get("sha256"), source_hashes(source)
    recorded = recorded if isinstance(recorded, dict) else {}
    if source.kind == "gguf":  # one file, whatever it is called by now
        same = [*found.values()] == [*recorded.values()]
        return same, f"{source.spec} is {'' if same else 'not '}what was converted" + ("" if same else " (SHA-256)")
    for name in sorted(found.keys() | recorded.keys()):
        if recorded.get(name) != found.get(name):
            return False, f"{source.spec}: {name} is not the file that was converted (SHA-256 differs)"
    return True, f"{source.spec} is what was converted"


def _kept(layout: Layout, manifest: Manifest, original: Layout, hashed: bool, may_change: bool) -> Found:
    """Every tensor of the source is there: as it was, or changed where an operation of the recipe changes tensors."""

    def identical(a: TensorInfo, b: TensorInfo) -> bool:
        same_file = hashed and manifest.files[a.shard].sha256 == manifest.source["sha256"][b.shard]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and (
            (same_file and a.start == b.start)
            or all(
                x == y
                for x, y in zip(iter_tensor_chunks(layout, a.name), iter_tensor_chunks(original, b.name), strict=True)
            )
        )

    statuses = ("kept", "changed") if may_change else ("kept",)
    for name, b in sorted(original.tensors.items()):
        a, status = layout.tensors.get(name), getattr(manifest.tensors.get(name), "status", None)
        if a is None or status not in statuses:
            return False, f"{name} of the source is not kept in the checkpoint"
        if status == "kept" and not identical(a, b):
            return False, f"{name} is not byte-identical to the source"
        if status == "changed" and (a.dtype, a.shape) != (b.dtype, b.shape):
            return False, f"{name} is {a.dtype} of shape {a.shape}, in the source it is {b.dtype} of shape {b.shape}"
        if status == "changed" and identical(a, b):
            return False, f"{name} is said to be changed, but it is byte-identical to the source"
    claimed = {name for name, entry in manifest.tensors.items() if entry.status != "added"}
    if invented := sorted(claimed - set(original.tensors)):
        return False, f"{invented[0]} is said to be of the source, but the source has no such tensor"
    changed = sum(entry.status == "changed" for entry in manifest.tensors.values())
    kept = f"{len(original.tensors) - changed} tensors byte-identical to the source"
    return True, f"{kept}, {changed} changed in place" if changed else kept
