"""Files of tensors that are to be written: their headers, and the index that names them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from .header import BITS, TensorInfo


def plan_file(
    shard: str, entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """(header bytes, where each tensor comes to lie) for a new file of (name, dtype code, shape), in the order given.

    Writing the header and then each tensor's bytes in that order makes a valid file, so it can be written as a stream.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    spans: list[tuple[str, str, tuple[int, ...], int, int]] = []
    position = 0
    for name, dtype, shape in entries:
        stop = position + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        spans.append((name, dtype, tuple(shape), position, stop))
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8, as loaders that map files expect
    base = 8 + len(text)
    infos = {name: TensorInfo(name, dtype, shape, shard, base + a, base + b) for name, dtype, shape, a, b in spans}
    return len(text).to_bytes(8, "little") + text, infos


def index_json(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The content of model.safetensors.index.json for these tensors (`total_size`: tensor bytes, no headers)."""
    weight_map = {name: tensors[name].shard for name in sorted(tensors)}
    return {"metadata": {"total_size": sum(info.nbytes for info in tensors.values())}, "weight_map": weight_map}
