"""The writing half of `surgery run`: every file of the converted checkpoint but its card, into the stage."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint.layout import INDEX, Layout, TensorInfo, index_json
from ..checkpoint.manifest import build_manifest
from ..checkpoint.source import source_hashes
from ..checkpoint.stage import Stage
from ..checkpoint.values import differs
from ..converted.files import added_layout, added_tensors, converted_config, converted_tokenizer
from ..operations.attention_bias import slot_values
from ..operations.changed import stored_values
from ..operations.head_norm import norm_values
from .operate import Operated
from .plan import Plan, carried


def emit(plan: Plan, stage: Stage, directory: Path, tokenizer, operated: Operated, link: bool) -> dict:
    """Write every file but the card into the stage; returns the manifest, without file hashes and verdict yet.

    `directory` holds the source as plain files; a GGUF's are moved out of it, and it is removed.
    """
    prefix = operated.prefix
    layout = replace(plan.source.layout, root=directory)
    weights = stored_values(layout, plan.anatomy, operated.weights)
    # Training may keep its start, and half precision rounds small changes away.
    changed = {name: weight for name, weight in weights.items() if differs(layout, name, weight)}
    _emit_shards(plan, layout, stage, changed, link)
    values = slot_values(plan.anatomy, operated.slots)
    if plan.head_norm is not None:
        values.update(norm_values(plan.anatomy, plan.head_norm, operated.norms))
    stage.add_tensors(plan.added_shard, values, {"format": "pt"})
    n = len(prefix)
    # They were planned for the most slots there could be.
    lowered = {key: value + plan.n_slots - n for key, value in plan.lowered.items()}
    stage.add_json(
        "config.json", converted_config(plan.source.config, plan.derived, plan.entries(prefix), lowered)
    )  # fmt: skip
    _, added = added_layout(added_tensors(plan.anatomy, n, plan.head_norm), plan.added_shard)
    tensors = {
        t.name: {**plan.tensors[t.name], "status": "changed" if t.name in changed else "kept"}
        for t in plan.source.layout.tensors.values()
    }
    for name, info in added.items():
        tensors[name] = {"status": "added", "shard": plan.added_shard, "dtype": "F32", "shape": list(info.shape)}
    kept = {
        t.name: TensorInfo(t.name, t.dtype, t.shape, plan.shards[t.shard], t.start, t.stop)
        for t in plan.source.layout.tensors.values()
    }
    stage.add_json(INDEX, index_json({**kept, **added}))
    _emit_companions(plan, stage, directory, tokenizer, prefix)
    for name, content in plan.derived.files().items():
        stage.add_text(name, content)
    if plan.source.kind == "gguf":
        shutil.rmtree(directory)
    return build_manifest(
        source=_source_entry(plan),
        recipe=plan.recipe.to_dict(),
        versions=_versions(),
        tensors=tensors,
        files={},
        verdict=None,
    )


def _emit_shards(plan: Plan, layout: Layout, stage: Stage, changed: dict[str, torch.Tensor], link: bool) -> None:
    for old, new in plan.shards.items():
        others = {name: tensor for name, tensor in changed.items() if layout.tensors[name].shard == old}
        if others:
            stage.add_changed(layout, old, new, others)
        elif plan.source.kind == "gguf":
            os.replace(layout.root / old, stage.path / new)
        else:
            stage.add_file(layout.root / old, new, link=link)


def _emit_companions(plan: Plan, stage: Stage, directory: Path, tokenizer, prefix: Sequence[int]) -> None:
    """Tokenizer files, licences and what else belongs to the weights, unchanged where nothing in them must change."""
    files = carried(plan.source)
    changed: dict[str, str] = {}
    if tokenizer is not None:
        folded_bos = tokenizer.bos_token if tokenizer.bos_token_id in prefix else None
        changed = converted_tokenizer(directory, files, tokenizer, len(prefix), folded_bos)
        settings = json.loads(changed["tokenizer_config.json"])
        # It loads without the code that an auto_map names, and that code is not carried.
        if settings.pop("auto_map", None) is not None:
            changed["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    for name in files:
        if name not in changed:
            stage.add_file(directory / name, name)
    for name, content in changed.items():
        stage.add_text(name, content)


def _source_entry(plan: Plan) -> dict:
    """`source` of the manifest."""
    source = plan.source
    dtype = next(iter(source.layout.tensors.values())).dtype if source.kind == "gguf" else None
    return {
        "spec": source.spec,
        "kind": source.kind,
        "revision": source.revision,
        "dtype": dtype,
        "sha256": source_hashes(source),
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("surgery", "torch", "transformers", "safetensors")}
