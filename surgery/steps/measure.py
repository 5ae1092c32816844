"""What `run` and `verify` do alike: measure the original and the converted model on the same text, by every gate."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..live.features import Features
from ..live.images import picture_of
from ..live.likelihood import Likelihood
from ..live.model import Live
from ..live.port import Images
from ..live.roundings import rounds_values
from ..live.sample import continuation, speed
from ..live.stream import Observer, Reading, read
from ..live.text import FEW_CHUNKS, behind, decoded
from ..progress import Reporter
from ..survey.full import FullSurvey
from ..survey.patches import SHOWN, SIDE
from ..verification.gates import Gate
from ..verification.gates.base import VARIANTS, Judgement, Measured, Subject, Variant
from ..verification.verdict import found_by, judged
from .recipe import Recipe
from .resume import ALWAYS, Steps

Load = Callable[[], tuple[Live, Any]]  # a model, freshly loaded, and its tokenizer


# Variants that are read on all of the text. Those beside them are read on a part that will do to tell them apart: what
# follows from the control is exact, and what a BOS does is large.
MAIN: set[Variant] = {"bare", "converted"}
FEW, PART = 16, 4  # chunks at the least, and one in so many


def few_of(chunks: torch.Tensor) -> int:
    """How many of `chunks` the variants beside are read on, unless a gate watches them."""
    return max(FEW, math.ceil(len(chunks) / PART))


@dataclass(frozen=True)
class Measuring:
    """Text (N, T) to evaluate on, other text (M, T) to calibrate on, the gates, and what they made ready, by name. Of
    an encoder both are what it reads; `before` are tokens that its tokenizer put before each text, until they became
    slots."""

    evaluation: torch.Tensor
    calibrating: torch.Tensor | None
    gates: Sequence[Gate]
    reporter: Reporter
    ready: Mapping[str, Any] = field(default_factory=dict)
    before: tuple[int, ...] = ()

    def original(self, live: Live, prefix: Sequence[int], tokenizer, survey: FullSurvey | None) -> Measured:
        """The unchanged model: bare, after BOS where it has one, and after the folded prefix, if any."""
        leads: dict[Variant, tuple[int, ...]] = {"bare": ()}
        if live.port.predicts:
            leads["control"] = tuple(prefix)
            if (bos := tokenizer.bos_token_id) is not None:
                leads["bos"] = (bos,)
        if self.before:
            given = None if self.calibrating is None else behind(self.before, self.calibrating)
            measuring = replace(self, evaluation=behind(self.before, self.evaluation), calibrating=given)
            return measuring._measured(live, tokenizer, leads, survey, original=True)
        return self._measured(live, tokenizer, leads, survey, original=True)

    def converted(self, live: Live, tokenizer, survey: FullSurvey | None) -> Measured:
        return self._measured(live, tokenizer, {"converted": ()}, survey, original=False)

    def _measured(
        self, live: Live, tokenizer, leads: Mapping[Variant, tuple[int, ...]], survey: FullSurvey | None, original: bool
    ) -> Measured:  # fmt: skip
        """One pass over the weights, which every gate may watch, with the text after each of `leads`; then what each
        gate measures beyond. What is read bare is surveyed too, as much of it as a survey takes."""
        subject = Subject(live, tokenizer, original, self.evaluation, self.calibrating, self.reporter)
        watched: dict[str, dict[str, Any]] = {gate.name: {} for gate in self.gates}
        readings: list[Reading] = []
        scoring: dict[Variant, Likelihood | Features] = {}
        for lead in dict.fromkeys(leads.values()):  # variants that are read after the same tokens are one
            variants = [variant for variant in leads if leads[variant] == lead]
            observers, scores = self._observers(variants), Likelihood() if live.port.predicts else Features(live)
            scoring.update(dict.fromkeys(variants, scores))
            for (name, variant), observer in observers.items():
                watched[name][variant] = observer
            main, looking = not MAIN.isdisjoint(variants), [scores, *observers.values()]
            text = self.evaluation if main or observers else self.evaluation[: few_of(self.evaluation)]
            readings += _readings(text, lead, looking, survey if main else None, VARIANTS[variants[0]])
        with subject.bar("", sum(len(reading.chunks) for reading in readings)) as advance:
            read(live, readings, advance)
        beyond = {gate.name: gate.measure(subject, self.ready.get(gate.name)) for gate in self.gates}
        return Measured(
            {variant: one.score for variant, one in scoring.items() if isinstance(one, Likelihood)}, watched, beyond,
            {variant: one for variant, one in scoring.items() if isinstance(one, Features)}, live.port,
        )  # fmt: skip

    def _observers(self, variants: Sequence[Variant]) -> dict[tuple[str, Variant], Observer]:
        """(Gate, variant) -> its observer, of gates that have one."""
        wanted = {(gate.name, variant): gate.watch(variant) for gate in self.gates for variant in variants}
        return {key: observer for key, observer in wanted.items() if observer is not None}


def _readings(
    text: torch.Tensor, lead: tuple[int, ...], observers: list[Observer], survey: FullSurvey | None, what: str
) -> list[Reading]:  # fmt: skip
    """`text` to be read after `lead`, the first of it by `survey` as well."""
    if survey is None:
        return [Reading(text, observers, lead, what=what)]
    some, rest = text[: FEW_CHUNKS.count], text[FEW_CHUNKS.count :]
    surveyed = Reading(some, [*observers, *survey.observers], lead, what=what)
    return [surveyed, Reading(rest, observers, lead, what=what)] if len(rest) else [surveyed]


# ---- both models, one after the other


@dataclass(frozen=True)
class Pair:
    """What original and converted model are measured on: see `Measuring`.

    `prefix` stands in front of the original's text as control; `recipe` says how near the two are to be. `names`, of
    original and converted: where given, some of the text is surveyed too. `pictures`: of images, what each is called.
    `before`: see `Measuring`.
    """

    prefix: tuple[int, ...]
    recipe: Recipe
    gates: Sequence[Gate]
    evaluation: torch.Tensor
    calibrating: torch.Tensor | None
    ready: Mapping[str, Any]
    names: tuple[str, str] | None = None
    pictures: Sequence[str] = ()
    before: tuple[int, ...] = ()


@dataclass(frozen=True)
class Found:
    """The gates' judgements and keys of the verdict, and surveys of both models where they were asked for."""

    judgements: list[Judgement]
    measured: dict[str, Any]
    surveys: list[dict[str, Any]] | None


