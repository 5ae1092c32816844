"""What an operation is: settings that a recipe gives, and all that has to be done with them. One file each.

A run goes through the operations of its recipe in their order. Each is planned from headers, fitted on the live model
with those before it in place, grafted, and at last asked for the tensors to write. To add one, derive from `Operation`
in a file of its own, and name it in `operations.OPERATIONS`.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..anatomy.sites import Anatomy
from ..anatomy.stored import vocabulary_size
from ..checkpoint.layout import Layout, Stored
from ..converted.card import Section
from ..converted.described import Described
from ..live.model import Live
from ..progress import Reporter
from ..recipe.fields import Named
from ..table import Table

Exact = Literal["bits", "rounding", "no"]
Port = Literal["text", "images"]  # what a model reads; to operations and gates, sound is as images are
Alter = Callable[[torch.Tensor], torch.Tensor]
Parts = Any  # what one operation fitted; opaque to all but that operation


@dataclass(frozen=True)
class Target:
    """The checkpoint that operations are planned on. `tokenizer` is None where it has none."""

    anatomy: Anatomy
    layout: Layout
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def vocab_size(self) -> int:
        """How many token ids the model has embeddings for."""
        return vocabulary_size(self.layout, self.anatomy)


@dataclass(frozen=True)
class Trained:
    """Something that tuning trains in full: its key and count in the plan's JSON, and what plan and card call it."""

    key: str
    count: Any
    planned: str
    called: str


@dataclass(frozen=True)
class Changes:
    """What operations do to a checkpoint, known before weights are read.

    `added`: tensor name -> what is stored, in the order of the file. `changed`: stored name -> "changed", or "may
    change" where the text decides. `replaced`: stored name -> name -> what is stored in its place. `config`: entries of
    config.json, plain JSON. `parts`: what sites hold at run time (`converted.derived.PARTS`). `prefix`: the tokens in
    front of the text to which the original is compared; None while they are searched. `positions`: how many of the
    longest text's places it takes, at the most. `told`: keys of the plan's JSON; `words`: what is added, as phrases.
    """

    added: Mapping[str, Stored] = field(default_factory=dict)
    changed: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, Mapping[str, Stored]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    parts: frozenset[str] = frozenset()
    prefix: tuple[int, ...] | None = ()
    positions: int = 0
    told: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    trains: tuple[Trained, ...] = ()

    def __add__(self, other: Changes) -> Changes:
        """Both, one after the other. Of an entry of config.json that both make, the first counts."""
        prefix = None if self.prefix is None or other.prefix is None else self.prefix + other.prefix
        return Changes(
            {**self.added, **other.added}, {**self.changed, **other.changed}, {**self.replaced, **other.replaced},
            {**other.config, **self.config},
            self.parts | other.parts, prefix, self.positions + other.positions, {**self.told, **other.told},
            self.words + other.words, self.trains + other.trains,
        )  # fmt: skip


Once = Callable[[str, Callable[[], Any]], Any]


def _done(name: str, work: Callable[[], Any]) -> Any:
    return work()


@dataclass(frozen=True)
class Fitting:
    """What an operation is fitted with: its plan, and chunks (M, T) of `calibration` text, None where there is none.

    `earlier`: the parts of the operations before it. And for tuning: `training`, what it reads and runs on, prepared
    before weights were read (`tuning.tune.Training`); `gate`, what the gates of head norms shall be in the end; and
    `directory`, which holds the original. `once(name, work)` returns what `work` does, and may know it from before.
    """

    target: Target
    planned: Changes
    calibration: torch.Tensor | None
    reporter: Reporter
    earlier: Mapping[str, Parts] = field(default_factory=dict)
    training: Any = None
    gate: float = 0.0
    directory: Path | None = None
    once: Once = _done

    @property
    def chunks(self) -> torch.Tensor:
        """The calibration text of an operation that `reads` it, or `searches`: then there is some."""
        assert self.calibration is not None
        return self.calibration


class NothingToDo(Exception):
    """Raised by `fit` where the model has nothing that the operation is for: the run ends, and writes nothing.

    `str()` is a phrase that says why, and the way out.
    """


@dataclass(frozen=True)
class Stand:
    """What the card has to know of the rest of the recipe: whether all of it is exact, and what tuning trains."""

    exact: bool
    tuned: bool
    trains: tuple[Trained, ...] = ()


