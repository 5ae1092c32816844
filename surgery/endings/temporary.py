"""Temporary directories: in $TMPDIR, owned, and errors that name it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import NoTemporary
from ..words import human
from .owned import Owned

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_INSTEAD = "set TMPDIR to a directory on a disk with room"
_OURS = re.compile(r"surgery-[0-9a-f]{16}|tmp[a-z0-9_]{8}|pymp-[a-z0-9_]{8}")  # and those of Python's own modules
_OF_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers raise errors of their own with this in them


def temporary_root() -> Path:
    """$TMPDIR where it is set: one that cannot be used is refused, not passed over for /tmp. Else what the system has.

    Raises NoTemporary where there is none.
    """
    if given := os.environ.get("TMPDIR"):
        root = Path(os.path.abspath(given))
        if not os.path.isdir(root):
            raise NoTemporary(f"the temporary directory {root} (TMPDIR) is not a directory; {_INSTEAD}.")
        return root
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise NoTemporary(f"there is no temporary directory that can be written to; {_INSTEAD}.") from error


@contextlib.contextmanager
def temporary(needed: int = 0) -> Iterator[Path]:
    """A new empty directory for `needed` bytes, gone at the end of the block. NoTemporary without one."""
    root = temporary_root()
    with contextlib.ExitStack() as opened:
        with temporary_errors():
            free = _free(root)
            owned = opened.enter_context(Owned(root))
            owned.inside.mkdir()
        if needed > free:
            raise NoTemporary(
                f"the temporary directory {root} needs {human(needed)} and has {human(free)} free; {_INSTEAD}."
            )
        yield owned.inside


def lasting_temporary() -> Path:
    """A new empty directory that is gone at the end of the process; errors as above."""
    root = temporary_root()
    with temporary_errors():
        owned = Owned(root).last()
        owned.inside.mkdir()
        return owned.inside


@contextlib.contextmanager
def temporary_errors() -> Iterator[None]:
    """A block that touches only temporary files: the operating system's errors are about them."""
    try:
        yield
    except OSError as error:
        raise _told(error) from error


def of_temporary(error: BaseException, where: Path | None = None) -> NoTemporary | None:
    """NoTemporary if `error`, or what caused it, is of a temporary file; None if not.

    `where`: what was written when it was raised, for errors that do not say so.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, NoTemporary):
            return link
        if (found := as_os_error(link)) is not None and _is_temporary(found, where):
            return _told(found)
        link = link.__cause__ or link.__context__
    return None


def as_os_error(error: BaseException) -> OSError | None:
    """`error` as the operating system's, also where a library written in Rust has wrapped it; None if it is another."""
    if isinstance(error, OSError):
        return error
    found = _OF_RUST.search(str(error)) if isinstance(error, Exception) else None
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def _is_temporary(error: OSError, where: Path | None) -> bool:
    if "No usable temporary directory" in str(error):
        return True
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    if not names and where is not None:
        names = [os.fspath(where)]
    try:
        root = os.path.realpath(temporary_root())
    except NoTemporary:  # then nothing has been written there
        return False
    for name in map(os.path.realpath, names):
        inner = os.path.relpath(name, root).split(os.sep)[0]
        if _OURS.fullmatch(inner):
            return True
    return False


def _told(error: OSError) -> NoTemporary:
    root = temporary_root()
    if error.errno in FULL:
        return NoTemporary(f"the disk of the temporary directory {root} is full; {_INSTEAD}.")
    return NoTemporary(f"the temporary directory {root} cannot be written ({error.strerror or error}); {_INSTEAD}.")


def _free(root: Path) -> int:
    found = os.statvfs(root)
    return found.f_bavail * found.f_frsize
