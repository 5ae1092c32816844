"""Gates: a value that was measured, the limit a recipe sets, and whether it holds. Not measured is not passed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..recipe import Recipe
from ..survey.likelihood import perplexity
from .cache_edits import EDITS, kept_edit
from .measure import Measurement, Original
from .perplexity import paired
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


def quality_gates(recipe: Recipe, original: Original | None, converted: Measurement) -> list[Gate]:
    """The recipe's gates on what was measured. Those that compare with the original need it.

    Equivalence is asked of recipes that leave the function what it is; of others, perplexity is what decides.
    """
    gates, limits = [], recipe.verify
    if original is not None:
        against_control = paired(converted.score, original.control.score)
        against_bare = paired(converted.score, original.bare.score)
        # The interval, not the point: its far end must hold.
        furthest = max(abs(against_control.low), abs(against_control.high))
        if recipe.exact:
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
    gates.append(at_most("massive_activations", converted.massive["count"], limits.massive_activations.max))
    return gates
