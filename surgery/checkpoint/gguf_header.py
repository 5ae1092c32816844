"""The header of a GGUF file, read with every length checked against the size of the file before it is believed.

The `gguf` package's own reader takes counts on trust (a flipped bit in one makes it loop for hours), so files are
checked here first. The tensors' values are left to that package.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DamagedCheckpoint, SourceError
from ..words import named
from .regular import is_lfs_pointer, lfs_pointer, open_regular

_VERSIONS = (2, 3)
_SCALAR = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LONGEST_ARRAY = 4096  # longer ones (vocabulary, merges, scores) are walked and kept as their length
_MAX_DIMS = 8
_AGAIN = "download it again"


@dataclass(frozen=True)
class Stored:
    """One tensor of a GGUF file: `shape` in torch order, `kind` a gguf.GGMLQuantizationType, `start` in the file."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Metadata (long arrays and arrays of strings as their length) and the tensor table of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[Stored, ...]

    @property
    def architecture(self) -> str:
        name: str = self.metadata["general.architecture"]
        return name


def read_header(path: Path) -> Header:
    """Header of the GGUF file `path`; SourceError if it cannot be one, DamagedCheckpoint if its bytes are wrong."""
    path = Path(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(64)
            if is_lfs_pointer(head):
                raise lfs_pointer(path)
            if head[:4] != b"GGUF" or size < 24:
                raise DamagedCheckpoint(f"{path} is not a GGUF file: it does not begin like one; {_AGAIN}.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, _Cursor(data))
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    except (struct.error, ValueError, OverflowError) as error:
        raise DamagedCheckpoint(
            f"{path} is truncated or damaged in its header ({named(error, 120)}); {_AGAIN}."
        ) from error


class _Cursor:
    """A position in the mapped file that cannot leave it."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def unpack(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise ValueError(f"{count} bytes at {self.at} reach beyond the end")
        self.at += count

    def string(self) -> str:
        start = self.at + 8
        self.skip(self.unpack("<Q"))
        return self.data[start : self.at].decode("utf-8")


def _parse(path: Path, cursor: _Cursor) -> Header:
    cursor.at = 4
    version = cursor.unpack("<I")
    if version not in _VERSIONS:
        raise DamagedCheckpoint(
            f"{path} has GGUF version {version}, and only 2 and 3 (little-endian) can be read; "
            "convert it with a current llama.cpp."
        )
    tensor_count, pair_count = cursor.unpack("<Q"), cursor.unpack("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the key {key!r} is there twice")
        metadata[key] = _value(cursor, cursor.unpack("<I"))
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("general.architecture is missing")
    if metadata.get("split.count") not in (None, 0, 1):
        raise SourceError(f"{path} is one part of a split GGUF; join the parts with: llama-gguf-split --merge.")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    table = [_table_entry(cursor) for _ in range(tensor_count)]
    return Header(path, metadata, _tensors(path, table, -(-cursor.at // alignment) * alignment, alignment, cursor))


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in _SCALAR:
        return cursor.unpack(_SCALAR[kind])
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        raise ValueError(f"a value of the unknown type {kind}")
    item, count = cursor.unpack("<I"), cursor.unpack("<Q")
    if item in _SCALAR:
        if count <= _LONGEST_ARRAY:
            return [cursor.unpack(_SCALAR[item]) for _ in range(count)]
        cursor.skip(count * struct.calcsize(_SCALAR[item]))
    elif item == _STRING:
        for _ in range(count):  # ends at the end of the file at the latest: each takes 8 bytes or more
            cursor.string()
    else:
        raise ValueError(f"an array of the unsupported type {item}")
    return count


def _table_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape in torch order, type number, offset in the data section)"""
    name, dims = cursor.string(), cursor.unpack("<I")
    if not 1 <= dims <= _MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {dims} dimensions")
    shape = [cursor.unpack("<Q") for _ in range(dims)]
    return name, tuple(reversed(shape)), cursor.unpack("<I"), cursor.unpack("<Q")


def _tensors(
    path: Path, table: list[tuple[str, tuple[int, ...], int, int]], base: int, alignment: int, cursor: _Cursor
) -> tuple[Stored, ...]:
    """The tensors with sizes; they must lie one after the other, aligned, and end where the file ends."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = len(cursor.data)
    stored = []
    for name, shape, number, offset in table:
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise ValueError(f"tensor {name!r} has the type {number}, unknown to the installed gguf package") from None
        if shape[-1] % block or not math.prod(shape):
            raise ValueError(f"tensor {name!r} of shape {shape} is not made of whole blocks")
        stored.append(Stored(name, shape, kind, base + offset, math.prod(shape) // block * block_bytes))
    if not stored:
        raise ValueError("it holds no tensors")
    if len({tensor.name for tensor in stored}) != len(stored):
        raise ValueError("a tensor is there twice")
    end = base
    for tensor in sorted(stored, key=lambda tensor: tensor.start):
        if tensor.start != -(-end // alignment) * alignment:
            raise ValueError(f"tensor {tensor.name!r} leaves a gap or overlaps another")
        end = tensor.start + tensor.nbytes
        if end > size:
            raise DamagedCheckpoint(
                f'{path} is truncated: tensor "{named(tensor.name)}" ends at byte {end}, the file at {size}; {_AGAIN}.'
            )
    if size - end >= alignment:
        raise DamagedCheckpoint(f"{path} has {size - end} trailing bytes after its last tensor; {_AGAIN}.")
    return tuple(stored)
