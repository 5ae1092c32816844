"""The plan: the exact list of tensors and files a recipe will change, known before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..anatomy.linears import linears
from ..anatomy.sites import Anatomy, blank_model, examine
from ..checkpoint.disk import free_space, require_space, require_target
from ..checkpoint.layout import INDEX
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.source import Source, has_tokenizer
from ..converted.derived import Derived, derive
from ..converted.files import added_layout, added_tensors, lowered_limits, shard_names
from ..errors import UnsupportedModel
from ..live.quantised import SCHEMES
from ..operations.attention_bias import eab_config
from ..operations.changed import changeable
from ..operations.head_norm import norm_config
from ..recipe import Recipe

SMALL_FILES = 4 * 2**20  # what manifest, card, configuration and code can take, generously
# How large a file of the source can become; a tokenizer.json grows by indentation.
REWRITTEN = {"copy": 1, "rewrite": 1, "change": 2}


@dataclass(frozen=True)
class FilePlan:
    """One file of the output: `action` is copy, link, change or add; `bytes` is exact for weights."""

    name: str
    action: str
    bytes: int | None
    source: str | None = None


@dataclass(frozen=True)
class Plan:
    """What will be done. With `prefix: auto`, `n_slots` is the most there can be, and `prefix` is None.

    Without attention_bias, `prefix` is empty; `head_norm` is what config.json will say of it, or None.
    """

    source: Source
    recipe: Recipe
    anatomy: Anatomy
    derived: Derived
    prefix: tuple[int, ...] | None
    n_slots: int
    head_norm: dict | None
    shards: dict[str, str]
    added_shard: str
    tensors: dict[str, dict]
    files: tuple[FilePlan, ...]
    lowered: dict[str, int]
    bytes_needed: int
    bytes_free: int

    @property
    def slots_visible(self) -> str:
        return "as_prefix" if self.recipe.attention_bias is None else self.recipe.attention_bias.slots_visible

    @property
    def reads_linears(self) -> bool:
        """Whether something quantises linear layers, or adds to them."""
        tune = self.recipe.tune
        tuned = tune is not None and (tune.lora is not None or tune.quantised is not None)
        return tuned or any(SCHEMES[name].in_layers for name in self.recipe.verify.quantised.gates())

    @property
    def lora_layers(self) -> int:
        """How many linear layers LoRA is trained on and merged into."""
        return sum(entry["status"] == "changed" for entry in self.tensors.values())

    @property
    def trains(self) -> dict | None:
        """What tuning will train: `slots` at each site, `normed_sites`, `lora` (rank and layers, or None), `steps`."""
        if (tune := self.recipe.tune) is None:
            return None
        lora = None if tune.lora is None else {"rank": tune.lora.rank, "layers": self.lora_layers}
        return {"steps": tune.steps, "slots": self._slots, "normed_sites": self._normed_sites, "lora": lora}

    @property
    def _slots(self) -> int | dict[str, int]:
        return self.n_slots if self.prefix is not None else {"max": self.n_slots}

    @property
    def _normed_sites(self) -> int:
        return len(self.head_norm["sites"]) if self.head_norm is not None else 0

    def entries(self, prefix: Sequence[int]) -> dict[str, dict]:
        """What config.json will say of the operations, given the prefix that was folded."""
        norms = {} if self.head_norm is None else {"head_norm": self.head_norm}
        return {"eab": eab_config(self.anatomy, prefix, self.slots_visible), **norms}

    def to_dict(self) -> dict:
        """The plan as JSON."""
        return {
            "source": {"spec": self.source.spec, "kind": self.source.kind, "revision": self.source.revision},
            "model_type": {"from": self.anatomy.model_type, "to": self.derived.model_type},
            "prefix_ids": list(self.prefix) if self.prefix is not None else None,
            "n_slots": self._slots,
            "sites": len(self.anatomy.sites),
            "normed_sites": self._normed_sites,
            "tune": self.trains,
            "tensors": self.tensors,
            "files": [vars(file) for file in self.files],
            "config": {"lowered": self.lowered},
            "disk": {"needed": self.bytes_needed, "free": self.bytes_free},
        }


def make_plan(
    source: Source,
    recipe: Recipe,
    prefix: tuple[int, ...] | None,
    out: Path | None,
    link: bool = False,
    folds_bos: bool = False,
) -> Plan:
    """Plan `recipe` on `source`.

    Without `out`, disk space is that of the working directory and is not insisted on. `folds_bos`: BOS is in the
    prefix, or may be once it is searched.

    Raises UnsupportedModel, OutputError, NoSpace: everything that a later step would refuse.
    """
    anatomy = examine(source.config)
    n_slots = recipe.attention_bias.max_slots if prefix is None else len(prefix)
    head_norm = None if recipe.head_norm is None else norm_config(anatomy, recipe.head_norm)
    if anatomy.max_positions is not None and n_slots >= anatomy.max_positions // 2:
        raise UnsupportedModel(
            f"config.json: max_position_embeddings is {anatomy.max_positions}, which leaves too little room "
            f"behind {n_slots} slots; use fewer slots."
        )
    shards, added_shard = shard_names(source.layout)
    added_bytes, infos = added_layout(added_tensors(anatomy, n_slots, head_norm), added_shard)
    tensors = {
        **{t.name: _entry("kept", shards[t.shard], t.dtype, t.shape) for t in source.layout.tensors.values()},
        **{t.name: _entry("added", added_shard, t.dtype, t.shape) for t in infos.values()},
    }
    if clash := [name for name in infos if name in source.layout.tensors]:
        raise UnsupportedModel(
            f"{source.spec}: already has a tensor {clash[0]}, the name of one that would be added; rename it."
        )
    derived = derive(anatomy.model_type, head_norm is not None)
    for name, status in changeable(source.config, anatomy, recipe, source.layout).items():
        tensors[name]["status"] = status
    files = _files(source, derived, shards, added_shard, added_bytes, link, folds_bos, recipe.changes_weights)
    needed = SMALL_FILES + added_bytes + sum(REWRITTEN.get(file.action, 0) * (file.bytes or 0) for file in files)
    where = Path.cwd() if out is None else Path(out)
    if out is not None:
        require_target(where, source.root if source.root.is_dir() else None)
        require_space(where, needed)
    plan = Plan(
        source, recipe, anatomy, derived, prefix, n_slots, head_norm, shards, added_shard, tensors, files,
        lowered_limits(source.config, anatomy, n_slots), needed, free_space(where),
    )  # fmt: skip
    if plan.reads_linears:
        linears(blank_model(source.config), anatomy)  # raises where there is something that cannot be reached
    return plan


def carried(source: Source) -> tuple[str, ...]:
    """The source's companions that go along. Its Python files do not: transformers' own classes take their place."""
    return tuple(name for name in source.companions if not name.endswith(".py"))


def _entry(status: str, shard: str, dtype: str, shape) -> dict:
    return {"status": status, "shard": shard, "dtype": dtype, "shape": list(shape)}


def _files(
    source: Source,
    derived: Derived,
    shards: dict[str, str],
    added_shard: str,
    added_bytes: int,
    link: bool,
    folds_bos: bool,
    rewrites: bool,
) -> tuple[FilePlan, ...]:
    copy = "rewrite" if rewrites else "link" if link and source.kind != "gguf" else "copy"
    files = [FilePlan(new, copy, source.layout.sizes[old], old) for old, new in shards.items()]
    files.append(FilePlan(added_shard, "add", added_bytes))
    files += [FilePlan("config.json", "change", None, "config.json"), FilePlan(INDEX, "add", None)]
    companions = carried(source)
    for name in companions:
        path = source.root / name
        changes = name == "tokenizer_config.json" or folds_bos and name.endswith(("tokenizer.json", ".jinja"))
        files.append(
            FilePlan(name, "change" if changes else "copy", path.stat().st_size if path.is_file() else None, name)
        )
    if "tokenizer_config.json" not in companions and has_tokenizer(companions):
        files.append(FilePlan("tokenizer_config.json", "add", None))
    files += [FilePlan(name, "add", len(text.encode())) for name, text in derived.files().items()]
    return (*files, FilePlan("README.md", "add", None), FilePlan(MANIFEST, "add", None))
