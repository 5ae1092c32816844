"""The header of a safetensors file: what tensors are in it, and where.

A safetensors file is an unsigned 64-bit little-endian header length, that many bytes of JSON, then the tensors' bytes
without gaps. All of it is checked here by hand: no torch, no weights read, and no size in the file is trusted before
it was compared with the size of the file. Offsets in `TensorInfo` count from the start of the file, in bytes.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import DamagedCheckpoint, SourceError
from ..words import named
from .regular import AGAIN, is_lfs_pointer, lfs_pointer, open_regular, parse_object

MAX_HEADER = 100_000_000  # bytes; the limit of the format's reference implementation
MAX_DIMS = 64  # no tensor has more; torch and numpy know no more
MAX_METADATA = 10_000  # entries, none of which loaders need but the format
MAX_NUMBER = 2**63  # sizes and offsets are below it, as in the reference implementation and in torch

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip  # bits per element, by safetensors dtype code


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: `start` to `stop` are absolute byte offsets in the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_header(
    root: Path, shard: str, elsewhere: tuple[int, bytes] | None = None
) -> tuple[int, dict[str, TensorInfo]]:  # fmt: skip
    """(file size, tensors by name) of one safetensors file; DamagedCheckpoint unless header and size fit exactly.

    `elsewhere`: size and first bytes of a file that is not in `root`.
    """
    path = root / shard
    size, raw = _raw_header(path, elsewhere)
    entries = parse_object(raw, f"the header of {path}")
    _check_metadata(path, entries.pop("__metadata__", None))
    base = 8 + len(raw)
    tensors = {name: _tensor_info(path, name, entry, base) for name, entry in entries.items()}
    position = base
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != position:
            raise DamagedCheckpoint(f'Tensor "{named(info.name)}" in {path} leaves a gap or overlaps another; {AGAIN}.')
        position = info.stop
    if position != size:
        wrong = "truncated" if size < position else "followed by trailing bytes"
        raise DamagedCheckpoint(f"{path} is {wrong}: {size} bytes instead of {position}; download it again.")
    return size, tensors


def _raw_header(path: Path, elsewhere: tuple[int, bytes] | None) -> tuple[int, bytes]:
    """The file's size, and the bytes of its header."""
    if elsewhere is None and not path.is_file():  # follows links: the hub cache keeps its files as links into blobs/
        raise DamagedCheckpoint(f"{path} is missing or not a file; {AGAIN}.")
    try:
        with open_regular(path) if elsewhere is None else io.BytesIO(elsewhere[1]) as file:
            size = os.fstat(file.fileno()).st_size if elsewhere is None else elsewhere[0]
            head = file.read(64)
            if is_lfs_pointer(head):
                raise lfs_pointer(path)
            length = int.from_bytes(head[:8], "little")
            if size < 8 or length < 2 or length > min(size - 8, MAX_HEADER):
                raise DamagedCheckpoint(
                    f"{path} is truncated or not a safetensors file: its header cannot fit in "
                    f"{size} bytes; download it again."
                )
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    if len(raw) != length:
        raise DamagedCheckpoint(f"{path} was truncated while it was read; restore it.")
    if not raw.startswith(b"{"):
        raise DamagedCheckpoint(f"{path} is not a safetensors file: its header is not JSON; download it again.")
    return size, raw


def _check_metadata(path: Path, metadata: object) -> None:
    """DamagedCheckpoint unless it is as loaders take it: texts by name, or nothing."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedCheckpoint(f'"__metadata__" in the header of {path} is not an object of texts; {AGAIN}.')
    if len(metadata) > MAX_METADATA:
        raise DamagedCheckpoint(f'"__metadata__" in the header of {path} has {len(metadata):,} entries; {AGAIN}.')


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_NUMBER  # bool is an int: not here


def _tensor_info(path: Path, name: str, entry: object, base: int) -> TensorInfo:
    def damaged(what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f'Tensor "{named(name)}" in {path} {what}; {AGAIN}.')

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(f"has the unknown dtype '{named(dtype, 40)}'")
    if not isinstance(shape, list) or not all(_is_number(n) for n in shape):
        raise damaged("has a shape that is not a list of sizes")
    if len(shape) > MAX_DIMS:
        raise damaged(f"has {len(shape)} dimensions, more than {MAX_DIMS}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_number(n) for n in offsets):
        raise damaged("has data_offsets that are not two positions")
    start, stop = offsets
    if (count := _count(shape)) is None:
        raise damaged("has a shape of more elements than can be counted")
    if count * BITS[dtype] != (stop - start) * 8:
        raise damaged(f"has {stop - start} bytes, which is not what shape {named(shape, 60)} and dtype {dtype} need")
    return TensorInfo(name, dtype, tuple(shape), path.name, base + start, base + stop)


def _count(shape: list[int]) -> int | None:
    """How many elements a tensor of `shape` has; None where a number on the way to it is out of range."""
    count = 1
    for size in shape:
        count *= size
        if count >= MAX_NUMBER:
            return None
    return count
