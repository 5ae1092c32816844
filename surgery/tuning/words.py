"""What tuning came to, in words: from its part of the verdict, for terminal, model card and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..table import Curves, Panel, Table
from ..words import factor, finite, fixed, listing, visible_name

if TYPE_CHECKING:
    from .settings import Settings


def kept_state(tuning: Mapping[str, Any]) -> Mapping[str, Any]:
    """The judgement on held-out text of the state that was kept."""
    return next(entry for entry in tuning["held_out"] if entry["step"] == tuning["best_step"])


def tuning_table(found: Mapping[str, Any] | None) -> Table | None:
    """Start, kept and last state on held-out text; `found` is `tuning` of a verdict."""
    if not found:
        return None
    start, best, last = found["held_out"][0], kept_state(found), found["held_out"][-1]
    rows = [
        (what, f"{entry['step']:,}", fixed(entry["ppl"], 4), fixed(factor(entry["nll"] - start["nll"]), 3))
        for what, entry in (("start", start), ("kept", best), ("last", last))
    ]
    losses = [(entry["step"], entry["loss"]) for entry in found["losses"] if finite(entry["loss"])]
    judged = [(entry["step"], entry["ppl"]) for entry in found["held_out"] if finite(entry["ppl"])]
    panels = [Panel("Loss", losses), Panel("Perplexity on held-out text", judged, dots=True)]
    return Table(
        "Tuning", ("", "step", "held-out perplexity", "times the start"), rows,
        note=f"Stopped: {visible_name(found['stopped']).rstrip('.')}." if found.get("stopped") else "",
        text="What was added was trained. Loss is what training lowers, at each step on other text; perplexity on text "
        "that is never trained on decides which state is kept. It is that of the quantised model where the recipe "
        "tunes for one.",
        figure=Curves(panels, best["step"], f"kept: step {best['step']:,}"),
    )  # fmt: skip


def tuning_sentence(found: Mapping[str, Any] | None) -> str | None:
    """The same in one sentence."""
    if not found:
        return None
    best, start = kept_state(found), found["held_out"][0]
    if best["step"] == 0:
        return "Tuning: no step was better on held-out text than the start, so what was written is untuned."
    return (
        f"Tuning: kept is the state after step {best['step']:,}, where perplexity on held-out text had gone from "
        f"{fixed(start['ppl'], 4)} to {fixed(best['ppl'], 4)}."
    )


def tuned(settings: Settings, trained: Sequence[str], merged: int, found: Mapping[str, Any]) -> str:
    """For a model card: what was trained for how long, and what it did to perplexity on held-out text.

    `trained`: what was trained in full; `merged`: how many tensors LoRA was merged into; `found`: `tuning` of the
    verdict.
    """
    parts = list(trained)
    if settings.lora is not None:
        parts.append(f"LoRA of rank {settings.lora.rank} on {merged:,} linear layers")
    said = f"Tuning has trained {listing(parts)}"
    steps = max((entry["step"] for entry in found["losses"]), default=0)
    start, best = found["held_out"][0], kept_state(found)
    if best["step"] == 0:
        return f"{said} for {steps:,} steps. None was better on held-out text than the start, which was kept."
    merge = f", and LoRA is merged into {merged:,} tensors" if settings.lora is not None else ""
    apart = f", {listing(settings.per_token)} per token" if settings.per_token else ""
    form = f", quantised ({settings.quantised}{apart})," if settings.quantised is not None else ""
    return (
        f"{said} for {steps:,} steps. Kept is the state after step {best['step']:,}{merge}; perplexity on held-out text"
        f"{form} went from {fixed(start['ppl'], 4)} to {fixed(best['ppl'], 4)}."
    )
