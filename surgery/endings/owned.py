"""Directories that say whose they are, so that those of a process that was killed can be told from all others.

PARENT/.NAME.surgery-0123456789abcdef/     (surgery-0123456789abcdef/ among temporary files)
    owner     JSON; the process that owns the directory holds a lock (flock) on it for as long as it lives
    inside    what is being made: a file or a directory, whichever its maker creates

The lock dies with the process, however it dies: no id that another process may have by now has to be believed.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import platform
import secrets
import shutil
from pathlib import Path

from .signals import held, no_longer, on_ending

OWNER, INSIDE = "owner", "inside"
_NEW = "owner.new"  # until it is locked
_TRIES = 8
MARK = "a directory that surgery was working in"


class Owned:
    """A directory of this process in `parent`, gone at the end of the block, at exit, or when a signal ends a command.

    `name`: of what will take the place of `inside`. Errors are the operating system's own.
    """

    def __init__(self, parent: Path, name: str | None = None) -> None:
        self.parent, self.name = Path(parent), name
        self._path: Path | None = None
        self._lock: int | None = None
        self._process = os.getpid()

    @property
    def path(self) -> Path:
        if self._path is None:
            raise RuntimeError("the directory is not open")
        return self._path

    @property
    def inside(self) -> Path:
        return self.path / INSIDE

    def __enter__(self) -> Owned:
        with held():
            for left in reversed(range(_TRIES)):
                path = self.parent / f"{stem(self.parent, self.name)}{secrets.token_hex(8)}"
                path.mkdir(mode=0o700)
                self._path = path
                on_ending(id(self), self.remove)
                try:
                    self._lock = _owned(path, self.name)
                    break
                except BaseException as error:
                    self.remove()
                    # Who clears leftovers may have taken it for one, in the moment before it was locked.
                    if not (left and isinstance(error, FileNotFoundError)):
                        raise
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> Path | None:
        """Remove it with all that it holds; its path where it would not go. Another process's is left alone."""
        with held():
            path, self._path = self._path, None
            if path is None or os.getpid() != self._process:
                return None
            remove_tree(path)
            if path.exists():
                self._path = path
                atexit.register(self.remove)  # once more, when files that are open now have been closed
                return path
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
            no_longer(id(self))
            return None

    def last(self) -> Owned:
        """Open it for as long as the process lives; itself."""
        self.__enter__()
        atexit.register(self.remove)
        return self


def stem(parent: Path, name: str | None) -> str:
    """How names of such directories begin. They are longer than `name` is, and a file system has a longest one."""
    if name is None:
        return "surgery-"
    room = _longest(parent) - len("..surgery-") - 16
    return f".{os.fsencode(name)[:room].decode('utf-8', 'ignore')}.surgery-"


def host() -> dict[str, str]:
    """Which machine this is, and since when it is up: locks of others may not be seen here."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return {"host": platform.node(), "boot": boot}


def remove_tree(path: Path) -> None:
    """Remove `path` as far as it can be; the owner's file last, so that what is left can still be told."""
    for _ in range(3):  # another thread of ours may be writing still
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(path)):
                if entry.name != OWNER:
                    _remove(entry)
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(entry.path)


def _owned(path: Path, name: str | None) -> int:
    """Write and lock the owner's file of `path`; it has its name only once it is locked."""
    owner = {"surgery": MARK, "process": os.getpid(), **host(), "for": name}
    lock = os.open(path / _NEW, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:  # by who clears leftovers, and has looked at this one first
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        except OSError:  # a file system without locks: nobody will then take it for left over
            pass
        os.write(lock, json.dumps(owner).encode("ascii"))
        os.replace(path / _NEW, path / OWNER)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _longest(parent: Path) -> int:
    """Bytes that a name in `parent` may have."""
    try:
        return os.pathconf(parent, "PC_NAME_MAX")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 255
