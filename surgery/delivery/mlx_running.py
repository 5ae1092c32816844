"""Models in mlx-lm, which has to be installed for this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.models.cache import RotatingKVCache, load_prompt_cache, make_prompt_cache
from mlx_lm.utils import load_model

from ..errors import UnsupportedModel, brief, out_of_memory
from .mlx_file import Kind

CACHES = ("KVCache", "RotatingKVCache")  # those that hold keys and values, and nothing else


def built(root: Path) -> Any:
    """mlx-lm's model for the checkpoint in `root`, whose weights are read when they are needed; some may be missing."""
    try:
        return load_model(root, lazy=True, strict=False)[0]
    except (Exception, SystemExit) as error:  # each of its models reads a config in its own way; OLMo's exits
        if out_of_memory(error):
            raise
        raise UnsupportedModel(f"{root}: mlx-lm does not load it ({brief(error)}).") from error


def kinds_of(model: Any, name: str) -> list[Kind]:
    """What cache each layer of mlx-lm's `model` has. UnsupportedModel where one holds anything but keys and values."""
    kinds = []
    for cache in make_prompt_cache(model):
        kind = type(cache).__name__
        if kind not in CACHES or getattr(cache, "keep", False):
            raise UnsupportedModel(
                f"{name}: in mlx-lm some layers have a {kind}, which holds more than keys and values."
            )
        kinds.append(Kind(kind, cache.max_size if isinstance(cache, RotatingKVCache) else None))
    return kinds


def reads(model: Any, key: str) -> bool:
    """Whether mlx-lm's `model` looks at this key of config.json."""
    return hasattr(model.args, key)


class Running:
    """The original in `root`, in float32, with the slots of the prompt cache in `file`."""

    def __init__(self, root: Path, file: Path) -> None:
        self.model, self.file = built(root), file
        self.model.set_dtype(mx.float32)

    def log_probabilities(self, ids: torch.Tensor, cuts: tuple[int, ...] = ()) -> torch.Tensor:
        """Log-probabilities (B, T, V) after each of `ids` (B, T), float32; the text is read in parts, cut at `cuts`."""
        edges, rows = (0, *cuts, ids.shape[1]), []
        for row in ids:
            cache, parts = load_prompt_cache(str(self.file)), []  # anew for each, since it grows
            for start, stop in zip(edges, edges[1:], strict=False):
                logits = self.model(mx.array(row[None, start:stop].numpy()), cache=cache).astype(mx.float32)
                parts.append(torch.from_numpy(np.array(logits[0])))
            rows.append(torch.cat(parts).log_softmax(-1))  # MLX's own on a CPU is off by 1e-4, always to one side
        return torch.stack(rows)
