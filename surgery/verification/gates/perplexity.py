"""Perplexity: how well text is predicted, by the converted model and by the original in three variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ...live.paired import paired
from ...live.score import Score
from ...recipe.fields import Positive
from ...table import Table
from ...words import NONE, compared, factor, fixed, times
from .base import VARIANTS, Gate, Judgement, Measured, at_most


class Perplexity(Gate):
    """Perplexity over the bare original's, judged at the upper end of the paired 95% interval."""

    name: ClassVar[str] = "perplexity"
    reading: ClassVar[Literal["text", "images"] | None] = "text"
    always: ClassVar[bool] = True

    max_ratio: Annotated[Positive, Field(description="the largest ratio")] = 1.01

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        against_bare = paired(converted.scores["converted"], original.scores["bare"])
        return [at_most(self.name, factor(against_bare.high), self.max_ratio)]

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        """`perplexity` by variant, and `delta_nll` of the converted model to two of them.

        A variant that was read on a part of the text has beside it `bare_nll`, the bare original's on that part.
        """
        after = converted.scores["converted"]
        if original is None:
            return {"perplexity": {"converted": after.to_dict()}, "delta_nll": {}}
        scores = {"bare": None, "bos": None, "control": None, **original.scores, "converted": after}
        return {
            "perplexity": {name: score and _told(score, original.scores["bare"]) for name, score in scores.items()},
            "delta_nll": {
                f"vs_{name}": paired(after.on(score), score).to_dict()
                for name, score in ((name, original.scores[name]) for name in ("control", "bare"))
            },
        }  # fmt: skip

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        scores, deltas = verdict.get("perplexity") or {}, verdict.get("delta_nll") or {}
        if not scores.get("converted"):
            return None
        bare, rows = scores.get("bare"), []
        for name, label in VARIANTS.items():
            # Without a prefix, the control is the bare original.
            if not (entry := scores.get(name)) or (name == "control" and not verdict.get("prefix")):
                continue
            ratio = fixed(factor(entry["nll"] - entry.get("bare_nll", bare["nll"])), 3) if bare else NONE
            if name == "converted" and deltas.get("vs_bare"):
                ratio = times(deltas["vs_bare"])
            figures = fixed(entry["ppl"], 4), fixed(entry["nll"], 7), "1" if name == "bare" else ratio
            rows.append((label, f"{entry['tokens']:,}", *figures))
        return Table(
            "Perplexity", ("", "tokens", "perplexity", "nats per token", "times the bare original"), rows,
            note="Target tokens, float32; what was read on fewer is compared on those. In brackets, here and below: "
            "the 95% interval, paired by chunk of text.",
            text="How surprised a model is by text that it was not made with; lower is better. BOS is the token that "
            "texts begin with. After it, or after the prefix, the original has a place for its attention sinks too.",
        )  # fmt: skip

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        delta = (verdict.get("delta_nll") or {}).get("vs_bare")
        return delta and f"Perplexity of the converted model, against the bare original: {compared(delta)}."

    @classmethod
    def label(cls, judgement: str) -> str:
        return "perplexity, times the bare original's"


def _told(score: Score, bare: Score) -> dict[str, Any]:
    part = {} if score.tokens == bare.tokens else {"bare_nll": bare.on(score).nll}
    return {**score.to_dict(), **part}
