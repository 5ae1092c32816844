"""What lies where in a safetensors checkpoint, read from the headers alone."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DamagedCheckpoint, SourceError
from ..words import named
from .elsewhere import NOWHERE, Elsewhere
from .header import TensorInfo, read_header
from .regular import AGAIN, is_plain_name, read_json

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
CHUNK = 8 << 20  # bytes read at a time when a whole tensor need not be in memory


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

    def of_shard(self, shard: str) -> list[TensorInfo]:
        """The tensors of one file, in the order in which they lie there."""
        return sorted((t for t in self.tensors.values() if t.shard == shard), key=lambda t: (t.start, t.stop))


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: its safetensors dtype code and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_layout(root: Path, elsewhere: Elsewhere = NOWHERE) -> Layout:
    """The layout of the safetensors checkpoint in `root`, from headers only; of weights `elsewhere`, from there.

    Raises SourceError where there is nothing to read (no directory, no weights, only pickles) and DamagedCheckpoint
    where index, headers and file sizes do not agree.
    """
    root = Path(root)
    if not root.is_dir():
        raise SourceError(f"{root} is not a directory; give the directory that holds config.json and the weights.")
    if os.path.lexists(root / INDEX):
        return _indexed_layout(root, elsewhere)
    if not elsewhere.holds(root, SINGLE):
        raise _no_weights(root)
    size, tensors = read_header(root, SINGLE, elsewhere.of([SINGLE]).get(SINGLE))
    if not tensors:
        raise DamagedCheckpoint(f"{root / SINGLE} holds no tensors; download or save the checkpoint again.")
    return Layout(root, tensors, (SINGLE,), {SINGLE: size})


def _indexed_layout(root: Path, elsewhere: Elsewhere) -> Layout:
    weight_map = _read_index(root, elsewhere)
    shards = tuple(sorted(set(weight_map.values())))
    if elsewhere.holds(root, SINGLE) and SINGLE not in shards:
        raise DamagedCheckpoint(
            f"{root} holds both {SINGLE} and {INDEX}, which does not name it, so loaders disagree "
            "on which to load; remove the one that is stale."
        )
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[str, int] = {}
    heads = elsewhere.of(shards)
    for shard in shards:
        sizes[shard], found = read_header(root, shard, heads.get(shard))
        for name, info in found.items():
            if name in tensors:
                raise DamagedCheckpoint(
                    f'Tensor "{named(name)}" is in two shards of {root}, {tensors[name].shard} and {shard}; {AGAIN}.'
                )
            if name not in weight_map:
                raise DamagedCheckpoint(
                    f'{root / shard} holds tensor "{named(name)}", which {INDEX} does not name (a stale duplicate?); '
                    f"{AGAIN}."
                )
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            raise DamagedCheckpoint(
                f'{root / INDEX} puts tensor "{named(name)}" in {named(shard)}, but that shard lacks it; {AGAIN}.'
            )
    return Layout(root, tensors, shards, sizes)


def _read_index(root: Path, elsewhere: Elsewhere) -> dict[str, str]:
    """`weight_map` of the index: tensor name to shard, each shard a plain file name."""
    path = root / INDEX
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedCheckpoint(f'{path} has no "weight_map" that names tensors; {AGAIN}.')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_name(shard):
            raise DamagedCheckpoint(
                f'{path} puts tensor "{named(name)}" in "{named(shard)}", which is not a plain file name inside '
                "the directory; do not use this checkpoint unless you trust where it came from."
            )
        if not shard.endswith(".safetensors"):
            raise DamagedCheckpoint(
                f'{path} puts tensor "{named(name)}" in "{named(shard)}", which is not a .safetensors file; '
                "save the checkpoint again with safe serialization."
            )
    for shard in dict.fromkeys(weight_map.values()):
        if not elsewhere.holds(root, shard):
            raise DamagedCheckpoint(f"{path} names the shard {named(shard)}, which is missing; {AGAIN}.")
    return weight_map


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


def read_tensor(layout: Layout, name: str) -> torch.Tensor:
    """One tensor as it is stored."""
    from safetensors import safe_open

    with safe_open(layout.root / layout.tensors[name].shard, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


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
