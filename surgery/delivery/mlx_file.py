"""A prompt cache of mlx-lm as a file, written and read without MLX.

The file is safetensors: of each layer its cache's state under "LAYER.PART", keys and values (1, H, n, D) first, then
integers as arrays without dimensions. The metadata are a flattened list: what the caller tells, the class of each
layer's cache, and which entries are integers (`save_prompt_cache` in mlx_lm/models/cache.py of mlx-lm 0.32; 0.31 had
another layout).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open


@dataclass(frozen=True)
class Kind:
    """The cache of one layer: mlx-lm's class, and of a rotating one how many tokens it holds."""

    name: str = "KVCache"
    window: int | None = None

    def integers(self, n: int) -> tuple[int, ...]:
        """What follows keys and values in its state, with `n` tokens in it: the offset; keep, max_size, _idx."""
        return (n,) if self.window is None else (n, 0, self.window, n)


def prompt_cache(
    slots: Sequence[tuple[torch.Tensor, torch.Tensor]], kinds: Sequence[Kind], told: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of the file: of each layer key (n, H, D) and value (n, H, E), its kind; `told` is free."""
    tensors: dict[str, torch.Tensor] = {}
    metadata = {f"0.{key}": value for key, value in told.items()}
    metadata |= {f"1.{layer}": kind.name for layer, kind in enumerate(kinds)}
    integers: list[str] = []
    for layer, (parts, kind) in enumerate(zip(slots, kinds, strict=True)):
        for index, part in enumerate(parts):
            tensors[f"{layer}.{index}"] = part.transpose(0, 1)[None].contiguous()
        for index, value in enumerate(kind.integers(len(parts[0])), start=len(parts)):
            integers.append(f"{layer}.{index}")
            tensors[integers[-1]] = torch.tensor(value, dtype=torch.int32)
    metadata["2.0"] = ""  # the list of integers begins with one that is empty
    for place, name in enumerate(integers, start=1):
        metadata |= {f"2.{place}.0": name, f"2.{place}.1": "scalar"}
    return tensors, metadata


def held_slots(path: Path, layers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Key (n, H, D) and value (n, H, E) of each layer in the file."""
    with safe_open(path, framework="pt") as file:
        parts = [
            [file.get_tensor(f"{layer}.{index}")[0].transpose(0, 1) for index in (0, 1)] for layer in range(layers)
        ]
    return [(key, value) for key, value in parts]
