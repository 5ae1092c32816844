"""The plan: the exact list of tensors and files a recipe will change, known before a weight is read."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..anatomy.encoders import require_class
from ..anatomy.fit import Fit
from ..anatomy.linears import linears
from ..anatomy.patching import Reads
from ..anatomy.sites import Anatomy
from ..checkpoint.disk import free_space, require_space, require_target, same_disk
from ..checkpoint.source import Source, open_source
from ..converted.derived import Derived, derive
from ..converted.files import added_layout, lowered_limits, shard_names
from ..errors import SourceError, UnsupportedModel
from ..live.graft import eab_config
from ..live.loading import require_generation
from ..live.memory import HERE, Needs, Place
from ..live.text import no_longer_added
from ..operations.base import Changes, Parts, Target
from .inputs import Cutter, text_reader
from .nature import examine_source, port_of, with_tokenizer
from .planned_files import FilePlan, files_of, room
from .recipe import Recipe
from .recordings import file_reader


@dataclass(frozen=True)
class Plan:
    """What will be done, and on what. Where a prefix is searched, `changes` are the most there can be."""

    source: Source
    recipe: Recipe
    target: Target
    changes: Changes
    by_operation: Mapping[str, Changes]
    derived: Derived
    shards: dict[str, str]
    added_shard: str
    files: tuple[FilePlan, ...]
    bytes_needed: int
    bytes_free: int
    fits: Fit
    place: Place

    @property
    def notes(self) -> list[str]:
        """What there is to know of how tensors and model fit, a sentence each."""
        return self.fits.notes(self.anatomy)

    @property
    def anatomy(self) -> Anatomy:
        return self.target.anatomy

    @property
    def reader(self) -> Cutter:
        """How text becomes token ids of this model, or files what an encoder reads."""
        if self.anatomy.reads != "text":
            return file_reader(self.source.root, self.anatomy)
        tokenizer, encodes = self.target.tokenizer, self.anatomy.patching is not None
        without = no_longer_added(tokenizer, self.changes.prefix or ()) if encodes else ()
        return text_reader(self.anatomy, tokenizer, self.target.vocab_size, without)

    @property
    def lowered(self) -> dict[str, int]:
        """Limits of config.json, less the positions that slots take."""
        return lowered_limits(self.source.config, self.anatomy, self.changes.positions)

    @functools.cached_property
    def tensors(self) -> dict[str, dict]:
        """Every tensor of the output: status, shard, dtype, shape; those of the source first."""
        status = self.changes.changed
        kept = {
            t.name: _entry(status.get(t.name, "kept"), self.shards[t.shard], t.dtype, t.shape)
            for t in self.source.layout.tensors.values()
            if t.name not in self.changes.replaced
        }
        added = {name: _entry("added", self.added_shard, t.dtype, t.shape) for name, t in self.changes.added.items()}
        return {**kept, **self.quantised(self.changes), **added}

    def quantised(self, changes: Changes) -> dict[str, dict]:
        """The tensors that `changes` puts in the place of others, as entries of the manifest."""
        layout = self.source.layout
        return {
            name: {
                **_entry(
                    "quantised" if 0 not in t.shape else "emptied",
                    self.shards[layout.tensors[of].shard],
                    t.dtype,
                    t.shape,
                ),
                "of": of,
            }
            for of, instead in changes.replaced.items()
            for name, t in instead.items()
        }

    def memory(self) -> dict[str, Any]:
        """What a run takes of it, resident or layer by layer, and what each pass over the weights reads then."""
        return self.place.told(self._needs, self.source.layout, not self.resident)

    @functools.cached_property
    def resident(self) -> bool:
        """Whether all weights are in memory at once. NoSpace where they do not fit, and cannot come layer by layer."""
        asking = (*self.recipe.changes, *self.recipe.verify.gates())
        return not self.place.comes_by_layers(self.source.spec, self._needs, asking)

    @property
    def _needs(self) -> Needs:
        return Needs.of(self.anatomy, self.source.layout, self.fitting_dtype, packs=bool(self.changes.replaced))

    @property
    def fitting_dtype(self) -> torch.dtype:
        """What operations are fitted in. Where layers round what enters them, a difference as small as float32's
        becomes a step, and steps in one layer become others in the next: only float64 shows whether two models are one
        function."""
        packed = self.source.quantised
        return torch.float64 if packed is not None and packed.rounds_activations else torch.float32

    def final(self, parts: Mapping[str, Parts]) -> Changes:
        """What is done, now that everything is fitted; of what is not, the most there can be."""
        found = {change.name: change.plan(self.target, parts.get(change.name)) for change in self.recipe.changes}
        return _together(self.anatomy, found)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        changes, told = self.changes, dict(self.changes.told)
        if (tune := told.pop("tune", None)) is not None:
            tune = {"steps": tune["steps"], **{part.key: part.count for part in changes.trains}, "lora": tune["lora"]}
        return {
            "source": {"spec": self.source.name, "kind": self.source.kind, "revision": self.source.revision},
            "model_type": {"from": self.anatomy.model_type, "to": self.derived.model_type},
            "prefix_ids": list(changes.prefix) if changes.prefix is not None else None,
            "sites": len(self.anatomy.sites),
            "quantised": None if self.source.quantised is None else self.source.quantised.told(self.source.layout),
            **told,
            "adds": list(changes.words),
            "tune": tune,
            "trains": [part.planned for part in changes.trains] if tune is not None else [],
            "notes": self.notes,
            "not_of_the_model": list(self.fits.unused),
            "tensors": self.tensors,
            "files": [vars(file) for file in self.files],
            "config": {"lowered": self.lowered},
            "memory": self.memory(),
            "disk": {"needed": self.bytes_needed, "free": self.bytes_free},
            "download": sum(self.source.missing.values()),
        }


def prepare(
    recipe: Recipe, spec: str, out: Path | None, *, needs_tokenizer: bool, link: bool = False,
    dtype: str | None = None, revision: str | None = None, place: Place = HERE, reads: Reads | None = None,
) -> Plan:  # fmt: skip
    """Open the source `spec` and plan `recipe` on it. `reads`: what it is to be given, where that is known.

    Without `out`, disk space is that of the working directory and is not insisted on. Raises whatever a later step
    would refuse: SourceError, DamagedCheckpoint, UnsupportedModel, OutputError, NoSpace.
    """
    source = open_source(spec, revision=revision, dtype=dtype)
    return plan_on(source, recipe, out, needs_tokenizer=needs_tokenizer, link=link, place=place, reads=reads)


def plan_on(
    source: Source, recipe: Recipe, out: Path | None, *, needs_tokenizer: bool, link: bool = False, place: Place = HERE,
    reads: Reads | None = None,
) -> Plan:  # fmt: skip
    """The same for a source that is open."""
    # Before the tokenizer, which would complain in its own words.
    _require_plain(source, recipe)
    port, reads = port_of(source, recipe, reads)
    recipe = recipe.of(port)
    anatomy, fits = examine_source(source, port, reads)
    if source.kind != "gguf":
        require_generation(source.root)
    if anatomy.patching is not None:
        require_class(anatomy)
    wanted = needs_tokenizer or any(change.needs_tokenizer for change in recipe.changes)
    source, tokenizer = with_tokenizer(source, recipe, wanted, anatomy.reads)
    target = Target(anatomy, source.layout, tokenizer)
    by_operation = {change.name: change.plan(target) for change in recipe.changes}
    changes = _together(anatomy, by_operation)
    if recipe.rounds_linears:
        linears(anatomy.blank, anatomy)  # raises where there is something that cannot be reached
    if anatomy.max_positions is not None and changes.positions >= anatomy.max_positions // 2:
        raise UnsupportedModel(
            f"config.json: max_position_embeddings is {anatomy.max_positions}, which leaves too little room "
            f"after {changes.positions} slots; use fewer slots."
        )
    if clash := [name for name in changes.added if name in source.layout.tensors]:
        raise UnsupportedModel(
            f"{source.spec}: already has a tensor {clash[0]}, the name of one that would be added; rename it."
        )
    derived, (shards, added_shard) = (
        derive(anatomy.model_type, changes.parts),
        shard_names(source.layout, bool(changes.added)),
    )
    added_bytes, _ = added_layout(changes.added, added_shard)
    bos = None if tokenizer is None else tokenizer.bos_token_id
    folds_bos = bos is not None and (changes.prefix is None or bos in changes.prefix)
    files = files_of(
        source, shards, changes, derived, changes_weights=recipe.changes_weights, link=link, folds_bos=folds_bos,
        added=(added_shard, added_bytes),
    )  # fmt: skip
    needed = room(files)
    if source.kind == "gguf" and recipe.changes_weights:
        needed += source.layout.total_bytes  # its dequantised copy stays until both models are measured
    where = Path.cwd() if out is None else out
    if out is not None:
        require_target(where, source.root if source.root.is_dir() else None)
        download = sum(source.missing.values())
        require_space(source.root, download)
        require_space(where, needed + (download if same_disk(where, source.root) else 0))
    return Plan(
        source, recipe, target, changes, by_operation, derived, shards, added_shard, files, needed, free_space(where),
        fits, place,
    )  # fmt: skip


def _require_plain(source: Source, recipe: Recipe) -> None:
    """SourceError for a recipe that changes or rounds weights, where those of the source are packed."""
    if source.quantised is None:
        return
    asks = next((change.name for change in recipe.changes if change.changes_weights), None)
    does = "changes weights"
    rounds = "tune" if recipe.tune is not None and recipe.tune.reads_linears else "verify"
    if asks is None and (recipe.rounds_linears or rounds == "tune"):
        asks, does = rounds, "simulates quantisation"
    if asks is not None:
        raise SourceError(
            f"{source.spec} is quantised ({source.quantised.words}), and the recipe's {asks} {does}; leave that out, "
            "or give the checkpoint it was quantised from."
        )


def _together(anatomy: Anatomy, by_operation: Mapping[str, Changes]) -> Changes:
    """All changes as one. config.json always describes the sites, also where no operation puts slots there."""
    sites = Changes(config={"eab": eab_config(anatomy, (), "as_prefix")})
    return functools.reduce(operator.add, (*by_operation.values(), sites))


def _entry(status: str, shard: str, dtype: str, shape) -> dict[str, Any]:
    return {"status": status, "shard": shard, "dtype": dtype, "shape": list(shape)}
