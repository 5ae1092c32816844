"""What an export engine is: how a converted checkpoint is given to another program, and how it is measured there.

An engine is one class in a file of its own, listed in `ENGINES`. `verbs/export.py` calls its methods in this order:
`refuse` (nothing is written yet), `write` (into the stage), `prove` (what was written, without text),
`log_probabilities` (with text). Card, hashes and the rename are the verb's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..anatomy.sites import Anatomy
from ..checkpoint.contents import SETTINGS
from ..checkpoint.disk import require_space
from ..checkpoint.layout import read_layout, read_tensor
from ..checkpoint.manifest import Manifest
from ..checkpoint.source import COMPANION_PATTERNS, REFUSED_SUFFIXES, Source
from ..checkpoint.stage import Stage
from ..converted.described import Described
from ..errors import OutputError, SourceError, UnsupportedModel
from ..progress import Advance
from ..words import count_of

Slots = dict[str, tuple[torch.Tensor, torch.Tensor]]  # site name -> key (n, H, D), value (n, H, E), float32


@dataclass(frozen=True)
class Finished:
    """A converted checkpoint whose integrity holds.

    `root`: its files. `name`: what files may call it. `digest`: of its manifest. `original`: what it was converted
    from, opened and found to be that; None where it is not at hand.
    """

    root: Path
    name: str
    digest: str
    manifest: Manifest
    described: Described
    original: Source | None

    @cached_property
    def slots(self) -> Slots:
        """Keys and values of every site, in the order of the layers. UnsupportedModel where there are none."""
        anatomy = self.described.anatomy
        if self.described.encodes:
            raise UnsupportedModel(
                f"{self.root} is an encoder, and exports are for language models; use it in transformers."
            )
        if not self.described.eab.n_slots:
            raise UnsupportedModel(f"{self.root} has no slots, so there is nothing to export; fold a prefix first.")
        layout, slots = read_layout(self.root), {}
        for site in anatomy.sites:
            name = f"{anatomy.lead}{site.name}.attention_bias"
            slots[site.name] = (read_tensor(layout, f"{name}.key"), read_tensor(layout, f"{name}.value"))
        return slots

    @property
    def operations(self) -> tuple[str, ...]:
        """The names of the recipe's operations."""
        listed = self.manifest.recipe.get("operations") or []
        return tuple(name for one in listed if isinstance(one, dict) for name in one)

    def require_prefix_in_slots(self, why: str) -> None:
        """UnsupportedModel, with the reason in words, where more than slots is kept of the prefix."""
        self.slots  # noqa: B018  raises where there are none, or those of an encoder
        if self.described.eab.mixers or self.described.eab.indexers:
            raise UnsupportedModel(
                f"{self.root} keeps more of its prefix than slots (layers with a state remember it, or choose among "
                f"its keys), and {why}; use it in transformers."
            )

    def require_slots_only(self, engine: str) -> None:
        """UnsupportedModel unless slots are all that this checkpoint has beyond the original: then the original with
        these keys and values in its cache is the same function."""
        way_out = f"{engine} takes keys and values alone; fold by a recipe of attention_bias only"
        self.require_prefix_in_slots(f"{engine} takes keys and values alone")
        others = ", ".join(name for name in self.operations if name != "attention_bias") or "tune"
        if self.described.head_norm is not None:
            raise UnsupportedModel(f"{self.root} norms its heads (head_norm), and {way_out}.")
        changed = [name for name, entry in self.manifest.tensors.items() if entry.status in ("changed", "quantised")]
        if changed:
            raise UnsupportedModel(
                f"{self.root} changed {count_of(len(changed), 'tensor')} of the original ({others}; first "
                f"{changed[0]}), and {way_out}."
            )
        added = [name for name, entry in self.manifest.tensors.items() if entry.status == "added"]
        if more := [name for name in added if ".attention_bias." not in f".{name}"]:
            raise UnsupportedModel(f"{self.root} has {more[0]} beside its slots ({others}), and {way_out}.")


class Engine(ABC):
    """One program that runs the model. Stateless: what a method needs it is given.

    Args (of the class):
        name: what the command line calls it.
        title: what people call the program.
        library: the hub's name of it (`library_name` of a model card).
        needs_original: whether files of the original beside its weights are read even without text.
        uses_original: whether the program loads the original's weights beside what is exported.
        limit: the largest |delta log-probability| to OUT that rounding explains; above it nothing is published.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    library: ClassVar[str]
    needs_original: ClassVar[bool] = False
    uses_original: ClassVar[bool] = True
    limit: ClassVar[float] = 0.05

    def with_python(self, python: Path) -> Engine:
        """This engine, run by another Python. SourceError where it runs in surgery's own."""
        raise SourceError(f"{self.title} runs in surgery's own Python; leave out --engine-python.")

    @abstractmethod
    def refuse(self, finished: Finished) -> None:
        """UnsupportedModel, with the reason, for what this engine would not compute exactly."""

    @abstractmethod
    def write(self, finished: Finished, stage: Stage) -> None:
        """Write everything but the card and `export.json` into the stage. Whole files are `carry`-ed over."""

    @abstractmethod
    def prove(self, finished: Finished, directory: Path, device: str) -> str:
        """Look at what was written to `directory` as far as that goes without text, and say in one sentence what holds.

        It must work where the program is not installed. UnsupportedModel where the export is not the same function.
        """

    @abstractmethod
    def absent(self) -> str | None:
        """What to install so that `log_probabilities` works, as a command; None where it is there."""

    @abstractmethod
    def log_probabilities(
        self, finished: Finished, directory: Path, original: Path | None, chunks: torch.Tensor, device: str,
        advance: Advance,
    ) -> torch.Tensor:  # fmt: skip
        """Log-probability, in nats, that the program with `directory` gives each token of `chunks` (N, T) after those
        before it: (N, T - 1), float32 or wider. It computes in float32 where the program can.

        `original`: the unmodified original as plain files, if `uses_original`. `advance` is told of chunks.
        """

    @abstractmethod
    def usage(self, finished: Finished, name: str) -> str:
        """Markdown for the card: the exact code or commands that use the export in a directory called `name`."""

    def details(self, finished: Finished) -> Mapping[str, Any]:
        """What `export.json` says beyond what it says of every engine."""
        return {}


def windowed(anatomy: Anatomy) -> str | None:
    """What says that some layers see only a window or a chunk; None where all see everything."""
    text = anatomy.config.get_text_config()
    if (kinds := getattr(text, "layer_types", None)) is not None:
        return min(set(kinds) - {"full_attention"}, default=None)
    names = ("sliding_window", "attention_chunk_size")
    return next((name for name in names if getattr(text, name, None)), None)


def carry_tokenizer(finished: Finished, stage: Stage) -> None:
    """Put tokenizer files and licences of the checkpoint into the stage; its tokenizer adds no token that is folded."""
    for name in finished.manifest.files:
        listed = any(fnmatchcase(name, pattern) for pattern in COMPANION_PATTERNS)
        if listed and name != SETTINGS and not name.lower().endswith(REFUSED_SUFFIXES):
            carry(stage, finished.root / name, name)


def carry(stage: Stage, source: Path, name: str) -> None:
    """Put the file `source` into the stage as `name`: a hard link where the file system has them, else a copy."""
    try:
        stage.add_file(source, name, link=True)
    except OutputError:
        require_space(stage.out.parent, source.stat().st_size)
        stage.add_file(source, name)
