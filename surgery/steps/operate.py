"""Everything in a run that needs the original's weights: it is loaded once, and let go when this is done."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..checkpoint.stage import Stage
from ..errors import DamagedCheckpoint
from ..live.graft import Norms, Slots
from ..live.loading import load_original
from ..live.quantised import loaded_linears
from ..live.text import FEW_CHUNKS
from ..operations.attention_bias import fold
from ..operations.prefix_search import PrefixSearch
from ..progress import Reporter
from ..survey.full import survey
from ..tuning.tune import require_in_memory
from ..verification.equivalence import Equivalence, compare_random_ids
from ..verification.gates.measure import Original
from ..verification.gates.tasks import TaskSet
from .fitting import fit_head_norms, smooth_channels
from .inputs import Texts
from .measuring import Measuring
from .plan import Plan
from .tune import Training, tune_added


@dataclass(frozen=True)
class Job:
    """What every step of a run needs: evaluation chunks (N, T) or None, calibration chunks or None."""

    plan: Plan
    stage: Stage
    texts: Texts
    evaluation: torch.Tensor | None
    calibrating: torch.Tensor | None
    device: str
    surveyed: bool
    reporter: Reporter
    tasks: TaskSet | None
    training: Training | None

    @property
    def measuring(self) -> Measuring:
        gates = self.plan.recipe.verify
        return Measuring(self.plan.anatomy, self.evaluation, self.calibrating, gates, self.reporter, self.tasks)

    def survey(self, model: PreTrainedModel, tokenizer, what: str, source: str) -> dict | None:
        """Of some of the evaluation text, if a report was asked for."""
        if not self.surveyed:
            return None
        some = self.evaluation[: FEW_CHUNKS.count]
        self.reporter.step(f"survey {what}")
        with self.reporter.bar("survey", len(some)) as advance:
            found = survey(model, self.plan.anatomy, tokenizer, some, progress=lambda done: advance(done, "survey"))
        return {"source": source, **found}


@dataclass(frozen=True)
class Operated:
    """What came out of the original while it was loaded; `smoothed`: how many tensors smoothing changed."""

    prefix: tuple[int, ...]
    slots: Slots
    norms: Norms
    weights: dict[str, torch.Tensor]
    smoothed: int
    tuning: dict | None
    random_ids: Equivalence
    search: dict | None
    original: Original | None
    survey: dict | None


def operate(job: Job, directory: Path, tokenizer) -> Operated:
    """Search, fold, fit, compare on random ids, measure and survey the original; then smooth and tune."""
    plan, reporter = job.plan, job.reporter
    reporter.step("load the original")
    model = load_original(directory, device=job.device)
    _require_finite(model)
    if plan.reads_linears:
        loaded_linears(model, plan.anatomy)  # weights that are offloaded are refused before the work begins
    for what, asked in (("tune", job.training), ("smoothing", plan.recipe.smoothing)):
        if asked is not None:
            require_in_memory(model, what)
    prefix, search = _prefix(job, model, tokenizer)
    slots: Slots = {}
    if prefix:
        reporter.step("fold the prefix")
        slots = fold(model, plan.anatomy, prefix)
    norms = fit_head_norms(plan, model, prefix, slots, job.calibrating, reporter)
    reporter.step("compare with the original on random token ids")
    random_ids = compare_random_ids(model, plan.anatomy, prefix, slots, plan.slots_visible, plan.head_norm, norms)
    original = None
    if job.evaluation is not None:
        original = job.measuring.original(model, prefix, tokenizer)
    found = job.survey(model, tokenizer, "the original", plan.source.spec)
    weights, tuning = smooth_channels(plan, model, prefix, slots, job.calibrating, reporter), None
    smoothed = len(weights)
    if job.training is not None:
        tuned = tune_added(plan, job.training, model, directory, prefix, slots, norms, reporter)
        slots, norms, tuning = tuned.slots, tuned.norms, tuned.record.to_dict()
        weights |= tuned.weights
    slots = {site: (key.float().cpu(), value.float().cpu()) for site, (key, value) in slots.items()}
    weights = {name: weight.cpu() for name, weight in weights.items()}
    del model
    gc.collect()
    return Operated(tuple(prefix), slots, norms, weights, smoothed, tuning, random_ids, search, original, found)


def _prefix(job: Job, model: PreTrainedModel, tokenizer) -> tuple[tuple[int, ...], dict | None]:
    """The prefix to fold, and what was tried to find it, if the recipe leaves that to a search."""
    plan, reporter = job.plan, job.reporter
    if plan.prefix is not None:
        return plan.prefix, None
    reporter.step(f"search for a prefix of up to {plan.n_slots} tokens")
    with reporter.bar("search", None) as advance:
        searching = PrefixSearch(
            model, plan.anatomy, tokenizer, job.calibrating, plan.slots_visible, lambda what: advance(1, what)
        )
        best = searching.run(plan.n_slots)
    reporter.note(
        f"prefix {searching.shown(best.prefix)} leaves {best.massive} massive activations on the calibration text"
    )
    return best.prefix, searching.to_dict()


def _require_finite(model: PreTrainedModel) -> None:
    for name, tensor in model.named_parameters():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise DamagedCheckpoint(
                f"{name} of the source holds NaN or Inf, so nothing computed from it would mean anything; restore it."
            )
