"""Tensors read into memory of their own, in the order in which they lie in their files.

`layout.read_tensor` maps a file into memory instead: that costs nothing until it is looked at, and then the page cache,
of which nobody keeps account, and address space, of which there may be less than the file has.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import DamagedCheckpoint, SourceError
from .header import TensorInfo
from .layout import Layout
from .regular import open_regular

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

_ALIGNMENT = 64  # bytes: what vector instructions care for


def without_values(layout: Layout) -> dict[str, torch.Tensor]:
    """Tensors of the names, shapes and dtypes in `layout`, on the meta device."""
    return {
        info.name: torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.uint8), device="meta")
        for info in layout.tensors.values()
    }


def read_tensors(layout: Layout, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of these names as they are stored.

    DamagedCheckpoint where a file has become shorter, SourceError where it cannot be read.
    """
    infos = sorted((layout.tensors[name] for name in names), key=lambda info: (info.shard, info.start))
    found: dict[str, torch.Tensor] = {}
    for shard in dict.fromkeys(info.shard for info in infos):
        path = layout.root / shard
        try:
            with open_regular(path) as file:
                for info in infos:
                    if info.shard != shard:
                        continue
                    raw = _aligned(info)
                    file.seek(info.start)
                    if info.nbytes and file.readinto(raw.numpy()) != info.nbytes:  # type: ignore[attr-defined]
                        raise DamagedCheckpoint(f"{path} was truncated while it was read; restore it.")
                    found[info.name] = raw.view(DTYPES[info.dtype]).view(info.shape)
        except OSError as error:
            raise SourceError(f"{path} cannot be read ({error.strerror}); check the disk that it is on.") from error
    return found


def _aligned(info: TensorInfo) -> torch.Tensor:
    """Memory for the bytes of a tensor, aligned as they are where a file is mapped: products of a matrix and a vector
    round differently by where the matrix begins, and the two ways of reading are to give the same bits."""
    raw = torch.empty(info.nbytes + _ALIGNMENT, dtype=torch.uint8)
    shift = (info.start - raw.data_ptr()) % _ALIGNMENT
    if shift % DTYPES[info.dtype].itemsize:  # no tensor can begin there
        shift = 0
    return raw[shift : shift + info.nbytes]
