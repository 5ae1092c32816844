"""Quantised: perplexity under every scheme that a recipe names, simulated, and executed too where it says so."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

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
    """Score by scheme: simulated, and executed in int8."""

    simulated: dict[str, Score] = field(default_factory=dict)
    executed: dict[str, Score] = field(default_factory=dict)


class Quantised(Gate):
    """Perplexity as if quantised, over the bare original's in float; a gate for each scheme that is named.

    `live.quantised.SCHEMES` says what the schemes are.
    """

    name: ClassVar[str] = "quantised"

    w8a8_static: Int8 | None = None
    w8a8_dynamic: Int8 | None = None
    w8a8_per_token: Int8 | None = None
    w4a4_static: Simulated | None = None
    w4: Simulated | None = None
    kv4: Simulated | None = None
    kv2: Simulated | None = None

    def gates(self) -> dict[str, Simulated]:
        """Scheme -> its settings, of those that are named."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: gate for name, gate in found.items() if gate is not None}

    def executed(self) -> tuple[str, ...]:
        return tuple(name for name, gate in self.gates().items() if getattr(gate, "executed", False))

    @property
    def asks(self) -> bool:
        return bool(self.gates())

    @property
    def calibrates(self) -> bool:
        return any(SCHEMES[name].calibrated for name in self.gates())

    @property
    def reads_linears(self) -> bool:
        return any(SCHEMES[name].in_layers for name in self.gates())

    def require_tools(self, device: str) -> None:
        if self.executed():
            require_int8(device)

    def measure(self, subject: Subject, ready: Any) -> Scores:
        """Static scales are those of the calibration text, for what is simulated and for what is executed."""
        live, chunks, scores = subject.live, subject.chunks, Scores()
        calibrating = subject.calibrating if self.calibrates else None
        total = (len(self.gates()) + len(self.executed())) * len(chunks)
        with subject.bar("quantised", total + (0 if calibrating is None else len(calibrating))) as advance:
            ranges = None if calibrating is None else activation_ranges(live, calibrating, advance)

            def score(quantising: contextlib.AbstractContextManager[Any], what: str) -> Score:
                with quantising:
                    return scored(live, chunks, advance=advance, what=what)

            for name in self.gates():
                scores.simulated[name] = score(quantised(live, SCHEMES[name], ranges), name)
                if name in self.executed():
                    scores.executed[name] = score(executing(live, SCHEMES[name], ranges), f"{name}, executed")
        return scores

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        found, bare, judgements = converted.further[self.name], original.scores["bare"], []
        for name, gate in self.gates().items():
            scores = {f"{self.name}.{name}": found.simulated[name]}
            if name in found.executed:
                scores[f"{self.name}.{name}.executed"] = found.executed[name]
            judgements += [at_most(key, factor(paired(s, bare).high), gate.max_ratio) for key, s in scores.items()]
        return judgements

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        """Scheme -> both scores, and each one's difference to the bare original that is not quantised.

        Where it was `executed`, the same of that, and each one's difference to its simulation.
        """
        if original is None:
            return {}
        before, after, bare = original.further[self.name], converted.further[self.name], original.scores["bare"]
        found = {name: _beside(before.simulated[name], score, bare) for name, score in after.simulated.items()}
        for name, score in after.executed.items():
            found[name]["executed"] = entry = _beside(before.executed[name], score, bare)
            for whose, scores in (("original", before), ("converted", after)):
                difference = paired(scores.executed[name], scores.simulated[name])
                entry["delta_nll"][f"{whose}_vs_simulated"] = difference.to_dict()
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
            note="Simulated, unless it says run.",
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


def _beside(original: Score, converted: Score, bare: Score) -> dict[str, Any]:
    return {
        "original": original.to_dict(),
        "converted": converted.to_dict(),
        "delta_nll": {
            "original": paired(original, bare).to_dict(),
            "converted": paired(converted, bare).to_dict(),
        },
    }


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
