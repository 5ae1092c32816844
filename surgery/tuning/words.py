"""What tuning came to, in words: from its part of the verdict, for terminal, model card and report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..table import Curves, Panel, Table
from ..words import factor, finite, fixed, listing, number, visible_name

if TYPE_CHECKING:
    from .settings import Settings


@dataclass(frozen=True)
class _Measure:
    """How held-out text, or images, are judged: `key` of an entry, and what that is called, on which things; `of`,
    for readers who are new to it, says what it decides."""

    key: str
    column: str
    panel: str
    called: str
    things: str
    of: str

    def times(self, entry: Mapping[str, Any], start: Mapping[str, Any]) -> float:
        """What it has become, as a factor on the start; not a number where that is nothing."""
        if self.key == "ppl":
            return factor(entry["nll"] - start["nll"])
        return entry[self.key] / start[self.key] if start[self.key] else math.nan

    def shown(self, entry: Mapping[str, Any]) -> str:
        return fixed(entry[self.key], 4) if self.key == "ppl" else number(entry[self.key], 3)


_TEXT = _Measure(
    "ppl", "held-out perplexity", "Perplexity on held-out text", "perplexity on held-out text", "text",
    "perplexity on text that is never trained on decides which state is kept.",
)  # fmt: skip
_IMAGES = _Measure(
    "distance", "held-out distance", "Distance on held-out inputs",
    "the distance of features from the original's on held-out inputs", "inputs",
    "what decides which state is kept is the distance of features from the original's, on inputs that are never "
    "trained on: 1 less their cosine, of what stands for the whole (CLS) and of the rest half each.",
)  # fmt: skip


def _measure(found: Mapping[str, Any]) -> _Measure:
    return _IMAGES if "distance" in found["held_out"][0] else _TEXT


def kept_state(tuning: Mapping[str, Any]) -> Mapping[str, Any]:
    """The judgement, on what was held out, of the state that was kept."""
    return next(entry for entry in tuning["held_out"] if entry["step"] == tuning["best_step"])


def tuning_table(found: Mapping[str, Any] | None) -> Table | None:
    """Start, kept and last state on what was held out; `found` is `tuning` of a verdict."""
    if not found:
        return None
    start, best, last = found["held_out"][0], kept_state(found), found["held_out"][-1]
    by = _measure(found)
    rows = [
        (what, f"{entry['step']:,}", by.shown(entry), fixed(by.times(entry, start), 3))
        for what, entry in (("start", start), ("kept", best), ("last", last))
    ]
    losses = [(entry["step"], entry["loss"]) for entry in found["losses"] if finite(entry["loss"])]
    judged = [(entry["step"], entry[by.key]) for entry in found["held_out"] if finite(entry[by.key])]
    panels = [Panel("Loss", losses), Panel(by.panel, judged, dots=True)]
    return Table(
        "Tuning", ("", "step", by.column, "times the start"), rows,
        note=f"Stopped: {visible_name(found['stopped']).rstrip('.')}." if found.get("stopped") else "",
        text=f"What was added was trained. Loss is what training lowers, at each step on other {by.things}; {by.of} It "
        "is that of the quantised model where the recipe tunes for one.",
        figure=Curves(panels, best["step"], f"kept: step {best['step']:,}"),
    )  # fmt: skip


def tuning_sentence(found: Mapping[str, Any] | None) -> str | None:
    """The same in one sentence."""
    if not found:
        return None
    best, start, by = kept_state(found), found["held_out"][0], _measure(found)
    if best["step"] == 0:
        return f"Tuning: no step was better on held-out {by.things} than the start, so what was written is untuned."
    return (
        f"Tuning: kept is the state after step {best['step']:,}, where {by.called} had gone from {by.shown(start)} to "
        f"{by.shown(best)}."
    )


def tuned(settings: Settings, trained: Sequence[str], merged: int, found: Mapping[str, Any]) -> str:
    """For a model card: what was trained for how long, and what it did to perplexity on held-out text, or to features.

    `trained`: what was trained in full; `merged`: how many tensors LoRA was merged into; `found`: `tuning` of the
    verdict.
    """
    parts = list(trained)
    if settings.lora is not None:
        parts.append(f"LoRA of rank {settings.lora.rank} on {merged:,} linear layers")
    said = f"Tuning has trained {listing(parts)}"
    steps = max((entry["step"] for entry in found["losses"]), default=0)
    start, best, by = found["held_out"][0], kept_state(found), _measure(found)
    if best["step"] == 0:
        return f"{said} for {steps:,} steps. None was better on held-out {by.things} than the start, which was kept."
    merge = f", and LoRA is merged into {merged:,} tensors" if settings.lora is not None else ""
    apart = f", {listing(settings.per_token)} per token" if settings.per_token else ""
    form = f", quantised ({settings.quantised}{apart})," if settings.quantised is not None else ""
    return (
        f"{said} for {steps:,} steps. Kept is the state after step {best['step']:,}{merge}; {by.called}{form} went "
        f"from {by.shown(start)} to {by.shown(best)}."
    )
