"""`surgery clean`: remove what processes of surgery left behind that were killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..endings.leftovers import Leftover, clear, leftovers
from ..endings.temporary import temporary_root
from ..errors import SourceError


def clean(directory: Path | str | None = None, *, dry_run: bool = False) -> dict[str, Any]:
    """Remove what killed processes left in `directory` (where outputs are written) and among temporary files.

    Only directories that surgery made, of this user, whose process is gone. `dry_run` removes nothing. Returns
    {"removed", "kept": [{"path", "bytes", "process", "host", "state"}], "bytes": of all that was removed}; with
    `dry_run`, "removed" is what would be. Raises SourceError where a directory cannot be read.
    """
    places = [temporary_root()] if directory is None else [Path(directory), temporary_root()]
    found: dict[Path, Leftover] = {}
    for place in places:
        try:
            found |= {left.path.resolve(): left for left in leftovers(place)}
        except OSError as error:
            raise SourceError(f"{place} cannot be read ({error.strerror}); give the directory of an output.") from error
    removed: list[Leftover] = []
    kept: list[Leftover] = []
    for left in found.values():
        gone = left.state == "dead" and (dry_run or clear(left))
        (removed if gone else kept).append(left)
    return {
        "removed": [_entry(left) for left in removed],
        "kept": [_entry(left) for left in kept],
        "bytes": sum(left.bytes for left in removed),
    }


def _entry(left: Leftover) -> dict[str, Any]:
    return {
        "path": str(left.path),
        "bytes": left.bytes,
        "process": left.process,
        "host": left.host,
        "state": left.state,
    }
