"""What a run fits on calibration text while the original is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..operations.attention_bias import Slots, grafted
from ..operations.head_norm import Norms, fit_norms
from ..planning import Plan
from ..reporting import Reporter


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
