"""The writing half of `surgery run`: every file of the converted checkpoint but its card, into the stage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..anatomy.sites import Anatomy
from ..anatomy.stored import stored_name
from ..checkpoint.contents import names_code, without_code
from ..checkpoint.header import TensorInfo
from ..checkpoint.layout import INDEX, Layout, read_tensor
from ..checkpoint.manifest import Manifest, build_manifest
from ..checkpoint.provenance import Provenance
from ..checkpoint.quantised import sealed
from ..checkpoint.regular import parse_any
from ..checkpoint.stage import Stage
from ..checkpoint.values import as_stored, differs
from ..checkpoint.writing import index_json
from ..converted.bos import generic_files, puts_back
from ..converted.described import read_described
from ..converted.files import (
    added_layout,
    converted_config,
    converted_tokenizer,
    is_rewritten,
    lowered_limits,
    rewritten_layout,
)
from ..converted.reading import live_converted
from ..live.loading import load_tokenizer
from ..live.memory import Place
from ..live.model import Live
from ..live.port import port_of
from ..operations.base import Alter, Changes
from .operate import Operated
from .plan import Plan
from .planned_files import carried


def emit(
    plan: Plan, stage: Stage, directory: Path, operated: Operated, hashes: Mapping[str, str], provenance: Provenance,
    link: bool,
) -> Manifest:  # fmt: skip
    """Write every file but the card into the stage; returns the manifest, without file hashes and verdict yet.

    `directory` holds the source as plain files, and keeps them. `hashes`: of the source's files, as they were read.
    """
    changes, layout = operated.changes, replace(plan.source.layout, root=directory)
    _, infos = added_layout(changes.added, plan.added_shard)
    added = {name: as_stored(infos[name], operated.tensors[name]) for name in changes.added}
    weights = _weights_of(plan, operated, layout, set(added))
    rewriting = _Rewriting(plan, changes, operated, layout, weights, _changed(weights, set(changes.replaced)))
    changed = rewriting.changed
    _emit_shards(plan, layout, stage, changed, rewriting, link, hashes)
    if added:
        stage.add_tensors(plan.added_shard, added, {"format": "pt"})
    emit_beside(plan, stage, directory, changes)
    return build_manifest(
        source=source_entry(plan, hashes),
        recipe=plan.recipe.to_dict(),
        versions=provenance.versions,
        tensors=_became(plan, changes, changed),
        files={},
        verdict=None,
        provenance=provenance,
        quantised=sealed(emitted_config(plan, changes)),
    )


def emit_beside(plan: Plan, stage: Stage, directory: Path, changes: Changes) -> None:
    """Write everything beside the weights but the card: index, config.json, tokenizer files, licences, code."""
    _, infos = added_layout(changes.added, plan.added_shard)
    own: dict[str, TensorInfo] = {}
    for old, new in plan.shards.items():
        own |= rewritten_layout(plan.source.layout, old, new, changes.replaced)[1]
    stage.add_json(INDEX, index_json({**own, **infos}))
    stage.add_json("config.json", emitted_config(plan, changes))
    _emit_companions(plan, stage, directory, changes)
    for name, content in plan.derived.files().items():
        stage.add_text(name, content)


def emitted_config(plan: Plan, changes: Changes) -> dict[str, Any]:
    """config.json of the converted checkpoint."""
    lowered = lowered_limits(plan.source.config, plan.anatomy, changes.positions)
    return converted_config(
        without_code(plan.source.config), plan.derived, plan.anatomy.model_class, changes.config, lowered
    )


def emitted(directory: Path, anatomy: Anatomy, place: Place, chunks: torch.Tensor) -> tuple[Live, Any]:
    """The converted model in `directory`, which is to read `chunks`, and its tokenizer, which is tried in a fork:
    before this process is large. An encoder of images or sound has none."""
    tokenizer = load_tokenizer(directory) if anatomy.reads == "text" else None
    if anatomy.patching is not None:  # registers may have been left out
        anatomy = read_described(directory).anatomy
    return live_converted(directory, anatomy, place, port_of(anatomy, chunks)), tokenizer


class _Weights(Mapping[str, torch.Tensor]):
    """What operations made of tensors of the source, by stored name, as wide as they computed it.

    `ready` are in memory; what becomes of others, `altered`, is computed whenever it is asked for.
    """

    def __init__(
        self, layout: Layout, ready: Mapping[str, torch.Tensor], altered: Mapping[str, Sequence[Alter]]
    ) -> None:  # fmt: skip
        self.layout, self.ready, self.altered = layout, ready, altered

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.ready:
            return self.ready[name]
        weight = read_tensor(self.layout, name).float()
        for alter in self.altered[name]:
            weight = alter(weight)
        return weight

    def __contains__(self, name: object) -> bool:  # without computing it
        return name in self.ready or name in self.altered

    def __iter__(self) -> Iterator[str]:
        return iter({**self.ready, **self.altered})

    def __len__(self) -> int:
        return len({**self.ready, **self.altered})


def _weights_of(plan: Plan, operated: Operated, layout: Layout, added: set[str]) -> _Weights:
    def stored(name: str) -> str:
        return stored_name(layout, plan.anatomy, name)

    ready = {stored(name): tensor for name, tensor in operated.tensors.items() if name not in added}
    altered: dict[str, list[Alter]] = {}
    for change in plan.recipe.changes:
        for name, alter in change.alters(operated.parts[change.name], plan.target).items():
            if stored(name) not in ready:  # those have it in them
                altered.setdefault(stored(name), []).append(alter)
    return _Weights(layout, ready, altered)


@dataclass(frozen=True)
class _AsStored(Mapping[str, torch.Tensor]):
    """The `names` among `weights` in the dtypes that they are stored in."""

    weights: _Weights
    names: frozenset[str]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return as_stored(self.weights.layout.tensors[name], self.weights[name])

    def __contains__(self, name: object) -> bool:  # without computing it
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _changed(weights: _Weights, replaced: set[str]) -> _AsStored:
    """What is written in its place. Training may keep its start, and half precision rounds small changes away."""
    names = weights.keys() - replaced
    return _AsStored(
        weights,
        frozenset(name for name in names if name in weights.altered or differs(weights.layout, name, weights[name])),
    )


def _became(plan: Plan, changes: Changes, changed: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """What became of each tensor: `tensors` of the manifest."""
    tensors = {
        t.name: {**plan.tensors[t.name], "status": "changed" if t.name in changed else "kept"}
        for t in plan.source.layout.tensors.values()
        if t.name not in changes.replaced
    }
    tensors |= plan.quantised(changes)
    for name, stored in changes.added.items():
        tensors[name] = {"status": "added", "shard": plan.added_shard, "dtype": stored.dtype, "shape": [*stored.shape]}
    return tensors


@dataclass(frozen=True)
class _Rewriting:
    """What is written in place of the tensors of shards that are written anew.

    `weights`: what operations made of tensors, by stored name, as wide as they computed it; `changed`: as it is stored.
    """

    plan: Plan
    changes: Changes
    operated: Operated
    layout: Layout
    weights: _Weights
    changed: _AsStored

    def __call__(self, name: str) -> Mapping[str, torch.Tensor] | None:
        if name not in self.changes.replaced:
            return {name: self.changed[name]} if name in self.changed else None
        weight = self.weights[name] if name in self.weights else read_tensor(self.layout, name)
        operation = next(one for one in self.plan.recipe.changes if name in self.plan.by_operation[one.name].replaced)
        return operation.rewrite(self.operated.parts[operation.name], self.plan.target, name, weight)


def _emit_shards(
    plan: Plan, layout: Layout, stage: Stage, changed: _AsStored, rewriting: _Rewriting, link: bool,
    hashes: Mapping[str, str],
) -> None:  # fmt: skip
    for old, new in plan.shards.items():
        others = frozenset(name for name in changed if layout.tensors[name].shard == old)
        if is_rewritten(layout, old, rewriting.changes.replaced):
            header, _ = rewritten_layout(layout, old, new, rewriting.changes.replaced)
            stage.add_rewritten(layout, old, new, header, rewriting)
        elif others:
            stage.add_changed(layout, old, new, replace(changed, names=others))
        elif plan.source.kind == "gguf":
            stage.adopt(layout.root / old, new)
        else:
            stage.add_file(layout.root / old, new, link=link, sha256=hashes.get(old))


def _emit_companions(plan: Plan, stage: Stage, directory: Path, changes: Changes) -> None:
    """Tokenizer files, licences and what else belongs to the weights, unchanged where nothing in them must change."""
    files, tokenizer = carried(plan.source), plan.target.tokenizer
    changed: dict[str, str] = {}
    if tokenizer is not None:
        folded_bos = tokenizer.bos_token if tokenizer.bos_token_id in (changes.prefix or ()) else None
        changed = converted_tokenizer(directory, files, tokenizer, changes.positions, folded_bos)
        if folded_bos is not None and puts_back(tokenizer, directory, files, changed):
            changed |= generic_files(tokenizer, changed["tokenizer_config.json"])
    for name in files:
        text = changed.get(name) or (directory / name).read_bytes() if name.endswith(".json") else ""
        if (settings := _naming_code(text, name)) is not None:
            changed[name] = json.dumps(without_code(settings), ensure_ascii=False, indent=2) + "\n"
    for name in files:
        if name not in changed:
            stage.add_file(directory / name, name)
    for name, content in changed.items():
        stage.add_text(name, content)


def _naming_code(text: str | bytes, name: str) -> Any:
    """A JSON file that names code; None for others. It loads without that code, which is not carried."""
    settings = parse_any(text, name)  # None is no JSON: whoever reads it says so
    return settings if names_code(settings) else None


def source_entry(plan: Plan, hashes: Mapping[str, str]) -> dict[str, Any]:
    """`source` of the manifest."""
    source = plan.source
    dtype = next(iter(source.layout.tensors.values())).dtype if source.kind == "gguf" else None
    return {
        "spec": source.name,
        "kind": source.kind,
        "revision": source.revision,
        "dtype": dtype,
        "sha256": dict(hashes),
        "not_of_the_model": list(plan.fits.unused),
    }