def measure_pair(
    pair: Pair, original: Load | None, converted: Load, reporter: Reporter, steps: Steps = ALWAYS
) -> Found:  # fmt: skip
    """Load and measure one model after the other, so that only one is in memory; `original` None: it is not at hand."""
    measuring = Measuring(pair.evaluation, pair.calibrating, pair.gates, reporter, pair.ready, pair.before)
    names, heads = pair.names or (None, None), []
    before, surveyed = None, None

    def of_original() -> tuple[Measured, dict[str, Any] | None]:
        assert original is not None
        reporter.step("load the original")
        live, tokenizer = original()
        survey = _survey(live, pair, names[0], [])
        found = measuring.original(live, pair.prefix, tokenizer, survey)
        return found, _shown(live, tokenizer, pair, names[0], survey)

    if original is not None:
        before, surveyed = steps.once("original", of_original)
        gc.collect()  # the model is let go before the next is loaded
    if surveyed is not None:
        heads = [(shown["block"], shown["head"]) for shown in surveyed["attention_maps"]]
    reporter.step("load the converted model")
    live, tokenizer = converted()
    survey = _survey(live, pair, names[1], heads)
    after = measuring.converted(live, tokenizer, survey)
    surveys = [one for one in (surveyed, _shown(live, tokenizer, pair, names[1], survey)) if one is not None]
    exact = live.port.predicts and is_exact(pair.recipe, live.model.config, pair.evaluation.shape[1] + len(pair.prefix))
    if exact and rounds_values(live.model):  # what random token ids have shown in float64
        reporter.note("its layers round their inputs, so on text it is near the original after the prefix, not equal")
        exact = False
    del live
    gc.collect()
    return Found(
        judged(pair.gates, before, after, exact), found_by(pair.gates, before, after, tokenizer), surveys or None
    )


def _survey(live: Live, pair: Pair, name: str | None, heads: Sequence[tuple[int, int]]) -> FullSurvey | None:
    length = live.port.tokens if isinstance(live.port, Images) else pair.evaluation.shape[1]
    return None if name is None else FullSurvey(live, length, heads)


def _shown(
    live: Live, tokenizer: Any, pair: Pair, name: str | None, survey: FullSurvey | None
) -> dict[str, Any] | None:  # fmt: skip
    """What a survey found, with what a model says and how fast, under the name that it is to be shown by."""
    if survey is None:
        return None
    found = {"source": name, **survey.to_dict(tokenizer)}
    if not live.port.predicts:
        if survey.norms is None:
            return found
        pictures = [picture_of(image, SIDE) for image in pair.evaluation[:SHOWN]]
        return {**found, "norm_maps": survey.norms.to_dict(pair.pictures, pictures)}
    return {**found, **_tried(live, tokenizer, pair.evaluation[0])}


def _tried(live: Live, tokenizer: Any, chunk: torch.Tensor) -> dict[str, Any]:
    """How fast `chunk` (T,) is read, and how the model would go on from its start; of what comes layer by layer, whose
    weights each token would read anew, neither."""
    if live.layers is not None:
        return {"speed": None, "sample": None}
    written = continuation(live, chunk)
    sample = None if written is None else {part: decoded(tokenizer, ids) for part, ids in written.items()}
    return {"speed": speed(live, chunk), "sample": sample}


def is_exact(recipe: Recipe, config: PreTrainedConfig, length: int) -> bool:
    """Whether the converted model, of `config`, is what the original is after the prefix, on texts of `length` tokens,
    those of the prefix among them."""
    return all(change.exact_on(config, length) for change in recipe.changes)
