"""What a run fits, scales and trains on calibration text while the original is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..live.graft import Norms, Slots
from ..operations.attention_bias import grafted
from ..operations.changed import stored_name
from ..operations.head_norm import fit_norms
from ..operations.smoothing import smooth
from ..progress import Reporter
from .plan import Plan


def fit_head_norms(
    plan: Plan, model: PreTrainedModel, prefix: Sequence[int], slots: Slots, chunks: torch.Tensor, reporter: Reporter
) -> Norms:
    """Norms of the heads of the original with its slots, if any, in place; none where the recipe has no head_norm."""
    if plan.head_norm is None:
        return {}
    gate = plan.recipe.head_norm.gate
    reporter.step("fit the norms of the heads")
    with (
        reporter.bar("fit", len(chunks)) as advance,
        grafted(model, plan.anatomy, prefix, slots, plan.slots_visible),
    ):
        norms, residual = fit_norms(
            model, plan.anatomy, plan.head_norm, gate, chunks, lambda done: advance(done, "calibration")
        )
    reporter.note(f"the norms give back all but {residual:.1%} of the energy of what heads bring back")
    if gate == 0:
        reporter.note(
            "head_norm at gate 0: the norms are in place and fitted, and the model computes what it did before; train "
            "the gate, or raise it in the recipe, for norms that act"
        )
    return norms


def smooth_channels(
    plan: Plan, model: PreTrainedModel, prefix: Sequence[int], slots: Slots, chunks: torch.Tensor, reporter: Reporter
) -> dict[str, torch.Tensor]:
    """Smooth the model in place, as its slots make it; the changed parameters, none where a recipe does not smooth."""
    operation = plan.recipe.smoothing
    if operation is None:
        return {}
    reporter.step("smooth channels with large activations")
    with (
        reporter.bar("smoothing", len(chunks)) as advance,
        grafted(model, plan.anatomy, prefix, slots, plan.slots_visible),
    ):
        changed = smooth(
            model, plan.anatomy, chunks, operation.inputs, operation.strength, lambda done: advance(done, "calibration")
        )
    for name in changed:
        stored_name(plan.source.layout, plan.anatomy, name)  # what cannot be written is refused before the long work
    reporter.note(f"{len(changed)} tensors changed by powers of two, and no logit")
    return changed
