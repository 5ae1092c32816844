"""GGUF to safetensors: values and names by `gguf` and transformers, written as a stream, a tensor at a time.

transformers loads GGUF files whole and cannot save them. The result here is bit-equal to what it would have loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DamagedCheckpoint, OutputError, SourceError, UnsupportedModel
from ..progress import Advance, unseen
from .disk import disk_errors
from .gguf_header import Header, Stored, read_header
from .gguf_model import derive
from .gguf_tokenizer import tokenizer_files, write_tokenizer
from .header import TensorInfo
from .layout import INDEX, SINGLE, Layout
from .values import tensor_bytes
from .writing import index_json, plan_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
MAX_SHARD = 2_000_000_000  # bytes of tensors in one file
METADATA = {"format": "pt"}  # transformers refuses files without it


@dataclass(frozen=True)
class GgufPlan:
    """What a GGUF becomes. `reads` pairs each stored tensor with its place in `layout`, in the order of writing.

    `blank` is its model on the meta device, which names and shapes were read from.
    """

    header: Header
    config: dict[str, Any]
    dtype: str
    generation_config: dict[str, Any]
    layout: Layout
    companions: tuple[str, ...]
    reads: tuple[tuple[Stored, TensorInfo], ...]
    processor: Any
    blank: PreTrainedModel = field(repr=False, compare=False)


def gguf_config(path: Path) -> dict[str, Any]:
    """config.json for the file, as transformers derives it, with dtype float32. Errors as `plan_gguf`."""
    return plan_gguf(path).config


def gguf_layout(path: Path, dtype: str = "float32") -> Layout:
    """The layout that `stream_gguf` will write; its `root` is the GGUF file. Errors as `plan_gguf`."""
    return plan_gguf(path, dtype).layout


def plan_gguf(path: Path, dtype: str = "float32", max_shard: int = MAX_SHARD) -> GgufPlan:
    """Everything about the conversion but the weights: header checked, names mapped on a model without memory.

    Raises SourceError (no such file or dtype, part of a split file), DamagedCheckpoint (bytes wrong) and
    UnsupportedModel (it would not come out exactly).
    """
    if dtype not in DTYPES:
        raise SourceError(f"{dtype} is not a dtype that a GGUF is converted to; choose one of {', '.join(DTYPES)}.")
    header = read_header(Path(path))
    model = derive(header)
    entries = [
        (model.names[stored.name], DTYPES[dtype], model.shapes[model.names[stored.name]]) for stored in header.tensors
    ]
    layout = _plan_shards(header.path, entries, max_shard)
    reads = tuple((stored, layout.tensors[model.names[stored.name]]) for stored in header.tensors)
    parsed = model.blank.config
    parsed.dtype = dtype
    companions = tuple(sorted(("generation_config.json", *tokenizer_files(header))))
    config = json.loads(parsed.to_json_string())
    return GgufPlan(
        header, config, dtype, model.generation_config, layout, companions, reads, model.processor, model.blank
    )  # fmt: skip


def _plan_shards(path: Path, entries: list[tuple[str, str, tuple[int, ...]]], max_shard: int) -> Layout:
    """Fill files up to `max_shard` bytes in the order given; a tensor larger than that has a file of its own."""
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    size = 0
    for entry in entries:
        _, infos = plan_file("", [entry])
        nbytes = infos[entry[0]].nbytes
        if groups[-1] and size + nbytes > max_shard:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += nbytes
    count = len(groups)
    shards = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[str, int] = {}
    for shard, group in zip(shards, groups, strict=True):
        header, infos = plan_file(shard, group, METADATA)
        tensors |= infos
        sizes[shard] = len(header) + sum(info.nbytes for info in infos.values())
    return Layout(path, tensors, tuple(shards), sizes)


def stream_gguf(
    path: Path,
    into: Path,
    dtype: str = "float32",
    advance: Advance = unseen,
    max_shard: int = MAX_SHARD,
) -> None:
    """Plan and write in one: the GGUF `path` to the directory `into`. Errors as `plan_gguf` and `write_plan`."""
    write_plan(plan_gguf(path, dtype, max_shard), into, advance)


def write_plan(plan: GgufPlan, into: Path, advance: Advance = unseen) -> None:
    """Write shards, index, configs and tokenizer files to `into`, a new or empty directory.

    The memory needed is a few times the largest tensor. `advance` is told of tensor bytes, and of the tensor. What was
    written before an error stays in `into`: its owner removes it. Raises OutputError, NoSpace, DamagedCheckpoint (NaN
    or Inf among the weights) and SourceError (values beyond the dtype).
    """
    into = Path(into)
    with disk_errors(into):
        into.mkdir(exist_ok=True)
        if any(into.iterdir()):
            raise OutputError(f"{into} is not empty; give a new directory to unpack {plan.header.path} into.")
        _write_json(into / "config.json", plan.config)
        _write_json(into / "generation_config.json", plan.generation_config)
        if len(plan.layout.shards) > 1:
            _write_json(into / INDEX, index_json(plan.layout.tensors))
        _write_weights(plan, into, advance)
    if "tokenizer.json" in plan.companions:
        write_tokenizer(plan.header, into)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(plan: GgufPlan, into: Path, advance: Advance) -> None:
    for shard in plan.layout.shards:
        reads = [(stored, info) for stored, info in plan.reads if info.shard == shard]
        header, _ = plan_file(shard, [(info.name, info.dtype, info.shape) for _, info in reads], METADATA)
        with (into / shard).open("xb") as file:
            file.write(header)
            for stored, info in reads:
                file.write(tensor_bytes(_read_tensor(plan, stored, info)))
                advance(info.nbytes, info.name)


def _read_tensor(plan: GgufPlan, stored: Stored, info: TensorInfo) -> torch.Tensor:
    """One tensor as transformers would load it: dequantised, llama.cpp's changes undone, cast last."""
    import numpy as np
    import torch
    from gguf import dequantize, quant_shape_to_byte_shape

    path = plan.header.path
    # Read, not mapped: the pages of a map would count as our memory until the system takes them back.
    raw = np.fromfile(path, dtype=np.uint8, count=stored.nbytes, offset=stored.start)
    if raw.nbytes != stored.nbytes:
        raise DamagedCheckpoint(f"{path} was truncated while it was read; download it again.")
    values = dequantize(raw.reshape(quant_shape_to_byte_shape(stored.shape, stored.kind)), stored.kind)
    if not np.isfinite(values).all():
        raise DamagedCheckpoint(f'Tensor "{stored.name}" of {path} holds NaN or Inf; download the file again.')
    placed: dict[str, dict[str, Any]] = {"tensors": {}}  # where some processors put a tensor by themselves
    result = plan.processor.process(
        weights=values, name=stored.name, tensor_key_mapping={stored.name: info.name}, parsed_parameters=placed
    )
    if result.name is None:
        whole = placed["tensors"].get(info.name)
    else:
        whole = torch.from_numpy(np.ascontiguousarray(result.weights))
    if whole is None or tuple(whole.shape) != info.shape:
        raise UnsupportedModel(
            f'Tensor "{stored.name}" of {path} does not become "{info.name}" of shape {info.shape} '
            "one to one; give the original safetensors checkpoint instead."
        )
    cast: torch.Tensor = whole.to(getattr(torch, plan.dtype))
    if not torch.isfinite(cast).all():
        raise SourceError(f'Tensor "{stored.name}" of {path} has values beyond {plan.dtype}; ask for float32.')
    return cast
