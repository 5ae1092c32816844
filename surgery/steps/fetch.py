"""What a command reads that may lie on the hub: brought to this disk, with progress."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint.hub import HubId, Snapshot, download, hub_id, sizes_of
from ..checkpoint.manifest import read_manifest
from ..checkpoint.source import Source, fetch_small, materialise
from ..converted.reading import is_converted, require_converted
from ..errors import SourceError
from ..progress import Reporter


def on_hub(spec: Path | str, revision: str | None = None) -> HubId | None:
    """The hub id that `spec` is, where nothing on this disk has that name."""
    return None if os.path.lexists(os.path.expanduser(spec)) else hub_id(str(spec), revision)


def fetch_weights(source: Source, reporter: Reporter) -> Path:
    """The directory of a source that is none of GGUF, with its weights in it."""
    if not source.missing:
        return materialise(source, source.root)
    reporter.step(f"download {source.spec}")
    with reporter.bar("download", sum(source.missing.values()), of_bytes=True) as advance:
        return materialise(source, source.root, advance)


def fetch_converted(checkpoint: Path | str, reporter: Reporter) -> Path:
    """The directory of a converted checkpoint, all of whose files are downloaded first where it is a hub id.

    Where the hub cannot be asked, the cache will do if it has every file of the manifest. Raises SourceError, before
    anything large is downloaded, where it is no converted checkpoint.
    """
    at = on_hub(checkpoint)
    if at is None:
        require_converted(Path(checkpoint))
        return Path(checkpoint)
    snapshot = fetch_small(at)
    if not is_converted(snapshot.root):
        raise SourceError(f"{at} is not a converted checkpoint; give the output of a run.")
    return fetch_all(snapshot, reporter)


def fetch_all(snapshot: Snapshot, reporter: Reporter) -> Path:
    """All files of a converted checkpoint on the hub; the directory that they are in."""
    try:
        sizes = sizes_of(snapshot)
    except SourceError:
        if not all((snapshot.root / name).exists() for name in read_manifest(snapshot.root).files):
            raise
        return snapshot.root
    missing = {name: size for name, size in sizes.items() if not (snapshot.root / name).exists()}
    if missing:
        reporter.step(f"download {snapshot.id}")
        with reporter.bar("download", sum(missing.values()), of_bytes=True) as advance:
            download(snapshot, missing, advance)
    return snapshot.root
