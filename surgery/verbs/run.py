"""`surgery run`: carry out the operations, write the converted checkpoint, prove it, publish it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..checkpoint.disk import require_target
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.source import materialise
from ..checkpoint.stage import Stage
from ..errors import DamagedCheckpoint, OutputError, SourceError
from ..loading import load_original, load_tokenizer, require_device
from ..operations.attention_bias import Slots, fold
from ..operations.card import model_card
from ..operations.head_norm import Norms
from ..operations.prefix_search import PrefixSearch
from ..planning import Plan
from ..recipe import Recipe
from ..recipe.file import load_recipe
from ..reporting import Reporter
from ..survey.full import survey
from ..verification.converted import load_converted
from ..verification.equivalence import Equivalence, compare_random_ids
from ..verification.gates import Gate, quality_gates
from ..verification.integrity import Check, check_integrity
from ..verification.measure import Measurement, Original
from ..verification.quantised import loaded_linears
from ..verification.tasks import TaskSet
from ..verification.text import CHUNKS, FEW_CHUNKS, Chunking
from ..verification.tokens import check_tokenizer
from ..verification.verdict import Findings, build_verdict, plain_json
from .emit import emit
from .fitting import fit_head_norms
from .inputs import (
    SILENT,
    Texts,
    cut,
    cut_calibration,
    fit_chunks,
    gather_tasks,
    gather_texts,
    require_length,
    require_tools,
    source_work,
    vocabulary_size,
)
from .measuring import Measuring
from .plan import prepare


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
    """What came out of the original while it was loaded."""

    prefix: tuple[int, ...]
    slots: Slots
    norms: Norms
    random_ids: Equivalence
    search: dict | None
    original: Original | None
    survey: dict | None


@dataclass(frozen=True)
class Converted:
    """What the files as emitted were found to be; nothing, without text."""

    checks: list[Check]
    gates: list[Gate]
    measurement: Measurement | None
    survey: dict | None


def run(
    recipe: Recipe | Path | str,
    source: str,
    out: Path | str,
    *,
    text: Sequence[Path] = (),
    calibration: Sequence[Path] = (),
    tasks: Path | None = None,
    verify: bool = True,
    surveys: bool = False,
    keep_failed: Path | None = None,
    link: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    chunking: Chunking = CHUNKS,
    reporter: Reporter = SILENT,
) -> dict:
    """Convert `source` by `recipe` into the new directory `out`, and return the verdict.

    `out` exists afterwards only if every gate passed, or with `verify=False`, when the manifest says `unverified`
    (`passed` is None). What fails goes to `keep_failed`, where given. With `surveys`, the verdict also has those of
    original and converted (`surveys`, for `surgery.report.write_report`). Raises SurgeryError for what a person can
    mend.
    """
    require_device(device)
    if surveys and not verify:
        raise SourceError("a report surveys the converted model on text, which --no-verify leaves out; take one away.")
    texts = gather_texts(text, calibration)
    reporter.step(f"plan {source}")
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    searched = recipe.attention_bias is not None and recipe.attention_bias.prefix == "auto"
    reads_text = verify or searched or recipe.head_norm is not None
    prepared = prepare(
        recipe, source, Path(out), needs_tokenizer=reads_text, link=link, dtype=dtype, revision=revision
    )  # fmt: skip
    plan, tokenizer = prepared.plan, prepared.tokenizer
    if keep_failed is not None:
        _require_elsewhere(Path(keep_failed), Path(out), plan)
    if verify:
        require_tools(plan.recipe.verify, device)
    harness = gather_tasks(plan.recipe.verify, tasks) if verify else None
    evaluation, calibrating = _cut_texts(plan, tokenizer, texts, chunking, verify, reporter)
    with Stage(Path(out)) as stage:
        directory = _materialise(plan, stage, reporter)
        if tokenizer is not None:  # the one of a GGUF is by now in files, which the converted checkpoint's come from
            tokenizer = load_tokenizer(directory)
        job = Job(plan, stage, texts, evaluation, calibrating, device, surveys, reporter, harness)
        operated = _operate(job, directory, tokenizer)
        tokens = [tokenizer.decode([token]) for token in operated.prefix] if tokenizer is not None else None
        reporter.step("write the converted checkpoint")
        manifest = emit(plan, stage, directory, tokenizer, operated.prefix, operated.slots, operated.norms, link)
        converted = _measure_stage(job, tokenizer, operated)
        findings = _finish_stage(job, tokenizer, operated, converted, manifest, tokens)
        verdict = build_verdict(findings, tokenizer)
        if not verify:
            verdict["passed"] = None if verdict["passed"] else False
        status = "verified" if verdict["passed"] else "unverified"
        stage.replace_json(MANIFEST, {**manifest, "status": status, "verdict": plain_json(verdict)})
        if verdict["passed"] is not False:
            stage.publish()
        elif keep_failed is not None:
            stage.keep(Path(keep_failed))
    return {**verdict, "surveys": [operated.survey, converted.survey]} if surveys else verdict


def _require_elsewhere(keep_failed: Path, out: Path, plan: Plan) -> None:
    require_target(keep_failed, plan.source.root if plan.source.root.is_dir() else None)
    if keep_failed.resolve() == out.resolve():
        raise OutputError(
            f"{keep_failed} is OUT itself, which only ever holds what passed; give another --keep-failed."
        )


def _cut_texts(plan: Plan, tokenizer, texts: Texts, wanted: Chunking, verify: bool, reporter: Reporter):
    """Evaluation chunks (N, T) or None, calibration chunks or None. SourceError where text is missing or too short."""
    chunking = fit_chunks(wanted, plan.anatomy, plan.n_slots)
    if chunking != wanted:
        reporter.note(
            f"chunks of {chunking.length} tokens: the model has no more positions behind {plan.n_slots} slots"
        )
    evaluation = calibrating = None
    vocab_size = vocabulary_size(plan.source.layout, plan.source.config)
    if verify:
        if texts.evaluation is None:
            raise SourceError("verification needs text: give --text FILE, or --no-verify to write without proof.")
        evaluation = cut(tokenizer, texts.evaluation, chunking, vocab_size, "--text")
        require_length(plan.recipe.verify, chunking)
    without_calibration = texts.calibration is None or tokenizer is None
    if plan.prefix is None and without_calibration:
        raise SourceError(
            "prefix: auto is searched on text: give --calibration FILE (or --text) and a tokenizer, or list the prefix "
            "in the recipe."
        )
    if plan.head_norm is not None and without_calibration:
        raise SourceError(
            "head_norm is fitted on text: give --calibration FILE (or --text), and a model with a tokenizer."
        )
    reads = plan.prefix is None or plan.head_norm is not None
    if reads or (verify and plan.recipe.verify.quantised.gates()):
        calibrating = cut_calibration(tokenizer, texts.calibration, chunking, vocab_size)
    return evaluation, calibrating


def _materialise(plan: Plan, stage: Stage, reporter: Reporter) -> Path:
    if plan.source.kind != "gguf":
        return plan.source.root
    reporter.step(f"dequantise {plan.source.root.name}")
    return materialise(plan.source, source_work(stage))


def _operate(job: Job, directory: Path, tokenizer) -> Operated:
    """Everything that needs the original's weights: search, fold, fit, comparison on random ids, baselines, survey."""
    plan, reporter = job.plan, job.reporter
    reporter.step("load the original")
    model = load_original(directory, device=job.device)
    _require_finite(model)
    if plan.quantises:
        loaded_linears(model, plan.anatomy)  # weights that are offloaded are refused before the work begins
    prefix, search, visible = plan.prefix, None, plan.slots_visible
    if prefix is None:
        reporter.step(f"search for a prefix of up to {plan.n_slots} tokens")
        with reporter.bar("search", None) as advance:
            searching = PrefixSearch(
                model, plan.anatomy, tokenizer, job.calibrating, visible, lambda what: advance(1, what)
            )
            best = searching.run(plan.n_slots)
        prefix, search = best.prefix, searching.to_dict()
        reporter.note(
            f"prefix {searching.shown(prefix)} leaves {best.massive} massive activations on the calibration text"
        )
    slots: Slots = {}
    if prefix:
        reporter.step("fold the prefix")
        slots = fold(model, plan.anatomy, prefix)
    norms = fit_head_norms(plan, model, prefix, slots, job.calibrating, reporter)
    reporter.step("compare with the original on random token ids")
    random_ids = compare_random_ids(model, plan.anatomy, prefix, slots, visible, plan.head_norm, norms)
    original = None
    if job.evaluation is not None:
        original = job.measuring.original(model, prefix, tokenizer)
    found = job.survey(model, tokenizer, "the original", plan.source.spec)
    slots = {site: (key.float().cpu(), value.float().cpu()) for site, (key, value) in slots.items()}
    del model
    gc.collect()
    return Operated(tuple(prefix), slots, norms, random_ids, search, original, found)


