"""Quantised features: fidelity as if an encoder was quantised, under every scheme that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ...live.features import Features
from ...live.quantised import SCHEMES, activation_ranges, quantised
from ...live.stream import stream
from ...recipe.fields import Strict
from ...table import Table
from ...words import fixed, visible_name
from .base import Gate, Judgement, Measured, Subject, at_least
from .fidelity import PARTS, Cosine, between
from .quantised import NAMES


class Kept(Strict):
    """Cosine of the quantised converted encoder's features with the original's in float, lower end of the interval."""

    min_cosine: Annotated[Cosine, Field(examples=[0.98], description="the least cosine, of CLS and of patches")]


class QuantisedFeatures(Gate):
    """An encoder's features as if it was quantised, against the original's in float; a gate for each scheme named.

    `live.quantised.SCHEMES` says what the schemes are. Static scales are those of the calibration images.
    """

    name: ClassVar[str] = "quantised_features"
    reading: ClassVar[Literal["text", "images"] | None] = "images"

    w8a8_static: Kept | None = None
    w8a8_dynamic: Kept | None = None
    w8a8_per_token: Kept | None = None
    w4a4_static: Kept | None = None
    w4: Kept | None = None

    def gates(self) -> dict[str, Kept]:
        """Scheme -> its settings, of those that are named."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: gate for name, gate in found.items() if gate is not None}

    @property
    def asks(self) -> bool:
        return bool(self.gates())

    @property
    def calibrates(self) -> bool:
        return any(SCHEMES[name].calibrated for name in self.gates())

    @property
    def reads_linears(self) -> bool:
        return True

    def measure(self, subject: Subject, ready: Any) -> dict[str, Features]:
        live, calibrating = subject.live, subject.calibrating if self.calibrates else None
        count = len(self.gates()) * len(subject.chunks) + (0 if calibrating is None else len(calibrating))
        found: dict[str, Features] = {}
        with subject.bar("quantised", count) as advance:
            ranges = None if calibrating is None else activation_ranges(live, calibrating, advance)
            for name in self.gates():
                found[name] = features = Features(live)
                with quantised(live, SCHEMES[name], ranges):
                    stream(live, subject.chunks, [features], advance=advance, what=name)
        return found

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        return [
            at_least(f"{self.name}.{name}.{part}", one.low, gate.min_cosine)
            for name, gate in self.gates().items()
            for part, one in between(converted.further[self.name][name], original.features["bare"]).items()
        ]

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        """Scheme -> `original` and `converted`, quantised alike -> `cls` and `patches` (or `frames`): cosine with the
        original's features in float."""
        if original is None:
            return {}
        bare = original.features["bare"]
        return {
            self.name: {
                name: {
                    whose: {part: one.to_dict() for part, one in between(of.further[self.name][name], bare).items()}
                    for whose, of in (("original", original), ("converted", converted))
                }
                for name in self.gates()
            }
        }

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        rows = []
        for name, entry in (verdict.get(cls.name) or {}).items():
            for part, label in PARTS.items():
                if part in entry["converted"]:
                    before, after = (_shown(entry[whose][part]) for whose in ("original", "converted"))
                    rows.append((NAMES.get(name, visible_name(name)), label, before, after))
        if not rows:
            return None
        return Table(
            "Quantised", ("", "", "original", "converted"), rows, note="Simulated; static scales are from calibration.",
            text="Cosine with the features of the original as it is, of both models with numbers stored in few bits.",
        )  # fmt: skip

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        """Whose interval lies above the other's: stricter than a paired test, which a verdict has no figures for."""
        kinds: dict[str, list[str]] = {"nearer": [], "further away": [], "no clear difference": []}
        for name, entry in (verdict.get(cls.name) or {}).items():
            for part in entry["converted"]:
                before, after = entry["original"][part], entry["converted"][part]
                kind = "nearer" if after["low"] > before["high"] else "no clear difference"
                kind = "further away" if after["high"] < before["low"] else kind
                kinds[kind].append(f"{NAMES.get(name, visible_name(name))} ({PARTS.get(part, 'patches')})")
        parts = [f"{kind} with {'; '.join(names)}" for kind, names in kinds.items() if names]
        if not parts:
            return None
        return (
            "The converted encoder, quantised, to the original's features, against the original, quantised alike: "
            f"{' – '.join(parts)}."
        )

    @classmethod
    def label(cls, judgement: str) -> str:
        _, scheme, part, *_ = f"{judgement}..".split(".")
        of = PARTS.get(part, "patches")
        return f"quantised, {NAMES.get(scheme, visible_name(scheme))}, cosine of {of} with the original's"


def _shown(one: Mapping[str, float]) -> str:
    return f"{fixed(one['mean'], 4)} ({fixed(one['low'], 4)} to {fixed(one['high'], 4)})"
