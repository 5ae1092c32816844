"""Files copied by the kernel, and hashed: as fast as the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import BinaryIO

from ..progress import Advance, unseen
from .layout import CHUNK

PART = 64 << 20  # bytes that the kernel copies at a time, between which signals are heard
AHEAD = 4  # chunks that wait to be hashed
WORKERS = 4  # files that are hashed at a time, if there are as many processors
_FICLONE = 0x40049409  # of linux/fs.h: the copy shares the blocks of the original until one of them is written
_NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EBADF)


def copy_content(source: BinaryIO, target: BinaryIO) -> None:
    """All of `source` into the empty `target`: shared blocks, where the file system has them; else by the kernel, where
    it can; else by hand. OSError as it is."""
    try:
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        return
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    done = 0
    while True:
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), PART)
        except OSError as error:
            if done or error.errno not in _NOT_HERE:
                raise
            break
        if not copied:
            break
        done += copied
        to_disk(target, done - copied, copied)
    # What some file systems say of the end of a file is not to be believed: the rest, if any, by hand.
    source.seek(done)
    target.seek(done)
    while chunk := source.read(CHUNK):
        target.write(chunk)


def to_disk(file: BinaryIO, start: int, count: int) -> None:
    """Have the disk begin with what was written there, while the next is read: it is waited for at the end in any case.

    By the way the cache is spared what nobody is going to read soon.
    """
    with contextlib.suppress(OSError, AttributeError):  # advice, which not every system takes
        os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_DONTNEED)


def copy_tree(source: Path, target: Path) -> None:
    """All files below `source`; the first error ends it, where shutil would go on and make one error of all."""
    for path in sorted(source.rglob("*")):
        to = target / path.relative_to(source)
        if path.is_dir():
            to.mkdir(parents=True)
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to)


class Hashing:
    """A SHA-256 that a thread of its own computes, while the next bytes are read and written.

    Whoever gives it bytes leaves them as they are. Use as a context manager.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._waiting: Queue[memoryview | None] = Queue(AHEAD)
        self._thread = threading.Thread(target=self._work, name="hash", daemon=True)

    def __enter__(self) -> Hashing:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def update(self, data: bytes | memoryview) -> None:
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), CHUNK):  # so that few bytes wait, however many are given
            self._waiting.put(whole[start : start + CHUNK])

    def hexdigest(self) -> str:
        """Of all that was given."""
        self._end()
        return self._digest.hexdigest()

    def _end(self) -> None:
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (data := self._waiting.get()) is not None:
            self._digest.update(data)


def sha256_of(path: Path, advance: Advance = unseen) -> str:
    """SHA-256 of a file in hexadecimal, read a chunk at a time; `advance` is told of bytes, and of its name."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk), Path(path).name)
    return digest.hexdigest()


def sha256_of_all(paths: Mapping[str, Path], advance: Advance = unseen) -> dict[str, str]:
    """SHA-256 of each file by its name, several at a time; the first error of one is that of all. `advance` is told
    from here."""
    told: Queue[tuple[int, str] | None] = Queue()
    ended = threading.Event()

    def tell(count: int, what: str) -> None:
        if ended.is_set():
            raise InterruptedError  # whoever asked has left
        told.put((count, what))

    def hashed(path: Path) -> str:
        try:
            return sha256_of(path, tell)
        finally:
            told.put(None)

    with ThreadPoolExecutor(max(1, min(WORKERS, os.cpu_count() or 1)), thread_name_prefix="hash") as pool:
        try:
            found = {name: pool.submit(hashed, Path(path)) for name, path in paths.items()}
            left = len(found)
            while left:
                if (said := told.get()) is None:
                    left -= 1
                else:
                    advance(*said)
            return {name: one.result() for name, one in found.items()}
        finally:
            ended.set()
            pool.shutdown(cancel_futures=True)
