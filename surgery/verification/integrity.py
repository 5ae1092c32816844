"""Integrity of a converted checkpoint: the files are those of the manifest, and the tensors are what they claim to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ..checkpoint.layout import Layout, iter_tensor_chunks, read_json, read_layout
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.source import Source, source_hashes
from ..checkpoint.stage import sha256_of
from ..errors import SurgeryError
from ..operations.derived import PREFIX, derive


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `detail` says what was found, in words, naming the file or tensor at fault."""

    name: str
    passed: bool
    detail: str


def integrity_to_dict(checks: list[Check]) -> dict:
    return {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}


def check_integrity(
    root: Path, manifest: dict, source: Source | None, source_dir: Path | None, progress: Callable[[int], None] = lambda done: None
) -> list[Check]:
    """Every check on the files in `root`; against `source` (plain files in `source_dir`) where it is given."""
    checks = [_check("files", lambda: _files(root, manifest, progress))]
    try:
        layout = read_layout(root)
    except SurgeryError as error:
        return [*checks, Check("tensors", False, str(error))]
    checks.append(_check("tensors", lambda: _tensors(layout, manifest)))
    checks.append(_check("slots", lambda: _slots(layout, manifest, read_json(root / "config.json"))))
    checks.append(_check("code", lambda: _code(root)))
    if source is not None:
        checks.append(_check("source", lambda: _same_source(source, manifest)))
        checks.append(_check("kept tensors", lambda: _kept(layout, manifest, read_layout(source_dir))))
    return checks


def _check(name: str, look: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *look())
    except SurgeryError as error:
        return Check(name, False, str(error))


def _files(root: Path, manifest: dict, progress) -> tuple[bool, str]:
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
    expected = set(manifest["files"])
    if missing := sorted(expected - present):
        return False, f"{missing[0]} is missing ({len(missing)} of {len(expected)} files)"
    if extra := sorted(present - expected - {MANIFEST}):
        return False, f"{extra[0]} is not in {MANIFEST} ({len(extra)} files were added)"
    for name, entry in manifest["files"].items():
        path = root / name
        if path.is_symlink():
            return False, f"{name} is a link, and its target is not part of the checkpoint"
        if path.stat().st_size != entry["bytes"] or sha256_of(path, progress) != entry["sha256"]:
            return False, f"{name} is not the file that was written (SHA-256 differs)"
    return True, f"{len(expected)} files, SHA-256 as written"


def _tensors(layout: Layout, manifest: dict) -> tuple[bool, str]:
    found = {t.name: (t.shard, t.dtype, list(t.shape)) for t in layout.tensors.values()}
    planned = {name: (t["shard"], t["dtype"], list(t["shape"])) for name, t in manifest["tensors"].items()}
    for name in sorted(found.keys() | planned.keys()):
        if found.get(name) != planned.get(name):
            return False, f"{name} is {found.get(name, 'missing')}, planned was {planned.get(name, 'nothing')}"
    return True, f"{len(found)} tensors as planned, each in one shard"


def _slots(layout: Layout, manifest: dict, config: dict) -> tuple[bool, str]:
    eab = config.get("eab")
    if not isinstance(eab, dict) or not isinstance(eab.get("sites"), dict) or not isinstance(eab.get("n_slots"), int):
        return False, "config.json has no eab entry that describes the slots"
    added = [name for name, entry in manifest["tensors"].items() if entry["status"] == "added"]
    for name in added:
        if not any(name.endswith(f"{site}.attention_bias.{part}") for site in eab["sites"] for part in ("key", "value")):
            return False, f"{name} was added, but config.json's eab.sites does not know it"
    if len(added) != 2 * len(eab["sites"]):
        return False, f"{len(added)} slot tensors for {len(eab['sites'])} sites"
    for shard in sorted({layout.tensors[name].shard for name in added}):
        with safe_open(layout.root / shard, framework="pt") as file:
            for name in (name for name in added if layout.tensors[name].shard == shard):
                tensor = file.get_tensor(name)
                if tensor.shape[0] != eab["n_slots"] or tensor.dtype != torch.float32:
                    return False, f"{name} is {tensor.dtype} with {tensor.shape[0]} slots, config.json says {eab['n_slots']} in float32"
                if not bool(torch.isfinite(tensor).all()):
                    return False, f"{name} holds NaN or Inf"
                if bool((tensor == 0).all()):
                    return False, f"{name} is all zeros: its slots are lost"
    return True, f"{len(added)} slot tensors, finite"


def _code(root: Path) -> tuple[bool, str]:
    """The Python files are exactly what this version of surgery writes: safe to run, and tested."""
    model_type = read_json(root / "config.json").get("model_type", "")
    try:
        files = derive(model_type.removeprefix(PREFIX)).files()
    except KeyError:
        return False, f"config.json: model_type {model_type!r} is not a converted type of the installed transformers"
    for path in sorted(root.glob("*.py")):
        if files.pop(path.name, None) != path.read_text(encoding="utf-8", errors="replace"):
            return False, f"{path.name} is not what this version of surgery writes; verify with the version named in {MANIFEST}"
    return (False, f"{min(files)} is missing") if files else (True, "Python files as this version writes them")


def code_is_ours(root: Path) -> bool:
    """Whether the Python files in `root` may be run: they are byte for byte what this version writes."""
    return _check("code", lambda: _code(root)).passed


def _same_source(source: Source, manifest: dict) -> tuple[bool, str]:
    recorded = manifest["source"].get("sha256", {})
    for name, digest in source_hashes(source).items():
        if recorded.get(name) != digest:
            return False, f"{source.spec}: {name} is not the file that was converted (SHA-256 differs)"
    return True, f"{source.spec} is what was converted"


def _kept(layout: Layout, manifest: dict, original: Layout) -> tuple[bool, str]:
    kept = [name for name, entry in manifest["tensors"].items() if entry["status"] == "kept"]
    if lost := sorted(set(original.tensors) - set(manifest["tensors"])):
        return False, f"{lost[0]} of the source is not in the checkpoint"
    for name in kept:
        if name not in original.tensors or name not in layout.tensors:
            return False, f"{name} is said to be kept, but is not in both"
        a, b = layout.tensors[name], original.tensors[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape) or any(
            x != y for x, y in zip(iter_tensor_chunks(layout, name), iter_tensor_chunks(original, name))
        ):
            return False, f"{name} is not byte-identical to the source"
    return True, f"{len(kept)} tensors byte-identical to the source"
