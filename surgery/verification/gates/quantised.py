"""Quantised: perplexity under every scheme that a recipe names, simulated, and executed too where it says so."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...live.executed import executing, require_int8
from ...live.likelihood import scored
from ...live.paired import paired
from ...live.quantised import SCHEMES, activation_ranges, quantised
from ...live.score import Score
from ...recipe.fields import Positive, Strict
from ...table import Factors, Table
from ...words import factor, finite, fixed, times, visible_name
from .base import Gate, Judgement, Measured, Subject, at_most

NAMES = {
    "w8a8_static": "8 bit, static scales",
    "w8a8_dynamic": "8 bit, a scale per batch",
    "w8a8_per_token": "8 bit, a scale per token",
    "w4a4_static": "4 bit, static scales",
    "w4": "weights only, 4 bit",
    "kv4": "cache only, 4 bit",
    "kv2": "cache only, 2 bit",
}


class Simulated(Strict):
    """Perplexity of the quantised converted model over the bare original's in float, upper end of the interval."""

    max_ratio: Positive = Field(examples=[1.25], description="the largest ratio")


class Int8(Simulated):
    """The same, simulated and, where it is asked for, run for real (`live.executed`); the gate is on both."""

    executed: Annotated[bool, Field(description="also run int8 for real, on the CPU")] = False


@dataclass(frozen=True)
class Scores:
    """Scores by scheme, one for each set of calibration text that gave scales: simulated, and executed in int8."""

    simulated: dict[str, list[Score]] = field(default_factory=dict)
    executed: dict[str, list[Score]] = field(default_factory=dict)


class Quantised(Gate):
    """Perplexity as if quantised, over the bare original's in float; a gate for each scheme that is named.

    `live.quantised.SCHEMES` says what the schemes are. A static scheme is judged by the worst of `calibrations` sets of
    scales, each of other text: one set says as much of its text as of the model.
    """

    name: ClassVar[str] = "quantised"
    reading: ClassVar[Literal["text", "images"] | None] = "text"

    w8a8_static: Int8 | None = None
    w8a8_dynamic: Int8 | None = None
    w8a8_per_token: Int8 | None = None
    w4a4_static: Simulated | None = None
    w4: Simulated | None = None
    kv4: Simulated | None = None
    kv2: Simulated | None = None
    calibrations: Annotated[
        int, Field(ge=1, le=16, description="disjoint calibration texts that set static scales; the worst counts")
    ] = 1

    @model_validator(mode="after")
    def _of_a_static_scheme(self) -> Self:
        if self.calibrations > 1 and not self.calibrates:
            raise ValueError("sets calibrations, which only static scales have; name w8a8_static or w4a4_static too")
        return self

    def gates(self) -> dict[str, Simulated]:
        """Scheme -> its settings, of those that are named."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: gate for name, gate in found.items() if isinstance(gate, Simulated)}

    def executed(self) -> tuple[str, ...]:
        return tuple(name for name, gate in self.gates().items() if getattr(gate, "executed", False))

    @property
    def asks(self) -> bool:
        return bool(self.gates())

    @property
    def calibrates(self) -> bool:
        return any(SCHEMES[name].calibrated for name in self.gates())

    @property
    def calibration_sets(self) -> int:
        return self.calibrations if self.calibrates else 1

    @property
    def reads_linears(self) -> bool:
        return any(SCHEMES[name].in_layers for name in self.gates())

    @property
    def whole(self) -> bool:
        return bool(self.executed())

    def require_tools(self, device: str) -> None:
        if self.executed():
            require_int8(device)

    def measure(self, subject: Subject, ready: Any) -> Scores:
        """Static scales are those of the calibration text, for what is simulated and for what is executed."""
        live, chunks, scores = subject.live, subject.chunks, Scores()
        calibrating = subject.calibrating if self.calibrates else None
        sets = [] if calibrating is None else calibrating.tensor_split(self.calibrations)
        passes = {name: max(1, len(sets) if SCHEMES[name].calibrated else 1) for name in self.gates()}
        total = sum(count * (2 if name in self.executed() else 1) for name, count in passes.items()) * len(chunks)
        with subject.bar("quantised", total + sum(map(len, sets))) as advance:
            ranges = [activation_ranges(live, part, advance) for part in sets]

            def score(quantising: contextlib.AbstractContextManager[Any], what: str) -> Score:
                with quantising:
                    return scored(live, chunks, advance=advance, what=what)

            for name in self.gates():
                scheme = SCHEMES[name]
                given = ranges if scheme.calibrated else [None]
                scores.simulated[name] = [score(quantised(live, scheme, found), name) for found in given]
                if name in self.executed():
                    what = f"{name}, executed"
                    scores.executed[name] = [score(executing(live, scheme, found), what) for found in given]
        return scores

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        found, bare, judgements = converted.further[self.name], original.scores["bare"], []
        for name, gate in self.gates().items():
            scores = {f"{self.name}.{name}": found.simulated[name]}
            if name in found.executed:
                scores[f"{self.name}.{name}.executed"] = found.executed[name]
            for key, all_sets in scores.items():
                judgements.append(at_most(key, factor(paired(_worst(all_sets, bare), bare).high), gate.max_ratio))
        return judgements

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        """Scheme -> both scores, and each one's difference to the bare original that is not quantised.

        Where it was `executed`, the same of that, and each one's difference to its simulation.
        """
        if original is None:
            return {}
        before, after, bare = original.further[self.name], converted.further[self.name], original.scores["bare"]
        found = {name: _beside(before.simulated[name], sets, bare) for name, sets in after.simulated.items()}
        for name, sets in after.executed.items():
            found[name]["executed"] = entry = _beside(before.executed[name], sets, bare)
            for whose, scores in (("original", before), ("converted", after)):
                worst = _worst(scores.executed[name], bare)
                simulated = scores.simulated[name][scores.executed[name].index(worst)]
                entry["delta_nll"][f"{whose}_vs_simulated"] = paired(worst, simulated).to_dict()
        return {self.name: found}

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        pairs = _pairs(verdict)
        rows = []
        for name, entry in pairs:
            before, after = entry["delta_nll"]["original"], entry["delta_nll"]["converted"]
            original, converted = (fixed(entry[which]["ppl"], 4) for which in ("original", "converted"))
            rows.append((name, original, "1" if before is None else times(before), converted, times(after)))
        if not rows:
            return None
        against = "times the bare original"
        return Table(
            "Quantised", ("", "original", against, "converted", against), rows,
            note=f"Simulated, unless it says run.{_of_sets(verdict)}",
            text="With numbers stored in few bits, as small and fast hardware wants them: weights and activations, or "
            "weights only, or the key/value cache only. A static scale is set once, on other text, and one huge "
            "activation makes it too coarse for all the others; a scale per token costs more to run.",
            figure=Factors("Times the perplexity of the bare original", [(n, e["delta_nll"]) for n, e in pairs]),
        )  # fmt: skip

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        """Whose interval lies below the other's: stricter than a paired test, which a verdict has no figures for."""
        kinds: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
        for name, entry in _pairs(verdict):
            before, after = (entry["delta_nll"][which] for which in ("original", "converted"))
            if before is None:
                continue
            ends = [delta[end] for delta in (before, after) for end in ("low", "high")]
            if not all(map(finite, ends)):
                ends = [0.0] * 4
            kind = "better" if ends[3] < ends[0] else "worse" if ends[2] > ends[1] else "no clear difference"
            kinds[kind].append(name)
        parts = [f"{kind} with {'; '.join(names)}" for kind, names in kinds.items() if names]
        if not parts:
            return None
        return f"The converted model, quantised, against the original, quantised alike: {' – '.join(parts)}."

    @classmethod
    def label(cls, judgement: str) -> str:
        _, scheme, *executed = f"{judgement}.".split(".")
        return f"quantised, {_name(scheme)}{', run in int8' if any(executed) else ''}, times the bare original's"


