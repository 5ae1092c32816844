"""Which files of a directory are its own: a link in a stranger's checkpoint can name any file of this machine."""

from __future__ import annotations

from pathlib import Path

from ..errors import SourceError
from ..words import named

TEMPLATES = "additional_chat_templates"  # the one directory that transformers looks into for itself


def in_hub_cache(root: Path, link: Path) -> bool:
    """Whether `link` in the directory `root` is how the client's cache keeps a file: snapshots/COMMIT/name is a link to
    ../../blobs/HASH, which in turn may be one into the blobs that all repositories share."""
    if not link.is_file() or root.resolve().parent.name != "snapshots":
        return False
    repository, file = root.resolve().parent.parent, link.resolve()
    shared = repository.parent / "blobs" / file.name[:2]
    return file.parent in (repository / "blobs", shared)


def require_own_files(root: Path) -> None:
    """SourceError where an entry of `root` is a link that leaves it for another place than the hub cache's blobs, or is
    neither file nor directory (a pipe or a device, whose reading need not end)."""
    home = root.resolve()
    try:
        entries = sorted(root.iterdir())
        if (templates := root / TEMPLATES).is_dir():
            entries += sorted(templates.iterdir())
        for entry in entries:
            _require_own(root, home, entry)
    except OSError as error:
        raise SourceError(f"{error.filename or root} cannot be read ({error.strerror}); check permissions.") from error


def _require_own(root: Path, home: Path, entry: Path) -> None:
    name = named(entry.relative_to(root).as_posix())
    if entry.is_symlink():
        # A link that leads nowhere is reported as missing by whoever needs it.
        if entry.exists() and home not in entry.resolve().parents and not in_hub_cache(root, entry):
            raise SourceError(
                f"{root}: {name} is a link to {named(entry.resolve())}, outside the checkpoint; put the file itself "
                "there, or remove the link."
            )
    if entry.exists() and not entry.is_file() and not entry.is_dir():
        raise SourceError(f"{root}: {name} is a pipe or a device, not a file; remove it.")
