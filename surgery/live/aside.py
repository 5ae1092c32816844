"""Hidden states that wait for their next layer: in memory as far as that goes, else in a temporary file."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from ..endings.temporary import temporary, temporary_errors


class Aside:
    """Keeps at most `room` bytes of them in memory; what is more lies in a file, and its memory is let go meanwhile."""

    def __init__(self, room: int) -> None:
        self.room, self.held = room, 0
        self._end, self._free = 0, defaultdict[int, list[int]](list)  # of the file; places in it by size
        self._opened = contextlib.ExitStack()
        self._handle: int | None = None

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *exc: object) -> None:
        self._opened.close()

    @contextlib.contextmanager
    def put(self, states: torch.Tensor | None) -> Iterator[None]:
        """Within the block nobody looks at `states`: all that shares their storage has them back afterwards."""
        if states is None:
            yield
            return
        storage = states.untyped_storage()
        size = storage.nbytes()
        if states.device.type != "cpu":  # a GPU has less memory than the machine that it is in
            host = storage.cpu()
            storage.resize_(0)
            yield
            storage.resize_(size)
            storage.copy_(host)
            return
        if self.held + size <= self.room:
            self.held += size
            try:
                yield
            finally:
                self.held -= size
            return
        with temporary_errors():
            at = self._write(storage)
        storage.resize_(0)
        yield  # whoever is ended here does not need them back
        storage.resize_(size)
        with temporary_errors():
            _whole(os.preadv, self._file, storage, at)
        self._free[size].append(at)

    def _write(self, storage: torch.UntypedStorage) -> int:
        """Where in the file it now is."""
        size = storage.nbytes()
        if self._free[size]:
            at = self._free[size].pop()
        else:
            at, self._end = self._end, self._end + size
        _whole(os.pwritev, self._file, storage, at)
        return at

    @property
    def _file(self) -> int:
        if self._handle is None:
            path: Path = self._opened.enter_context(temporary()) / "states"
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._opened.callback(os.close, self._handle)
        return self._handle


def _whole(move, handle: int, storage: torch.UntypedStorage, at: int) -> None:
    """Move all bytes of `storage` to or from `handle`, which a call may do in parts."""
    memory = memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
    done = 0
    while done < len(memory):
        moved = move(handle, [memory[done:]], at + done)
        if not moved:
            raise OSError(5, "hidden states cannot be read back")
        done += moved
