"""What killed processes have left: found, and removed where it is certain that nobody works in it any more."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .owned import MARK, OWNER, host, remove_tree, stem

_NAME = re.compile(r"(?:\..+\.)?surgery-[0-9a-f]{16}", re.DOTALL)
DYING = 2.0  # seconds
_MOST = 4096  # bytes of an owner's file

# dead: its process is gone. alive: it is being worked in. elsewhere: of another machine, whose locks are not seen here.
State = Literal["dead", "alive", "elsewhere"]


@dataclass(frozen=True)
class Leftover:
    """A directory that a process of surgery made: what it holds in bytes, and the process, as it was called there."""

    path: Path
    bytes: int
    process: int
    host: str
    state: State


def leftovers(parent: Path, name: str | None = None) -> list[Leftover]:
    """Every directory of the kind in `parent`, in the order of names; with `name` only those that were to become it.

    Links are never followed, and what another user made is not looked at. OSError where `parent` cannot be read.
    """
    begins = None if name is None else stem(parent, name)
    found = []
    for path in sorted(parent.iterdir()):
        if _NAME.fullmatch(path.name) and (begins is None or path.name[:-16] == begins):
            with _asked(path) as (state, owner):
                if state is not None:
                    found.append(Leftover(path, _size(path), owner["process"], owner["host"], state))
    return found


def clear(leftover: Leftover) -> bool:
    """Remove it if its process is gone still; whether it is removed."""
    with _asked(leftover.path) as (state, _):
        if state == "dead":
            remove_tree(leftover.path)
            return not leftover.path.exists()
    return False


def clear_for(out: Path) -> list[Leftover]:
    """Remove what dead processes left that were to write `out`; what was removed."""
    with contextlib.suppress(OSError):  # then `out` cannot be written either, which is told where it is written
        return [left for left in leftovers(out.parent, out.name) if clear(left)]
    return []


@contextlib.contextmanager
def _asked(path: Path) -> Iterator[tuple[State | None, dict[str, Any]]]:
    """Whose directory this is, None if not one of ours. While the block runs a dead one is locked by this process."""
    try:
        if not _own(os.lstat(path), stat.S_ISDIR):
            yield None, {}
            return
        lock = _opened(path)
    except OSError:
        yield None, {}
        return
    if lock is None:
        yield "dead", {"process": 0, "host": ""}
        return
    try:
        owner = _read(lock)
        yield (None, {}) if owner is None else (_state(lock, path, owner), owner)
    finally:
        os.close(lock)


def _opened(path: Path) -> int | None:
    """The owner's file, or None where its process was killed before there was one: then there is nothing else."""
    for name in (OWNER, f"{OWNER}.new"):
        with contextlib.suppress(FileNotFoundError):
            return os.open(path / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    if os.listdir(path):
        raise FileNotFoundError(path / OWNER)
    return None


def _read(lock: int) -> dict[str, Any] | None:
    if not _own(os.fstat(lock), stat.S_ISREG):
        return None
    data = os.read(lock, _MOST)
    if not data:  # killed before it was written
        return {"process": 0, **host()}
    try:
        owner = json.loads(data)
    except (ValueError, RecursionError):
        return None
    kinds = {"surgery": str, "process": int, "host": str, "boot": str}
    if not isinstance(owner, dict) or any(type(owner.get(key)) is not kind for key, kind in kinds.items()):
        return None
    return owner if owner["surgery"] == MARK else None


def _state(lock: int, path: Path, owner: dict[str, Any]) -> State:
    if not _locked(lock, owner["process"]):
        return "alive"
    if not os.path.exists(path):  # whoever held the lock has removed it meanwhile
        return "alive"
    # Over a network, and so between kernels, a lock may not be seen; after the same machine started anew none is held.
    here = host()
    return "dead" if owner["boot"] == here["boot"] or owner["host"] == here["host"] else "elsewhere"


def _locked(lock: int, process: int) -> bool:
    """Whether nobody else holds the lock. A process that was killed may have a child, which dies with it but not at
    once, and holds it meanwhile."""
    until = time.monotonic() + (DYING if _is_gone(process) else 0.0)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:  # locked, or on a file system without locks
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)


def _is_gone(process: int) -> bool:
    try:
        os.kill(process, 0) if process > 0 else None
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _own(found: os.stat_result, kind: Any) -> bool:
    return bool(kind(found.st_mode)) and found.st_uid == os.geteuid()


def _size(path: Path) -> int:
    """Bytes that go with it: files of which it has all the links (`--link` shares them with the source)."""
    links: dict[tuple[int, int], int] = {}
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(folder, name))
                key = (found.st_dev, found.st_ino)
                links[key] = links.get(key, 0) + 1
                total += found.st_size * (stat.S_ISREG(found.st_mode) and links[key] == found.st_nlink)
    return total
