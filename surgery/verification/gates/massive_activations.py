"""Massive activations: how many the evaluation text still gives, by the criterion of Sun et al."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from ...live.stream import Observer
from ...survey.massive import MassiveActivations as Counted
from ...table import Table
from ...words import listing, number, quoted, ranges
from .base import VARIANTS, Gate, Judgement, Measured, Variant, at_most

SHOWN = 4  # dims and tokens, those with the most


class MassiveActivations(Gate):
    """How many massive activations may remain on the evaluation text."""

    name: ClassVar[str] = "massive_activations"
    always: ClassVar[bool] = True

    max: Annotated[int, Field(ge=0, description="how many may remain")] = 0

    def watch(self, variant: Variant) -> Observer | None:
        return Counted() if variant in ("bare", "converted") else None

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        # A stream that is not finite has no massive activations either.
        count = self._seen(converted, "converted").count if converted.finite("converted") else math.nan
        return [at_most(self.name, count, self.max)]

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        """`massive_activations` of the bare original (None without it) and of the converted model."""

        def summary(measured: Measured, variant: Variant) -> dict[str, Any]:
            found = self._seen(measured, variant).summary()
            if tokenizer is None and measured.port.of_text:
                return found
            return {**found, "tokens": measured.port.names(tokenizer, found["token_ids"])}

        before = None if original is None else summary(original, "bare")
        return {self.name: {"before": before, "after": summary(converted, "converted")}}

    def _seen(self, measured: Measured, variant: Variant) -> Counted:
        seen: Counted = measured.watched[self.name][variant]
        return seen

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        rows = []
        for key, label in (("before", VARIANTS["bare"]), ("after", VARIANTS["converted"])):
            if entry := (verdict.get(cls.name) or {}).get(key):
                worst = number(entry["worst_ratio"]) if entry["count"] else number(None)
                dims = listing(entry["dims"], SHOWN) or number(None)
                shown = listing if cls._of_images(verdict) else quoted  # places have names, and are no text
                tokens = shown(entry.get("tokens", []), SHOWN) or number(None)
                rows.append((label, number(entry["count"]), worst, ranges(entry["layers"]), dims, tokens))
        if not rows:
            return None
        return Table(
            "Massive activations", ("", "count", "worst / median", "layers", "dimensions", "tokens"), rows,
            text="Entries of the residual stream with |x| ≥ 100 and |x| ≥ 1,000 times the median of their layer (Sun "
            "et al., arXiv 2402.17762).",
        )  # fmt: skip

    @classmethod
    def _of_images(cls, verdict: Mapping[str, Any]) -> bool:
        return "texts" not in verdict.get("fidelity", {"texts": True})

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        found = verdict.get(cls.name) or {}
        if not found.get("after"):
            return None
        after = f"{found['after']['count']:,} after"
        return f"Massive activations: {found['before']['count']:,} before, {after}." if found.get("before") else None

    @classmethod
    def label(cls, judgement: str) -> str:
        return "massive activations that are left"