def _require_finite(model: PreTrainedModel) -> None:
    for name, tensor in model.named_parameters():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise DamagedCheckpoint(
                f"{name} of the source holds NaN or Inf, so nothing computed from it would mean anything; restore it."
            )


def _measure_stage(job: Job, tokenizer, operated: Operated) -> Converted:
    """The files as emitted, through their own tokenizer and a fresh load."""
    if job.evaluation is None:
        return Converted([], [], None, None)
    plan, stage = job.plan, job.stage
    checks = [check_tokenizer(stage.path, tokenizer, operated.prefix, job.texts.evaluation)]
    model = load_converted(stage.path, device=job.device)
    measurement = job.measuring.converted(model, load_tokenizer(stage.path))
    found = job.survey(model, tokenizer, "the converted model", str(stage.out))
    del model
    gc.collect()
    return Converted(checks, quality_gates(plan.recipe, operated.original, measurement), measurement, found)


def _finish_stage(
    job: Job, tokenizer, operated: Operated, converted: Converted, manifest: dict, tokens: list[str] | None
) -> Findings:
    """Write card and manifest, then check the integrity of all of it."""
    plan, stage = job.plan, job.stage
    findings = Findings(
        [],
        converted.gates,
        operated.original,
        converted.measurement,
        operated.random_ids,
        operated.search,
        {"ids": list(operated.prefix), "tokens": tokens} if operated.prefix else None,
    )
    folds_bos = tokenizer is not None and tokenizer.bos_token_id in operated.prefix
    measured = build_verdict(findings, tokenizer) if converted.measurement is not None else None
    entries = plan.entries(operated.prefix)
    stage.add_text(
        "README.md", model_card(plan.source, plan.derived, plan.recipe, entries, tokens, folds_bos, measured)
    )  # fmt: skip
    manifest["files"] = stage.hashes()
    stage.add_json(MANIFEST, manifest)
    job.reporter.step("check the files against the source")
    # A GGUF's tensors were moved here from their dequantised copy: there is nothing left to compare them with.
    source = plan.source if plan.source.kind != "gguf" else None
    checks = [*check_integrity(stage.path, manifest, source, source and source.root), *converted.checks]
    return replace(findings, checks=checks)
