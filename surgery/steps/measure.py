"""What `run` and `verify` do alike: measure the original and the converted model on the same text, by every gate."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..anatomy.sites import Anatomy
from ..live.likelihood import scored
from ..live.model import Live
from ..live.roundings import rounds_values
from ..live.sample import continuation, speed
from ..live.score import Score
from ..live.stream import Observer
from ..live.text import FEW_CHUNKS, decoded
from ..progress import Reporter
from ..survey.full import survey
from ..verification.gates import Gate
from ..verification.gates.base import VARIANTS, Judgement, Measured, Subject, Variant
from ..verification.verdict import found_by, judged
from .recipe import Recipe

Load = Callable[[], tuple[Live, Any]]  # a model, freshly loaded, and its tokenizer


@dataclass(frozen=True)
class Measuring:
    """Text (N, T) to evaluate on, other text (M, T) to calibrate on, the gates, and what they made ready, by name."""

    evaluation: torch.Tensor
    calibrating: torch.Tensor | None
    gates: Sequence[Gate]
    reporter: Reporter
    ready: Mapping[str, Any] = field(default_factory=dict)

    def original(self, live: Live, prefix: Sequence[int], tokenizer) -> Measured:
        """The unchanged model: bare, after BOS where it has one, and after the folded prefix, if any."""
        bos = tokenizer.bos_token_id
        leads: dict[Variant, tuple[int, ...]] = {"bare": (), "control": tuple(prefix)}
        if bos is not None:
            leads["bos"] = (bos,)
        return self._measured(live, tokenizer, leads, original=True)

    def converted(self, live: Live, tokenizer) -> Measured:
        return self._measured(live, tokenizer, {"converted": ()}, original=False)

    def _measured(
        self, live: Live, tokenizer, leads: Mapping[Variant, tuple[int, ...]], original: bool
    ) -> Measured:  # fmt: skip
        """One pass over the text after each of `leads`, which every gate may watch; then what each measures beyond."""
        subject = Subject(live, tokenizer, original, self.evaluation, self.calibrating, self.reporter)
        scores: dict[str, Score] = {}
        watched: dict[str, dict[str, Any]] = {gate.name: {} for gate in self.gates}
        passes = set(leads.values())  # variants that are read after the same tokens are one
        with subject.bar("", len(passes) * len(self.evaluation)) as advance:
            for lead in dict.fromkeys(leads.values()):
                variants = [variant for variant in leads if leads[variant] == lead]
                observers = self._observers(variants)
                score = scored(
                    live, self.evaluation, prefix=lead, observers=[*observers.values()], advance=advance,
                    what=VARIANTS[variants[0]],
                )  # fmt: skip
                scores.update(dict.fromkeys(variants, score))
                for (name, variant), observer in observers.items():
                    watched[name][variant] = observer
        further = {gate.name: gate.measure(subject, self.ready.get(gate.name)) for gate in self.gates}
        return Measured(scores, watched, further)

    def _observers(self, variants: Sequence[Variant]) -> dict[tuple[str, Variant], Observer]:
        """(Gate, variant) -> its observer, of gates that have one."""
        wanted = {(gate.name, variant): gate.watch(variant) for gate in self.gates for variant in variants}
        return {key: observer for key, observer in wanted.items() if observer is not None}


# ---- both models, one after the other


@dataclass(frozen=True)
class Pair:
    """What original and converted model are measured on: see `Measuring`.

    `prefix` stands in front of the original's text as control; `recipe` says how near the two are to be. `names`, of
    original and converted: where given, some of the text is surveyed too.
    """

    anatomy: Anatomy
    prefix: tuple[int, ...]
    recipe: Recipe
    gates: Sequence[Gate]
    evaluation: torch.Tensor
    calibrating: torch.Tensor | None
    ready: Mapping[str, Any]
    names: tuple[str, str] | None = None


@dataclass(frozen=True)
class Found:
    """The gates' judgements and keys of the verdict, and surveys of both models where they were asked for."""

    judgements: list[Judgement]
    measured: dict[str, Any]
    surveys: list[dict[str, Any]] | None


def measure_pair(pair: Pair, original: Load | None, converted: Load, reporter: Reporter) -> Found:
    """Load and measure one model after the other, so that only one is in memory; `original` None: it is not at hand."""
    measuring = Measuring(pair.evaluation, pair.calibrating, pair.gates, reporter, pair.ready)
    surveys: list[dict[str, Any]] = []

    def of(load: Load, whose: str, name: str | None, measure: Callable[[Live, Any], Measured]):
        reporter.step(f"load {whose}")
        live, tokenizer = load()
        found = measure(live, tokenizer)
        if name is not None:
            heads = [(shown["block"], shown["head"]) for survey in surveys for shown in survey["attention_maps"]]
            surveys.append({"source": name, **_surveyed(live, tokenizer, pair.evaluation, heads, whose, reporter)})
        config, steps = live.model.config, rounds_values(live.model)
        del live
        gc.collect()
        return found, tokenizer, config, steps

    names = pair.names or (None, None)
    before = None
    if original is not None:
        before, *_ = of(original, "the original", names[0],
                          lambda live, tokenizer: measuring.original(live, pair.prefix, tokenizer))  # fmt: skip
    after, tokenizer, config, steps = of(converted, "the converted model", names[1], measuring.converted)
    exact = is_exact(pair.recipe, config, pair.evaluation.shape[1] + len(pair.prefix))
    if exact and steps:  # what random token ids have shown in float64
        reporter.note("its layers round their inputs, so on text it is near the original after the prefix, not equal")
        exact = False
    return Found(
        judged(pair.gates, before, after, exact), found_by(pair.gates, before, after, tokenizer), surveys or None
    )


def _surveyed(
    live: Live, tokenizer: Any, evaluation: torch.Tensor, heads: Sequence[tuple[int, int]], whose: str,
    reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """A survey of some of the evaluation text, with how fast it is read and how the model would go on from its start.

    `heads` (block, head) are those whose attention is shown, so that both models show the same; none: it chooses.
    """
    some = evaluation[: FEW_CHUNKS.count]
    reporter.step(f"survey {whose}")
    written = continuation(live, some[0])
    sample = None if written is None else {part: decoded(tokenizer, ids) for part, ids in written.items()}
    further = {"speed": speed(live, some[0]), "sample": sample}
    with reporter.bar("survey", len(some)) as advance:
        return {**survey(live, tokenizer, some, heads=heads, advance=advance), **further}


def is_exact(recipe: Recipe, config: PreTrainedConfig, length: int) -> bool:
    """Whether the converted model, of `config`, is what the original is after the prefix, on texts of `length` tokens,
    those of the prefix among them."""
    return all(change.exact_on(config, length) for change in recipe.changes)
