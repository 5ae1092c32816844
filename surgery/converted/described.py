"""A converted checkpoint as its config.json describes it: read once, and handed on as one value."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from ..anatomy.classes import CAUSAL, is_text
from ..anatomy.encoders import NOTHING, examine_encoder
from ..anatomy.fit import fit, original_tensors
from ..anatomy.linears import widths
from ..anatomy.patching import READS
from ..anatomy.quiet import quiet
from ..anatomy.sites import Anatomy, examine
from ..anatomy.stored import NO_LIMIT
from ..checkpoint.config import CONFIG, code_choices, read_config, require_countable
from ..checkpoint.layout import read_layout
from ..checkpoint.quantised import Quantised, quantised
from ..errors import DamagedCheckpoint, SourceError, UnsupportedModel
from ..live.model import Live
from ..live.places import down_projections, name_in
from ..words import named
from .derived import derive
from .entries import FORMAT, EabEntry, Entry, HeadNormEntry, RegistersEntry
from .files import lowered_limits
from .parts import NORMS, REGISTERS, Converted, class_prefix, converted_from

AGAIN = "convert the source again"
# Keys of config.json that a run writes anew.
OURS = ("eab", "head_norm", "test_time_registers", "auto_map", "architectures")
# What is wrong with an entry's value, in words; of the others: "is not as a run writes it".
_WRONG = {
    "n_slots": "is {value}, not a count",
    "prefix_ids": "is not a list of {n} token ids",
    "slots_visible": "is {value}",
    "per_head": "is {value}, not true or false",
    "gated": "is {value}, not true or false",
    "eps": "is {value}, not a small number",
    "sites": "names no attention site",
}
_DIMS = {"eab": "[kv_heads, key_dim, value_dim]", "head_norm": "[heads, value_dim]"}

AnEntry = TypeVar("AnEntry", bound=Entry)


@dataclass(frozen=True)
class Described:
    """The checkpoint in `root`: its config.json, the type it says, and its entries; `head_norm` None without norms,
    `registers` None without those of test time, `packed` None where its weights are plain."""

    root: Path
    config: dict
    converted: Converted
    eab: EabEntry
    head_norm: HeadNormEntry | None
    registers: RegistersEntry | None = None
    packed: Quantised | None = None

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """The anatomy of the model that the checkpoint was converted from, worked out once.

        DamagedCheckpoint where what config.json says of slots and norms is not what a run writes for that model.
        """
        return self._original[1]

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder: then nothing in it predicts tokens."""
        return self.eab.sees_all or CAUSAL not in derive(*self.converted).classes

    @property
    def original_config(self) -> dict:
        """config.json of that model, but what a run writes anew (`OURS`): its type, and its limit of positions."""
        return self._original[0]

    @functools.cached_property
    def _original(self) -> tuple[dict, Anatomy]:
        base = {key: value for key, value in self.config.items() if key not in OURS}
        base["model_type"] = self.converted.base
        tensors = original_tensors(read_layout(self.root))
        require_countable(base, tensors.tensors, self.root / CONFIG)
        if self.encodes:
            base["architectures"] = self._native_names()
            if self.eab.sees_all and (self.eab.prefix_ids or self.eab.n_slots and self.eab.slots_visible != "always"):
                raise damaged(self.root, "eab.slots_visible is not as a run writes it for an encoder")
            with quiet():
                anatomy = self._encoder(base)
                fit(anatomy, tensors)
            self._checked(anatomy)
            return base, anatomy if self.registers is None else self._with_register(anatomy, self.registers)
        if base.get("model_type") and not is_text(base):
            raise damaged(self.root, "eab.sees_all is not as a run writes it for an encoder")
        n_slots, limit = self.eab.n_slots, base.get("max_position_embeddings")
        raised = {**base, "max_position_embeddings": limit + n_slots} if type(limit) is int else base
        with quiet():  # the raised limit is a guess
            found, anatomy = raised, examine(raised, tensors=len(tensors.tensors))
            if raised != base and not lowered_limits(raised, anatomy, n_slots):  # then a run had left it as it was
                found, anatomy = base, examine(base, tensors=len(tensors.tensors))
            fit(anatomy, tensors)
        return found, self._checked(anatomy)

    def _encoder(self, base: dict) -> Anatomy:
        """That of the encoder whose trunk is named, of those that there are. DamagedCheckpoint where there is none."""
        why = f"eab.trunk {named(repr(self.eab.trunk))} is no encoder of {self.converted.base}"
        for reads in READS:
            try:
                found = examine_encoder(base, reads)
            except UnsupportedModel as error:
                why = why if NOTHING in str(error) else str(error)
                continue
            if found.trunk_class == self.eab.trunk:
                return found
        raise damaged(self.root, why)

    def _with_register(self, anatomy: Anatomy, entry: RegistersEntry) -> Anatomy:
        """That of the encoder with one register more. DamagedCheckpoint where the entry is not of this model."""
        patching, blank = anatomy.patching, Live(anatomy.blank, anatomy)
        assert patching is not None
        projections = {name_in(blank, part): widths(part)[0] for part in down_projections(blank).values()}
        if (entry.blocks, entry.at) != (anatomy.blocks, patching.cls) or any(
            units[-1] >= projections.get(name, 0) for name, units in entry.units.items()
        ):
            raise damaged(self.root, f"test_time_registers is not as a run writes it for {anatomy.model_type}")
        more = replace(patching, special=patching.special + 1, registers=patching.registers + 1)
        return replace(anatomy, patching=more)

    def _native_names(self) -> list[str]:
        """`architectures` of the source, as those of the checkpoint say it."""
        lead = class_prefix(self.converted.parts)
        said = self.config.get("architectures")
        if not isinstance(said, list) or len(said) != 1 or not str(said[0]).startswith(lead):
            raise damaged(self.root, "architectures does not name one class of this type")
        return [str(said[0]).removeprefix(lead)]

    def _checked(self, anatomy: Anatomy) -> Anatomy:
        if wrong := self._unlike(anatomy):
            raise damaged(self.root, f"{named(wrong[0])} is not as a run writes it for {anatomy.model_type}")
        return anatomy

    def _unlike(self, anatomy: Anatomy) -> list[str]:
        """Keys of `eab`, and sites of `head_norm`, that are not those of a model of this anatomy."""
        eab, ids = self.config["eab"], list(self.eab.prefix_ids)
        expected = {"format": FORMAT, "prefix_ids": ids, **anatomy.eab(self.eab.n_slots, self.eab.slots_visible)}
        wrong = [f"eab.{key}" for key in sorted(eab.keys() ^ expected)]
        wrong += ["eab.prefix_ids"] if max(ids, default=0) >= (anatomy.vocab_size or NO_LIMIT) else []
        wrong += [f"eab.{key}" for key in sorted(eab.keys() & expected) if eab[key] != expected[key]]
        normed = {site.name: (site.heads, site.value_dim) for site in anatomy.sites}
        sites = {} if self.head_norm is None else self.head_norm.sites
        return wrong + [f"head_norm.sites.{name}" for name, dims in sites.items() if normed.get(name) != dims]


