"""Streaming: perplexity where the cache holds a window of the last tokens, and what falls out of it is gone.

Models with attention sinks break when their first token is evicted, and do not when it is kept (StreamingLLM, Xiao et
al., arXiv 2309.17453: the first four). A converted model keeps its sinks in slots, which no cache evicts. Simulated by
masks, in one pass per chunk; positions are those of the text, not renumbered within the cache.
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
from ...words import compared, factor, fixed, times
from .base import Gate, Inputs, Judgement, Measured, Subject, at_most

KEPT = 4  # first tokens that StreamingLLM keeps


def evicting(live: Live, window: int, keep: int = 0) -> Change:
    """Each query sees the last `window` tokens, itself among them, and the first `keep`; slots as ever."""

    def hides(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query - key >= window) & (key >= keep)

    return hidden(live, hides, f"a window of {window} tokens")


class Streaming(Gate):
    """Perplexity with a cache of the last `window` tokens, over that of the original which also keeps its first four.

    Judged at the upper end of the paired 95% interval.
    """

    name: ClassVar[str] = "streaming"
    reading: ClassVar[Literal["text", "images"] | None] = "text"

    window: Annotated[int, Field(ge=2, examples=[256], description="tokens in the cache, the newest among them")]
    max_ratio: Positive = Field(examples=[1.25], description="the largest ratio")

    def require(self, inputs: Inputs) -> None:
        if inputs.chunking.length <= self.window:
            raise SourceError(
                f"verify.streaming.window is {self.window}, and chunks of {inputs.chunking.length} tokens never leave "
                "it; give a longer --chunk-length, or a smaller window."
            )

    def measure(self, subject: Subject, ready: Any) -> dict[int, Score]:
        """Score by how many first tokens are kept; the converted model keeps none."""
        keeps, chunks, scores = (0, KEPT) if subject.original else (0,), subject.chunks, {}
        with subject.bar(f"through a window of {self.window} tokens", len(keeps) * len(chunks)) as advance:
            for keep in keeps:
                with evicting(subject.live, self.window, keep):
                    what = f"window of {self.window}, {keep} kept"
                    scores[keep] = scored(subject.live, chunks, advance=advance, what=what)
        return scores

    def judge(self, original: Measured | None, converted: Measured) -> list[Judgement]:
        if original is None:
            return []
        against_kept = paired(converted.further[self.name][0], original.further[self.name][KEPT])
        return [at_most(self.name, factor(against_kept.high), self.max_ratio)]

    def found(self, original: Measured | None, converted: Measured, tokenizer: Any) -> dict[str, Any]:
        """Scores: of the original keeping nothing and keeping its first tokens, of the converted keeping nothing."""
        if original is None:
            return {}
        before, after = original.further[self.name], converted.further[self.name][0]
        return {
            self.name: {
                "original": before[0].to_dict(),
                "original_kept": {"tokens_kept": KEPT, **before[KEPT].to_dict()},
                "converted": after.to_dict(),
                "delta_nll": {
                    "original_vs_kept": paired(before[0], before[KEPT]).to_dict(),
                    "converted_vs_kept": paired(after, before[KEPT]).to_dict(),
                },
            }
        }

    @classmethod
    def table(cls, verdict: Mapping[str, Any], settings: Self | None = None) -> Table | None:
        if not (found := verdict.get(cls.name)):
            return None
        kept, deltas = found["original_kept"], found["delta_nll"]
        rows = [(f"original, keeping its first {kept['tokens_kept']}", fixed(kept["ppl"], 4), "1")]
        for name in ("original", "converted"):
            rows.append((f"{name}, keeping none", fixed(found[name]["ppl"], 4), times(deltas[f"{name}_vs_kept"])))
        of = f" of the last {settings.window:,} tokens" if settings is not None else ""
        return Table(
            f"Streaming through a window{of}", ("", "perplexity", f"times that of keeping {kept['tokens_kept']}"), rows,
            text="The model sees a window of the last tokens only, as in a text without end. An original that has its "
            "attention sinks on the first tokens suffers when they drop out, unless they are kept; slots never drop "
            "out.",
        )  # fmt: skip

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        if not (found := verdict.get(cls.name)):
            return None
        said = {name: compared(found["delta_nll"][f"{name}_vs_kept"]) for name in ("original", "converted")}
        kept = found["original_kept"]["tokens_kept"]
        return (
            f"Streaming with nothing kept, against the original that keeps its first {kept} tokens: "
            f"the original is {said['original']}, the converted model {said['converted']}."
        )

    @classmethod
    def label(cls, judgement: str) -> str:
        return "streaming, times the original that keeps its first"
