"""surgery.json: what a converted checkpoint is made of, and what was proved about it."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import DamagedCheckpoint
from .layout import read_json

MANIFEST = "surgery.json"
TYPE_PREFIX = "eab_"  # what the model types of converted checkpoints begin with
NORM_PREFIX = "eab_norm_"  # those of checkpoints with head norms: what knows slots alone must not load them
FORMAT = 1
TENSOR_STATUS = ("kept", "changed", "added")
_REQUIRED = {
    "format": int,
    "status": str,
    "source": dict,
    "recipe": dict,
    "versions": dict,
    "tensors": dict,
    "files": dict,
}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def converted_from(model_type: object) -> tuple[str, bool] | None:
    """The model type that a converted one was made from, and whether it has head norms; None if it is no such type."""
    if not isinstance(model_type, str):
        return None
    for prefix in (NORM_PREFIX, TYPE_PREFIX):
        if model_type.startswith(prefix):
            return model_type[len(prefix) :], prefix == NORM_PREFIX
    return None


def build_manifest(
    *,
    source: dict,
    recipe: dict,
    versions: dict,
    tensors: dict[str, dict],
    files: dict[str, dict],
    verdict: dict | None,
) -> dict:
    """The content of surgery.json.

    source: id, revision and hashes; recipe: as parsed; versions: package name to version;
    tensors: {name: {"status": kept|changed|added, "shard", "dtype", "shape"}};
    files: {name: {"sha256", "bytes"}} of every file in the directory, surgery.json itself left out;
    verdict: what verification found. The status is "verified" only where a verdict says it passed.
    Raises ValueError for a tensor or file described otherwise: that is a bug of the caller.
    """
    for name, entry in tensors.items():
        if not _is_tensor_entry(entry):
            raise ValueError(f"tensor {name!r} needs status ({', '.join(TENSOR_STATUS)}), shard, dtype, shape: {entry}")
    for name, entry in files.items():
        if not _is_file_entry(name, entry):
            raise ValueError(f"file {name!r} needs a relative name, sha256 and bytes: {entry}")
    passed = verdict is not None and verdict.get("passed") is True
    return {
        "format": FORMAT,
        "status": "verified" if passed else "unverified",
        "source": source,
        "recipe": recipe,
        "versions": versions,
        "tensors": {name: {**tensors[name], "shape": list(tensors[name]["shape"])} for name in sorted(tensors)},
        "files": {name: files[name] for name in sorted(files) if name != MANIFEST},
        "verdict": verdict,
    }


def read_manifest(root: Path) -> dict:
    """The manifest of the directory `root`, its structure checked; DamagedCheckpoint where it is missing or invalid.

    File names in it are safe to open below `root`: relative, and without a way up.
    """
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing, so nothing says what belongs here; convert the source again.")
    manifest = read_json(path)

    def invalid(what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"{path} is not a valid manifest: {what}; convert the source again.")

    for key, kind in _REQUIRED.items():
        if type(manifest.get(key)) is not kind:
            raise invalid(f'"{key}" is missing or of the wrong type')
    if manifest["format"] != FORMAT:
        raise invalid(f'"format" is {manifest["format"]}, this version of surgery reads {FORMAT}')
    if manifest["status"] not in ("verified", "unverified"):
        raise invalid(f'"status" is {manifest["status"]!r}')
    if "verdict" not in manifest or not isinstance(manifest["verdict"], (dict, type(None))):
        raise invalid('"verdict" is missing or of the wrong type')
    for name, entry in manifest["tensors"].items():
        if not _is_tensor_entry(entry):
            raise invalid(f'tensor "{name}" is not described by status, shard, dtype and shape')
    for name, entry in manifest["files"].items():
        if name == MANIFEST or not _is_file_entry(name, entry):
            raise invalid(f'file "{name}" is not a relative name with sha256 and bytes')
    return manifest


def _is_tensor_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("status") in TENSOR_STATUS
        and isinstance(entry.get("shard"), str)
        and isinstance(entry.get("dtype"), str)
        and isinstance(entry.get("shape"), (list, tuple))
        and all(type(n) is int and n >= 0 for n in entry["shape"])
    )


def _is_file_entry(name: str, entry: object) -> bool:
    parts = name.split("/")
    safe = all(part not in ("", ".", "..") for part in parts) and "\\" not in name and "\0" not in name
    return (
        safe
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and entry["bytes"] >= 0
        and isinstance(entry.get("sha256"), str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )
