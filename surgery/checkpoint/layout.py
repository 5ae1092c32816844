"""What lies where in a safetensors checkpoint, read from the headers alone.

A safetensors file is an unsigned 64-bit little-endian header length, that many bytes of JSON, then the tensors' bytes
without gaps. All of it is checked here by hand: no torch, no weights read, and no size in the file is trusted before
it was compared with the size of the file. Offsets in `TensorInfo` count from the start of the file, in bytes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DamagedCheckpoint, SourceError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER = 100_000_000  # bytes; the limit of the format's reference implementation
CHUNK = 8 << 20  # bytes read at a time when a whole tensor need not be in memory
_LFS = b"version https://git-lfs"
_AGAIN = "download or save the checkpoint again"

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


@dataclass(frozen=True)
class Layout:
    """Every tensor and weight file of a checkpoint directory; `sizes` are whole files in bytes, headers included."""

    root: Path
    tensors: dict[str, TensorInfo]
    shards: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: its safetensors dtype code and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_layout(root: Path) -> Layout:
    """The layout of the safetensors checkpoint in `root`, from headers only.

    Raises SourceError where there is nothing to read (no directory, no weights, only pickles) and DamagedCheckpoint
    where index, headers and file sizes do not agree.
    """
    root = Path(root)
    if not root.is_dir():
        raise SourceError(f"{root} is not a directory; give the directory that holds config.json and the weights.")
    if os.path.lexists(root / INDEX):
        return _indexed_layout(root)
    if not os.path.lexists(root / SINGLE):
        raise _no_weights(root)
    size, tensors = _read_header(root, SINGLE)
    if not tensors:
        raise DamagedCheckpoint(f"{root / SINGLE} holds no tensors; download or save the checkpoint again.")
    return Layout(root, tensors, (SINGLE,), {SINGLE: size})


def _indexed_layout(root: Path) -> Layout:
    weight_map = _read_index(root)
    shards = tuple(sorted(set(weight_map.values())))
    if os.path.lexists(root / SINGLE) and SINGLE not in shards:
        raise DamagedCheckpoint(
            f"{root} holds both {SINGLE} and {INDEX}, which does not name it, so loaders disagree "
            "on which to load; remove the one that is stale."
        )
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[str, int] = {}
    for shard in shards:
        sizes[shard], found = _read_header(root, shard)
        for name, info in found.items():
            if name in tensors:
                raise DamagedCheckpoint(
                    f'Tensor "{name}" is in two shards of {root}, {tensors[name].shard} and {shard}; {_AGAIN}.'
                )
            if name not in weight_map:
                raise DamagedCheckpoint(
                    f'{root / shard} holds tensor "{name}", which {INDEX} does not name (a stale duplicate?); {_AGAIN}.'
                )
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            raise DamagedCheckpoint(
                f'{root / INDEX} puts tensor "{name}" in {shard}, but that shard lacks it; {_AGAIN}.'
            )
    return Layout(root, tensors, shards, sizes)


def _read_index(root: Path) -> dict[str, str]:
    """`weight_map` of the index: tensor name to shard, each shard a plain file name."""
    path = root / INDEX
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedCheckpoint(f'{path} has no "weight_map" that names tensors; {_AGAIN}.')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_name(shard):
            raise DamagedCheckpoint(
                f'{path} puts tensor "{name}" in {shard!r}, which is not a plain file name inside '
                "the directory; do not use this checkpoint unless you trust where it came from."
            )
        if not shard.endswith(".safetensors"):
            raise DamagedCheckpoint(
                f'{path} puts tensor "{name}" in {shard!r}, which is not a .safetensors file; '
                "save the checkpoint again with safe serialization."
            )
        if not os.path.lexists(root / shard):
            raise DamagedCheckpoint(f"{path} names the shard {shard}, which is missing; {_AGAIN}.")
    return weight_map


def is_plain_name(name: str) -> bool:
    """Whether `name` is a file name and nothing more: no separators, no parent, no control characters, UTF-8."""
    return name not in ("", ".", "..") and not any(c in "/\\:" or c < " " or "\ud800" <= c <= "\udfff" for c in name)


def _no_weights(root: Path) -> SourceError:
    names = sorted(entry.name for entry in root.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return SourceError(
            f"{root} holds only pickle weights ({pickles[0]}), which can run code when opened and are refused; if you "
            'trust them, convert them with: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{root}', dtype='auto').save_pretrained('{root}-safetensors')\" and copy the tokenizer "
            "files there."
        )
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return SourceError(f"{root} holds GGUF files and no safetensors weights; name the file: {root / ggufs[0]}.")
    return SourceError(f"{root} holds no weights ({SINGLE} or {INDEX}); give a complete checkpoint directory.")


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} is there twice")
        result[key] = value
    return result


def _parse_object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # lone surrogates would break every message later
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} is not valid JSON ({error}); {_AGAIN}.") from None
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{where} is not a JSON object; {_AGAIN}.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; DamagedCheckpoint for anything else, duplicate keys and Git-LFS pointers included."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    if raw.startswith(_LFS):
        raise lfs_pointer(path)
    return _parse_object(raw, str(path))


def lfs_pointer(path: Path) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path} is a Git-LFS pointer, not the file itself; fetch it with: git lfs pull.")


def is_lfs_pointer(head: bytes) -> bool:
    return head.startswith(_LFS)


def _read_header(root: Path, shard: str) -> tuple[int, dict[str, TensorInfo]]:
    """(file size, tensors by name) of one safetensors file; DamagedCheckpoint unless header and size fit exactly."""
    path = root / shard
    if not path.is_file():  # follows links: the hub cache keeps its files as links into blobs/
        raise DamagedCheckpoint(f"{path} is missing or not a file; {_AGAIN}.")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(len(_LFS))
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
    if not raw.startswith(b"{"):
        raise DamagedCheckpoint(f"{path} is not a safetensors file: its header is not JSON; download it again.")
    entries = _parse_object(raw, f"the header of {path}")
    entries.pop("__metadata__", None)
    base = 8 + length
    tensors = {name: _tensor_info(path, name, entry, base) for name, entry in entries.items()}
    position = base
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != position:
            raise DamagedCheckpoint(f'Tensor "{info.name}" in {path} leaves a gap or overlaps another; {_AGAIN}.')
        position = info.stop
    if position != size:
        wrong = "truncated" if size < position else "followed by trailing bytes"
        raise DamagedCheckpoint(f"{path} is {wrong}: {size} bytes instead of {position}; download it again.")
    return size, tensors


def _tensor_info(path: Path, name: str, entry: object, base: int) -> TensorInfo:
    def damaged(what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f'Tensor "{name}" in {path} {what}; {_AGAIN}.')

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(f"has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):  # bool is an int: not here
        raise damaged("has a shape that is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
        raise damaged("has data_offsets that are not two positions")
    start, stop = offsets
    if math.prod(shape) * BITS[dtype] != (stop - start) * 8:
        raise damaged(f"has {stop - start} bytes, which is not what shape {shape} and dtype {dtype} need")
    return TensorInfo(name, dtype, tuple(shape), path.name, base + start, base + stop)


def read_tensor_bytes(layout: Layout, name: str) -> memoryview:
    """The raw bytes of one tensor, memory-mapped: nothing is read before it is looked at."""
    info = layout.tensors[name]
    if not info.nbytes:
        return memoryview(b"")
    with (layout.root / info.shard).open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[info.start : info.stop]


def iter_tensor_chunks(layout: Layout, name: str, size: int = CHUNK) -> Iterator[bytes]:
    """The bytes of one tensor, at most `size` at a time; for comparing tensors larger than memory."""
    info = layout.tensors[name]
    with (layout.root / info.shard).open("rb") as file:
        file.seek(info.start)
        left = info.nbytes
        while left:
            chunk = file.read(min(size, left))
            if not chunk:
                raise DamagedCheckpoint(f"{layout.root / info.shard} was truncated while it was read; restore it.")
            left -= len(chunk)
            yield chunk