def damaged(root: Path, what: str) -> DamagedCheckpoint:
    """The error that says what is wrong with the config.json in `root`."""
    return DamagedCheckpoint(f"{root / 'config.json'}: {what}; {AGAIN}.")


def read_described(root: Path) -> Described:
    """What config.json of a converted checkpoint says; DamagedCheckpoint unless its type and entries are such as a run
    writes."""
    path = root / "config.json"
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing; {AGAIN}.")
    config = read_config(root)
    if chosen := code_choices(config):
        raise damaged(root, f"{named(chosen[0])} chooses kernels or code, and a run writes no such key")
    try:
        packed = quantised(root, config)
    except SourceError as error:
        raise DamagedCheckpoint(str(error)) from error
    found = converted_from(config.get("model_type"))
    if found is None:
        raise damaged(root, f"model_type {named(repr(config.get('model_type')))} is not a converted type")
    normed = NORMS in found.parts
    eab, head_norm = _entry(root, config, "eab", EabEntry, found.base), None
    registers = None
    if REGISTERS in found.parts or config.get("test_time_registers") is not None:
        registers = _entry(root, config, "test_time_registers", RegistersEntry, found.base)
        if REGISTERS not in found.parts:
            raise damaged(root, f"model_type {config['model_type']!r} does not go with test_time_registers")
    if eab.n_slots == 0 and not normed and registers is None:
        raise damaged(root, "eab.n_slots is 0, not a count")
    if len(eab.prefix_ids) not in (0, eab.n_slots):  # slots that were trained from nothing have no prefix
        raise damaged(root, f"eab.prefix_ids is not a list of {eab.n_slots} token ids")
    if normed != (config.get("head_norm") is not None):
        says = "has no" if normed else "does not go with a"
        raise damaged(root, f"model_type {config['model_type']!r} {says} head_norm entry")
    if normed:
        head_norm = _entry(root, config, "head_norm", HeadNormEntry, found.base)
        if unknown := [name for name in head_norm.sites if name not in eab.sites]:
            raise damaged(root, f"head_norm.sites.{named(unknown[0])} is not in eab.sites")
    return Described(root, config, found, eab, head_norm, registers, packed)


def _entry(root: Path, config: dict, name: str, kind: type[AnEntry], base: str) -> AnEntry:
    """The entry `name` of a config.json; DamagedCheckpoint, with what is wrong in words."""
    raw = config.get(name)
    if not isinstance(raw, dict):
        lacks = {
            "eab": "has no eab entry that describes the slots",
            "head_norm": "head_norm does not describe the norms",
            "test_time_registers": "has no test_time_registers entry that describes them",
        }
        raise damaged(root, lacks[name])
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        key, *inside = error.errors(include_url=False)[0]["loc"]
        if key == "sites" and inside:
            raise damaged(root, f"{name}.sites.{named(inside[0])} is not {_DIMS[name]}") from error
        said = _WRONG.get(str(key), f"is not as a run writes it for {base}")
        said = said.format(value=named(repr(raw.get(key)), 40), n=named(raw.get("n_slots"), 20))
        raise damaged(root, f"{name}.{named(key)} {said}") from error
