"""What vouches for the manifest: a digest that was noted when it was written, or a signature of all files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.contents import SIGNATURE
from ..checkpoint.manifest import Manifest
from ..checkpoint.signature import PublicKey, manifest_digest, signed_by
from .checks import Check, Found, check


def check_seals(root: Path, digest: str | None, key: PublicKey | None) -> list[Check]:
    """The manifest against the `digest` that was noted, the files against the signature by `key`, where given."""
    checks = []
    if digest is not None:
        checks.append(check("digest", lambda: _same_digest(root, digest)))
    if key is not None:
        checks.append(check("signature", lambda: _signed(root, key)))
    return checks


def seals_said(root: Path, manifest: Manifest, digest: str | None, key: PublicKey | None, held: list[Check]) -> dict:
    """`status`, `digest` and `sealed` of a verdict. `held`: what `check_seals` found; only what passed is a seal."""
    passed = {check.name for check in held if check.passed}
    said: dict[str, Any] = {"status": manifest.status, "digest": manifest_digest(root)}
    said["sealed"] = {
        "signature": key.fingerprint if key is not None and "signature" in passed else None,
        "digest": digest if "digest" in passed else None,
    }
    return said


def seal_notes(root: Path, key: PublicKey | None) -> tuple[str, ...]:
    """What has to be told of a signature that nobody asked to be checked."""
    if key is not None or (by := signed_by(root)) is None:
        return ()
    return (f"signed (by the key {by}, as {SIGNATURE} says), signature not checked: give --public-key",)


def required_checks(manifest: Manifest, require: str | None) -> list[Check]:
    """What the caller asks of the manifest's status."""
    if require is None:
        return []
    found = f"it is {manifest.status}, as its manifest says"
    return [Check("status", manifest.status == require, found if manifest.status == require else
                  f"{found}, and {require} was asked for")]  # fmt: skip


def _same_digest(root: Path, digest: str) -> Found:
    found = manifest_digest(root)
    if found != digest:
        return False, f"surgery.json is {found}, and {digest} was given: it is not the manifest that was sealed"
    return True, f"surgery.json is {digest}"


def _signed(root: Path, key: PublicKey) -> Found:
    key.check(root)
    return True, f"all files signed by the key {key.fingerprint}"
