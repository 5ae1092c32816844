"""What a gate is: one thing that is asked of the converted model, from its key in a recipe to its table, in one file.

To add one: a file here with a class that derives from `Gate`, its line in `gates.GATES`, its test, its row in the
README.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ...live.port import TEXT, Port
from ...live.score import Score
from ...recipe.fields import Named
from ...table import Table

if TYPE_CHECKING:
    import torch

    from ...live.features import Features
    from ...live.model import Live
    from ...live.stream import Observer
    from ...live.text import Chunking
    from ...progress import Advance, Reporter

# How the evaluation text is read: by the original as it is, after BOS, after the folded prefix; by the converted model.
# The control is always measured, after no tokens where nothing was folded; after BOS only what has one.
Variant = Literal["bare", "bos", "control", "converted"]
VARIANTS: dict[Variant, str] = {
    "bare": "original, bare",
    "bos": "original + BOS",
    "control": "original + the same prefix",
    "converted": "converted",
}


@dataclass(frozen=True)
class Judgement:
    """A value that was measured, the limit that a recipe sets, and whether it holds. `limit` is the most, or the least
    where it is a `minimum`."""

    name: str
    passed: bool
    value: float
    limit: float
    minimum: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As in `gates` of the verdict: `minimum` is there only where it is true."""
        found = asdict(self)
        return found if self.minimum else {key: value for key, value in found.items() if key != "minimum"}


def at_most(name: str, value: float, limit: float) -> Judgement:
    """Passes where value <= limit; never on NaN."""
    return Judgement(name, bool(value <= limit), value, limit)


def at_least(name: str, value: float, limit: float) -> Judgement:
    """Passes where value >= limit; never on NaN."""
    return Judgement(name, bool(value >= limit), value, limit, minimum=True)


@dataclass(frozen=True)
class Inputs:
    """What a measurement is given: chunks of evaluation text, the device, files of tasks (--tasks).

    `room`: how many positions either model has for text; None where there is no end of them. `classes`: whether the
    model has a head that says what is in an image or a recording.
    """

    chunking: Chunking
    device: str
    room: int | None = None
    tasks: Path | None = None
    classes: bool = False


@dataclass(frozen=True)
class Subject:
    """The model that is measured, on chunks (N, T); scales come from `calibrating` (M, T), other text. Of an encoder
    both are pixels, or recordings.

    `original`: whether it is the one that was converted.
    """

    live: Live
    tokenizer: Any
    original: bool
    chunks: torch.Tensor
    calibrating: torch.Tensor | None
    reporter: Reporter

    def step(self, how: str = "") -> None:
        """Say that it is measured, `how`."""
        whose = "the original" if self.original else "the converted model"
        self.reporter.step(f"measure {whose} {how}".rstrip())

    @contextlib.contextmanager
    def bar(self, how: str, sequences: int) -> Iterator[Advance]:
        """The same, with a bar of how many sequences are read."""
        self.step(how)
        with self.reporter.bar(how, sequences) as advance:
            yield advance


@dataclass(frozen=True)
class Measured:
    """What was found of one model: scores by variant, or of an encoder features; by gate and variant, the observer that
    looked on; and by gate, what `Gate.measure` returned."""

    scores: Mapping[str, Score]
    watched: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    further: Mapping[str, Any] = field(default_factory=dict)
    features: Mapping[str, Features] = field(default_factory=dict)
    port: Port = TEXT

    def finite(self, variant: Variant) -> bool:
        """Whether what it says is made of numbers."""
        if variant in self.features:
            return self.features[variant].finite
        return math.isfinite(self.scores[variant].nll)


class Gate(Named):
    """Its fields are what a recipe says under `verify`, by `name`.

    What is measured goes into the verdict as JSON, and tables and sentences are made from that alone: a verdict may
    come from a file. Of a figure that is not a number the report has NaN again, whatever JSON made of it. `judge` and
    `label` have no default. Observers outlive the pass: they keep little, and nothing on a GPU.
    """

    always: ClassVar[bool] = False  # applies with its defaults where a recipe does not name it
    reading: ClassVar[Literal["text", "images"] | None] = None  # what a model has to read for it
    same_function: ClassVar[bool] = False  # applies only where the converted model is to compute what the original does

    @property
    def asks(self) -> bool:
        """Whether these settings ask for anything."""
        return True

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is read."""
        return False

    @property
    def calibration_sets(self) -> int:
        """How many disjoint sets of calibration text are read."""
        return 1

    @property
    def reads_linears(self) -> bool:
        """Whether the weights of linear layers have to be in reach."""
        return False

    @property
    def whole(self) -> bool:
        """Whether it works on all weights at once, so that a model cannot come layer by layer."""
        return False

    def require_tools(self, device: str) -> None:
        """At plan. SourceError unless what it is measured with is installed, and runs on `device`."""

    def require(self, inputs: Inputs) -> Any:
        """Before weights are read. SourceError for what is missing; what it returns is handed to `measure`."""

    @classmethod
    def refuse(cls, inputs: Inputs) -> None:
        """Where this gate is not asked for: SourceError for what only it would use."""

    def watch(self, variant: Variant) -> Observer | None:
        """An observer for the one pass in which `variant` is scored."""

    def measure(self, subject: Subject, ready: Any) -> Any:
        """What is measured beyond that pass, of either model; `ready` is what `require` returned."""

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        """Without the `original`, what can be judged of the converted model alone."""
        raise NotImplementedError

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        """Its keys of the verdict."""
        return {}

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        """What the verdict holds of it; None where that is nothing. `settings`: its part of the recipe, where known."""

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        """The same in one sentence."""

    @classmethod
    def label(cls, judgement: str) -> str:
        """What the value of a judgement is, in words: the name itself is a key."""
        raise NotImplementedError
