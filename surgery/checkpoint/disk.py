"""The disk: room, targets, hashes, and the operating system's errors in the words of a person."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..endings.owned import Owned
from ..endings.temporary import FULL, as_os_error, of_temporary
from ..errors import NoSpace, OutputError, SurgeryError
from ..words import human as human

_UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES)


def free_space(where: Path) -> int:
    """Bytes a plain user can still write on the filesystem that will hold `where` (which need not exist yet)."""
    path = Path(where).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def same_disk(where: Path, other: Path) -> bool:
    """Whether `other` is on the filesystem that will hold `where`, a new entry of a directory."""
    return Path(where).absolute().parent.stat().st_dev == Path(other).stat().st_dev


def require_space(where: Path, needed: int) -> None:
    """Raise NoSpace unless `needed` bytes fit on the filesystem of `where`."""
    free = free_space(where)
    if needed > free:
        raise NoSpace(
            f"{where} needs {human(needed)} but its disk has {human(free)} free; free some space or write to "
            "another disk."
        )


def require_target(out: Path, source_root: Path | None = None) -> None:
    """Raise OutputError unless `out` can become a new directory, outside `source_root` where that is given."""
    out, parent = Path(out), Path(out).parent
    require_name(out)
    if os.path.lexists(out):
        raise OutputError(f"{out} exists already; choose another path or remove it first.")
    if not os.path.isdir(parent):
        raise OutputError(f"{parent}, which is to hold {out.name}, is not a directory; create it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is not writable, so {out.name} cannot be created there; choose another path.")
    if source_root is not None and Path(source_root).resolve() in (parent.resolve(), *parent.resolve().parents):
        raise OutputError(f"{out} lies inside the source {source_root}, which stays untouched; choose another path.")


def require_name(path: Path) -> None:
    """Raise OutputError for a name that the file system or a manifest in UTF-8 cannot hold."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        raise OutputError(f"{path} is not UTF-8, and a manifest could not name it; choose another path.") from None
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in _UNUSABLE:
            raise OutputError(f"{path} cannot be written ({error.strerror}); choose another path.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` to write to, which takes the place of `path` once the block ends without an error.

    Until then `path` keeps its content. Errors are the operating system's own.
    """
    with Owned(path.parent, path.name) as owned:
        yield owned.inside
        with owned.inside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(owned.inside, path)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn the operating system's errors of writing below `where` into NoSpace or OutputError."""
    try:
        yield
    except Exception as error:
        if (found := as_os_error(error)) is not None:
            raise translated(found, where) from error
        raise


def translated(error: OSError, where: Path) -> SurgeryError:
    """NoSpace or OutputError for an error of the operating system while `where` was written."""
    if (temporary := of_temporary(error, where)) is not None:
        return temporary
    if error.errno == errno.EFBIG:
        return NoSpace(f"{where} holds a file larger than may be written here (ulimit -f, or the file system's limit).")
    if error.errno in FULL:
        return NoSpace(
            f"the disk filled up while {where} was written ({human(free_space(where))} free); nothing was "
            "kept, free some space and run again."
        )
    return OutputError(f"{where} cannot be written ({error.strerror or error}); check the path and its permissions.")
