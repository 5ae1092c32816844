"""`surgery push`: a converted checkpoint, sent to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.manifest import MANIFEST
from ..checkpoint.pushing import MAIN, push_files, require_push
from ..converted.reading import require_converted
from ..errors import SourceError
from ..progress import SILENT, Reporter
from ..report.verdict import sentences
from ..version import VERSION
from .verify import require_sound


def push(checkpoint: Path | str, to: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Make the hub's branch `to` ("owner/name", or "owner/name@branch") hold what the directory `checkpoint` holds.

    One commit, after the files have been checked as `verify` does. A repository that does not exist is created,
    private. Returns {"id": to verify it by, "revision": the commit, "url", "private"}. Raises SourceError and
    OutputError where it cannot be pushed, DamagedCheckpoint where it is not as it was written.
    """
    root = Path(checkpoint)
    # 1. Everything that can be refused before a byte is sent.
    require_converted(root)
    if not (root / MANIFEST).is_file():
        raise SourceError(f"{root} has no {MANIFEST}, so nobody could verify it; push it by hand: hf upload.")
    destination = require_push(to)
    manifest, _ = require_sound(root, "pushed", reporter)
    # 2. One commit.
    reporter.step(f"push {root} to {destination.id}")
    message = f"surgery {VERSION}: {manifest.status}"
    description = "\n".join(sentences(manifest.verdict)) if manifest.verdict is not None else ""
    commit = push_files(root, manifest, destination, message, description)
    repo, branch = destination.id.repo, destination.id.revision
    return {
        "id": repo if branch == MAIN else str(destination.id),
        "revision": commit,
        "url": _url(repo, commit),
        "private": destination.private is None or destination.private,
    }


def _url(repo: str, commit: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}/tree/{commit}"
