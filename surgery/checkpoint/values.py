"""Tensors of torch as safetensors stores them: their bytes, their dtypes, and what a dtype on disk can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SourceError
from .header import TensorInfo
from .layout import Layout, read_tensor_bytes

if TYPE_CHECKING:
    import torch

_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "uint16": "U16", "uint32": "U32", "uint64": "U64", "complex64": "C64",
}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")  # what a changed value may be rounded to


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's values as safetensors stores them: contiguous, little-endian, no copy where it lies so already."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype ("F32" for torch.float32)."""
    return _CODES[str(dtype).removeprefix("torch.")]


def as_stored(info: TensorInfo, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype of the tensor on disk that it takes the place of.

    SourceError where the shape is another, or where that dtype cannot hold its values.
    """
    import torch

    if tuple(tensor.shape) != info.shape:
        raise SourceError(
            f'Tensor "{info.name}" in {info.shard} has shape {list(info.shape)}, and what would replace it has '
            f"{list(tensor.shape)}; convert a checkpoint that stores it as its model has it."
        )
    if dtype_code(tensor.dtype) == info.dtype:
        return tensor.detach()
    if info.dtype not in _FLOATS or not tensor.is_floating_point():
        raise SourceError(
            f'Tensor "{info.name}" in {info.shard} is stored as {info.dtype}, which cannot hold changed values of '
            f"{tensor.dtype}; convert a checkpoint in floating point."
        )
    name = next(name for name, code in _CODES.items() if code == info.dtype)
    stored = tensor.detach().to(getattr(torch, name))
    if bool((stored.isfinite() != tensor.isfinite()).any()):
        raise SourceError(
            f'Tensor "{info.name}" in {info.shard} is stored as {info.dtype}, and its changed values overflow that '
            "dtype; convert the checkpoint in a wider one."
        )
    return stored


def differs(layout: Layout, name: str, tensor: torch.Tensor) -> bool:
    """Whether `tensor`, stored in the place of `name`, would be other bytes. SourceError where it does not fit."""
    return tensor_bytes(as_stored(layout.tensors[name], tensor)) != read_tensor_bytes(layout, name)
