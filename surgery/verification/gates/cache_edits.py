"""Editing a key/value cache: perplexity of the text after it, where tokens of the context were deleted or inserted.

The context is the first half of a chunk. A server that edits its cache keeps all other entries as they are, since
computing them again is what a cache saves:

* delete: the context was cached whole, then the entries of a span are dropped. Those after it have seen the span.
* insert: the context was cached with the places of a span left free, then the span is computed, seeing what stands in
  front of it, and put there (the parameters of Prompt Cache, Gim et al., arXiv 2311.04934). The entries after it have
  not seen the span.

The text after the context sees what is then in the cache. Positions are those of the whole text: a deletion leaves a
gap, an insertion fills one. Both are simulated by masks, in one pass per chunk, on the text's own tokens; so every edit
is scored on the same targets as the unedited text, those that are predicted from after the context.

A span lies first, where an unconverted model has its sink, or in the middle of the context. Where a model keeps its
first tokens, as in StreamingLLM, a first span begins after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field

from ...errors import SourceError
from ...live.edits import Change, hidden
from ...live.likelihood import scored
from ...live.model import Live
from ...live.paired import paired
from ...live.score import Score
from ...recipe.fields import Positive
from ...table import Table
from ...words import NONE, factor, fixed, times, visible_name
from .base import Gate, Inputs, Judgement, Measured, Subject, at_most
from .streaming import KEPT

EDITS = {
    "delete_first": "first tokens deleted",
    "insert_first": "first tokens inserted",
    "delete_middle": "middle tokens deleted",
    "insert_middle": "middle tokens inserted",
}
UNEDITED = "none"
Scores = dict[tuple[str, int], Score]  # edit, how many first tokens are kept -> score


def editing(live: Live, edit: str, tokens: int, context: int, keep: int = 0) -> Change:
    """`edit` (one of EDITS) of `tokens` tokens in the first `context`, sparing the first `keep`; slots as ever."""
    kind, place = edit.split("_")
    start = 0 if place == "first" else (context - tokens) // 2
    first, end = max(start, keep), start + tokens

    def hides(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        blind = query >= context if kind == "delete" else (query >= end) & (query < context)
        return blind & (key >= first) & (key < end)

    return hidden(live, hides, f"{edit} of {tokens} tokens")


def kept_edit(scores: Scores, edit: str) -> Score:
    """The score where the most tokens were kept: of edits in the middle, which spare the first anyhow, the only one."""
    return scores[max(key for key in scores if key[0] == edit)]


class CacheEdits(Gate):
    """Perplexity after a context of which `tokens` were deleted from, or inserted into, the cache: four such edits.

    Over that of the original, edited alike, which keeps its first four tokens; upper end of the paired 95% interval.
    """

    name: ClassVar[str] = "cache_edits"
    reading: ClassVar[Literal["text", "images"] | None] = "text"

    tokens: Annotated[int, Field(ge=8, examples=[64], description="how many are deleted or inserted")]
    max_ratio: Positive = Field(examples=[1.25], description="the largest ratio, of all four edits")

    def require(self, inputs: Inputs) -> None:
        half = inputs.chunking.length // 2
        if half < self.tokens + 2 * KEPT:
            raise SourceError(
                f"verify.cache_edits.tokens is {self.tokens}, and the first half of {inputs.chunking.length} tokens "
                f"has room for {half - 2 * KEPT}; give a longer --chunk-length, or fewer tokens."
            )

    def measure(self, subject: Subject, ready: Any) -> Scores:
        """Score the second halves of chunks. Edits in the middle are the same whatever is kept, if they begin after it.

        The converted model keeps none.
        """
        live, chunks, context = subject.live, subject.chunks, subject.chunks.shape[1] // 2
        keeps = (0, KEPT) if subject.original else (0,)
        edits = [(edit, keep) for edit in EDITS for keep in (keeps if edit.endswith("first") else (0,))]
        scores: Scores = {}
        how = f"after a cache of which {self.tokens} tokens are edited"
        with subject.bar(how, (1 + len(edits)) * len(chunks)) as advance:
            scores[UNEDITED, 0] = scored(live, chunks, first=context + 1, advance=advance, what="unedited")
            for edit, keep in edits:
                with editing(live, edit, self.tokens, context, keep):
                    what = f"{edit}, {keep} kept"
                    scores[edit, keep] = scored(live, chunks, first=context + 1, advance=advance, what=what)
        return scores

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        before, after, judgements = original.further[self.name], converted.further[self.name], []
        for edit in EDITS:
            against_kept = paired(after[edit, 0], kept_edit(before, edit))
            judgements.append(at_most(f"{self.name}.{edit}", factor(against_kept.high), self.max_ratio))
        return judgements

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        """Edit -> scores of original, original that keeps its first tokens, converted, and each one's price.

        That is the difference to the same model on the same targets, unedited ("none").
        """
        if original is None:
            return {}
        before, after = original.further[self.name], converted.further[self.name]
        whole = {"original": before[UNEDITED, 0], "converted": after[UNEDITED, 0]}
        found: dict[str, Any] = {UNEDITED: {name: score.to_dict() for name, score in whole.items()}}
        whole["original_kept"] = whole["original"]
        for edit in EDITS:
            scores = {
                "original": before[edit, 0],
                "original_kept": kept_edit(before, edit),
                "converted": after[edit, 0],
            }
            deltas = {name: paired(score, whole[name]) for name, score in scores.items()}
            deltas["converted_vs_kept"] = paired(scores["converted"], scores["original_kept"])
            found[edit] = {name: score.to_dict() for name, score in scores.items()}
            found[edit]["delta_nll"] = {name: delta.to_dict() for name, delta in deltas.items()}
        return {self.name: found}

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        if not (found := verdict.get(cls.name)):
            return None
        original, converted = (fixed(found[UNEDITED][name]["ppl"], 4) for name in ("original", "converted"))
        rows: list[tuple[str, ...]] = [("unedited: perplexity", original, NONE, converted, NONE)]
        for edit, entry in found.items():
            if edit != UNEDITED:
                deltas = entry["delta_nll"]
                own = [f"× {fixed(factor(deltas[n]['mean']), 3)}" for n in ("original", "original_kept", "converted")]
                rows.append((_name(edit), *own, times(deltas["converted_vs_kept"])))
        title = "Edited caches" if settings is None else f"A cache with {settings.tokens:,} tokens edited"
        return Table(
            title, ("", "original", "keeping", "converted", "over keeping"), rows,
            text="Tokens of the text are deleted from the key/value cache, or inserted, while the rest of it stays as "
            "it is; then perplexity of the text after it. × is over the same model's, unedited. Keeping is the "
            "original that keeps its first tokens, and over keeping the converted model's perplexity over its.",
        )  # fmt: skip

    @classmethod
    def label(cls, judgement: str) -> str:
        return f"{_name(judgement.partition('.')[2])}, times the original that keeps its own"


def _name(edit: str) -> str:
    return EDITS.get(edit, visible_name(edit))
