"""Gates: a value that was measured, the limit a recipe sets, and whether it holds. Not measured is not passed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from transformers import PreTrainedConfig

from ...live.likelihood import perplexity
from ...live.paired import paired
from ...recipe import Recipe
from .cache_edits import EDITS, kept_edit
from .measure import Measurement, Original
from .streaming import KEPT
from .tasks import drop


@dataclass(frozen=True)
class Gate:
    name: str
    passed: bool
    value: float | int | str
    limit: float | int | str

    def to_dict(self) -> dict:
        return asdict(self)


def at_most(name: str, value: float, limit: float) -> Gate:
    """Passes where value <= limit; never on NaN."""
    return Gate(name, bool(value <= limit), value, limit)


def is_exact(recipe: Recipe, config: PreTrainedConfig, length: int, n_slots: int) -> bool:
    """Whether the converted model, of `config`, is on texts of `length` tokens what the original is behind the prefix.

    Slots that are always visible differ from a prefix by design, where a window or chunk does not hold all of both.
    """
    slots = recipe.attention_bias
    if not recipe.exact or slots is None or slots.slots_visible != "always":
        return recipe.exact
    text = config.get_text_config()
    windows = (getattr(text, name, None) or 0 for name in ("sliding_window", "attention_chunk_size"))
    return not any(0 < window < length + n_slots for window in windows)


def quality_gates(recipe: Recipe, original: Original | None, converted: Measurement, exact: bool) -> list[Gate]:
    """The recipe's gates on what was measured. Those that compare with the original need it.

    Equivalence is asked where the function is to be what it was (`is_exact`); elsewhere, perplexity is what decides.
    """
    gates, limits = [], recipe.verify
    if original is not None:
        against_control = paired(converted.score, original.control.score)
        against_bare = paired(converted.score, original.bare.score)
        # The interval, not the point: its far end must hold.
        furthest = max(abs(against_control.low), abs(against_control.high))
        if exact:
            gates.append(at_most("equivalence", furthest, limits.equivalence.max_delta_nll))
        gates.append(at_most("perplexity", perplexity(against_bare.high), limits.perplexity.max_ratio))
        for name, gate in limits.quantised.gates().items():
            against_bare = paired(converted.quantised[name], original.bare.score)
            gates.append(at_most(f"quantised.{name}", perplexity(against_bare.high), gate.max_ratio))
            if name in limits.quantised.executed():
                against_bare = paired(converted.executed[name], original.bare.score)
                gates.append(at_most(f"quantised.{name}.executed", perplexity(against_bare.high), gate.max_ratio))
        if limits.streaming is not None:
            against_kept = paired(converted.streaming[0], original.bare.streaming[KEPT])
            gates.append(at_most("streaming", perplexity(against_kept.high), limits.streaming.max_ratio))
        if limits.cache_edits is not None:
            for edit in EDITS:
                against_kept = paired(converted.edits[edit, 0], kept_edit(original.bare.edits, edit))
                limit = limits.cache_edits.max_ratio
                gates.append(at_most(f"cache_edits.{edit}", perplexity(against_kept.high), limit))
        for (task, metric), score in converted.tasks.items():
            lost = drop(original.bare.tasks[task, metric], score)
            gates.append(at_most(f"tasks.{task}.{metric}", lost.high, limits.tasks.max_drop))
    # A stream that is not finite has no massive activations either.
    count = converted.massive["count"] if math.isfinite(converted.score.nll) else math.nan
    gates.append(at_most("massive_activations", count, limits.massive_activations.max))
    return gates