def _worst(sets: Sequence[Score], bare: Score) -> Score:
    """Of the scores with scales from several texts, the one that is judged."""
    return max(sets, key=lambda score: _rank(paired(score, bare).high))


def _of_sets(verdict: Mapping[str, Any]) -> str:
    sets = max((len(entry["calibrations"]["converted"]) for entry in (verdict.get("quantised") or {}).values()
                if entry.get("calibrations")), default=1)  # fmt: skip
    return f" Static scales: the worst of {sets} calibration texts." if sets > 1 else ""


def _rank(high: float) -> float:
    return high if finite(high) else float("inf")  # what overflows is the worst


def _beside(original: Sequence[Score], converted: Sequence[Score], bare: Score) -> dict[str, Any]:
    """Of both models the worst score, its difference to the bare original, and where there are several, all of them."""
    worst = {"original": _worst(original, bare), "converted": _worst(converted, bare)}
    found: dict[str, Any] = {
        **{whose: score.to_dict() for whose, score in worst.items()},
        "delta_nll": {whose: paired(score, bare).to_dict() for whose, score in worst.items()},
    }
    if len(converted) > 1:
        found["calibrations"] = {
            "original": [score.ppl for score in original],
            "converted": [score.ppl for score in converted],
        }
    return found


def _name(scheme: str) -> str:
    return NAMES.get(scheme, visible_name(scheme))


def _pairs(verdict: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, what the verdict has of it) of every quantised pair of models, those that really ran in int8 among them.

    First of all the same two models as they are, where there is anything to compare with them.
    """
    found = verdict.get("quantised") or {}
    if not found:
        return []
    scores, rows = verdict.get("perplexity") or {}, []
    if scores.get("bare") and scores.get("converted"):
        delta = {"original": None, "converted": (verdict.get("delta_nll") or {}).get("vs_bare")}
        whole = {"original": scores["bare"], "converted": scores["converted"], "delta_nll": delta}
        rows.append(("not quantised", whole))
    for scheme, entry in found.items():
        rows.append((_name(scheme), entry))
        if entry.get("executed"):
            rows.append((f"{_name(scheme)}, run in int8", entry["executed"]))
    return rows
