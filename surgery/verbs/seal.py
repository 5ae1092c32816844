"""`surgery seal`: take edited documents and generation settings of a converted checkpoint into its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.contents import SIGNATURE, all_files, may_change
from ..checkpoint.copying import sha256_of
from ..checkpoint.disk import disk_errors, replacing
from ..checkpoint.manifest import MANIFEST, Manifest, read_manifest
from ..checkpoint.regular import read_json
from ..checkpoint.results import json_text
from ..checkpoint.signature import Signer, manifest_digest
from ..converted.reading import require_converted
from ..errors import DamagedCheckpoint, OutputError
from ..operations import OPERATIONS
from ..progress import SILENT, Reporter
from ..verification.integrity import check_integrity, read_config


def seal(checkpoint: Path | str, sign: Path | str | None = None, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write the hashes of edited documents and generation settings into the manifest of `checkpoint`, in place.

    With `sign`, a private key (PEM), all files are signed anew. The result: `changed`, relative name -> what became of
    it; `digest` of the manifest; `signature`, the fingerprint of the key, None where nothing was signed.
    DamagedCheckpoint where anything else is not as it was written; OutputError for a checkpoint in the hub's cache, and
    for one that is signed and would not be any more. Nothing is written then.
    """
    root = Path(checkpoint)
    signer = None if sign is None else Signer(Path(sign))
    require_converted(root)
    manifest = read_manifest(root)
    if links := [name for name, path in all_files(root).items() if path.is_symlink()]:
        raise OutputError(
            f"{root}: {links[0]} is a link, as in the hub's cache, which is not to be changed; seal a copy (cp -rL)."
        )
    reporter.step(f"check the files of {root}")
    with reporter.bar("hash", sum(entry.bytes for entry in manifest.files.values())) as advance:
        checks = check_integrity(root, manifest, read_config(root), OPERATIONS, None, None, None, advance)
    if failed := next((check for check in checks if not check.passed), None):
        raise DamagedCheckpoint(f"{failed.name}: {failed.detail.rstrip('.')}; nothing was sealed.")
    files, changed = _as_they_are(root, manifest)
    if changed and signer is None and (root / SIGNATURE).exists():
        raise OutputError(f"{root} is signed, and sealed anew it would not be; give --sign KEY, or remove {SIGNATURE}.")
    if changed:
        with disk_errors(root / MANIFEST), replacing(root / MANIFEST) as partial:
            partial.write_text(json_text({**read_json(root / MANIFEST), "files": files}), encoding="utf-8")
    signature = None if signer is None else signer.sign(root)
    return {"changed": changed, "digest": manifest_digest(root), "signature": signature}


def _as_they_are(root: Path, manifest: Manifest) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """`files` of the manifest with what may change as it is now; and what became of each such file."""
    present = {name: path for name, path in all_files(root).items() if path.is_file()}
    files = {name: entry.model_dump() for name, entry in manifest.files.items()}
    changed: dict[str, str] = {}
    for name in sorted({*files, *present}):
        if not may_change(name):
            continue
        if name not in present:
            del files[name]
            changed[name] = "removed"
            continue
        path = present[name]
        entry = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        if files.get(name) != entry:
            changed[name] = "edited" if name in files else "added"
            files[name] = entry
    return dict(sorted(files.items())), changed