class Operation(Named):
    """The settings of one operation. What is not overridden says: nothing.

    `example`: its settings, as a recipe writes them. `rests`: grafted, it leaves the function as it is, whatever is
    emitted later (head norms at gate 0). `adds`: it adds something to a site, which a converted checkpoint needs.
    `last`: it comes after tuning too. `reading`: what a model has to read for it, where not any will do. `key`: of its
    table in a report, where that is not its name.
    """

    example: ClassVar[str] = "{}"
    rests: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    last: ClassVar[bool] = False
    reading: ClassVar[Port | None] = None
    key: ClassVar[str | None] = None

    @property
    def opens(self) -> float:
        """How far the gates that it is grafted with closed are open in what is emitted."""
        return 0.0

    # ---- before weights

    @property
    def exact(self) -> Exact:
        """What is emitted, against the original after the same prefix: the same bits, the same to rounding, or not."""
        raise NotImplementedError

    @property
    def inexact(self) -> str:
        """What of it makes another function of the model, in words."""
        return self.name

    def exact_on(self, config: PreTrainedConfig, length: int) -> bool:
        """Whether `exact` also holds on texts of `length` tokens, those of the prefix among them."""
        return self.exact != "no"

    @property
    def changes_weights(self) -> bool:
        """Whether tensors of the source may change."""
        return False

    @property
    def whole(self) -> bool:
        """Whether it works on all weights at once, so that a model cannot come layer by layer."""
        return self.changes_weights

    @property
    def reads(self) -> str | None:
        """What of it reads calibration text, as the beginning of a sentence."""
        return None

    @property
    def needs_tokenizer(self) -> bool:
        """Whether its settings hold texts, which have to become token ids."""
        return False

    @property
    def most_positions(self) -> int:
        """How many places of the longest text it may take, before anything is searched."""
        return 0

    @property
    def searches(self) -> bool:
        """Whether its prefix is searched on calibration text."""
        return False

    @property
    def repeats(self) -> bool:
        """Whether it can be fitted once more from the source alone: to the same, but for rounding."""
        return self.reads is None and not self.searches

    def as_found(self, described: Described) -> Self:
        """The same settings for fitting once more: what was searched is what a converted checkpoint says was found.

        DamagedCheckpoint where no search of these settings finds that.
        """
        return self

    def could_make(self, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Whether it could have changed a tensor of the source to `after`, whatever the text that it was fitted on."""
        return True

    @abc.abstractmethod
    def plan(self, target: Target, parts: Parts | None = None) -> Changes:
        """What it will do; without `parts`, what it may do at the most.

        UnsupportedModel, SourceError where it cannot.
        """

    # ---- on the live model

    def require(self, live: Live) -> None:
        """Raise what can be refused as soon as weights are there, before the long work."""

    @abc.abstractmethod
    def fit(self, live: Live, text: Fitting) -> Parts:
        """What is computed from the weights, with the operations before it in place."""

    @abc.abstractmethod
    def graft(self, live: Live, parts: Parts) -> contextlib.AbstractContextManager[object]:
        """The live model with it in place. Weights that it changes stay changed: the model is not used afterwards."""

    def held(self, live: Live, parts: Parts) -> Parts:
        """Its parts as the live model holds them, once tuning has trained them."""
        return parts

    @abc.abstractmethod
    def tensors(self, live: Live, parts: Parts) -> Mapping[str, torch.Tensor]:
        """What it adds and what it changes, by name in the causal language model, with it in place."""

    def alters(self, parts: Parts, target: Target) -> Mapping[str, Alter]:
        """Tensors of the source that it changes one by one, by name in the causal language model: what becomes of the
        value that those before it leave. They are not among its `tensors`, and so never in memory together."""
        return {}

    def rewrite(self, parts: Parts, target: Target, stored: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """What is stored in place of a tensor that it `replaced`, given the value that those before it leave."""
        raise NotImplementedError

    def remembered(self, parts: Parts) -> Parts:
        """What `found` and `says` need of its parts, once the tensors are collected: nothing large."""
        return parts

    # ---- what came out

    @classmethod
    def asks(cls, described: Described) -> Mapping[str, Mapping[str, Stored]]:
        """What the config.json of a converted checkpoint asks for on its behalf: kind -> ending of a name -> tensor."""
        return {}

    def found(self, parts: Parts, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        """Its keys of verdict.json."""
        return {}

    @abc.abstractmethod
    def says(self, parts: Parts, target: Target, recipe: Stand) -> Section:
        """What the model card says of it."""

    # ---- from a verdict, which may come from a file

    @classmethod
    def table(cls, verdict: Mapping[str, Any]) -> Table | None:
        """What a verdict holds of it, as a table; None where that is nothing."""
        return None

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        """The same in one sentence."""
        return None
