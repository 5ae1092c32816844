"""`surgery run`: carry out the operations, write the converted checkpoint, prove it, publish it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.disk import require_target
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.source import materialise
from ..checkpoint.stage import Stage
from ..converted.card import Reworked, model_card
from ..converted.reading import load_converted
from ..errors import OutputError, SourceError
from ..live.loading import load_tokenizer, require_device
from ..live.text import CHUNKS, Chunking
from ..progress import Reporter
from ..recipe import Recipe
from ..recipe.file import load_recipe
from ..steps.emit import emit
from ..steps.inputs import (
    SILENT,
    Texts,
    calibrates,
    cut,
    cut_calibration,
    fit_chunks,
    gather_tasks,
    gather_texts,
    require_length,
    require_tools,
    room_behind,
    source_work,
    vocabulary_size,
)
from ..steps.operate import Job, Operated, operate
from ..steps.plan import Plan
from ..steps.tune import assist, prepare_training
from ..verification.gates.judge import Gate, is_exact, quality_gates
from ..verification.gates.measure import Measurement
from ..verification.integrity import Check, check_integrity
from ..verification.tokens import check_tokenizer
from ..verification.verdict import Findings, build_verdict, plain_json
from .plan import prepare


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
    tuning: Path | None = None,
    adapter: Path | None = None,
    link: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    chunking: Chunking = CHUNKS,
    reporter: Reporter = SILENT,
) -> dict | None:
    """Convert `source` by `recipe` into the new directory `out`, and return the verdict.

    `out` exists afterwards only if every gate passed, or with `verify=False`, when the manifest says `unverified`
    (`passed` is None). What fails goes to `keep_failed`, where given. With `surveys`, the verdict also has those of
    original and converted (`surveys`, for `surgery.report.write_report`). `tuning`: a directory that keeps the state of
    the recipe's `tune`, and from which a run that was cut off goes on; `adapter`: a new directory for what was tuned as
    a PEFT adapter. Of several processes (`accelerate launch`), all but the main one help to tune and return None.
    Raises SurgeryError for what a person can mend.
    """
    require_device(device)
    if not verify:
        _require_unmeasured(surveys, tasks)
    texts = gather_texts(text, calibration, reporter)
    reporter.step(f"plan {source}")
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    prepared = prepare(
        recipe, source, Path(out), needs_tokenizer=verify or _reads_text(recipe), link=link, dtype=dtype,
        revision=revision,
    )  # fmt: skip
    plan, tokenizer = prepared.plan, prepared.tokenizer
    keep_failed = None if keep_failed is None else Path(keep_failed)
    if keep_failed is not None:
        _require_elsewhere(keep_failed, Path(out), plan)
    if verify:
        require_tools(plan.recipe.verify, device)
    harness = gather_tasks(plan.recipe.verify, tasks, room_behind(plan.anatomy, plan.n_slots)) if verify else None
    chunking = _fitted(plan, chunking, reporter)
    evaluation, calibrating = _cut_texts(plan, tokenizer, texts, chunking, verify)
    outputs = [Path(path) for path in (out, keep_failed) if path is not None]
    training = prepare_training(
        plan, tokenizer, texts, chunking, calibrating, device, tuning, adapter, outputs
    )  # fmt: skip
    if training is not None and not training.accelerator.is_main_process:
        return assist(plan, training)
    with Stage(Path(out)) as stage, _aside(adapter) as aside:
        if aside is not None:
            training = replace(training, adapter=aside.path)
        directory = _materialise(plan, stage, reporter)
        if tokenizer is not None:  # the one of a GGUF is by now in files, which the converted checkpoint's come from
            tokenizer = load_tokenizer(directory)
        job = Job(plan, stage, texts, evaluation, calibrating, device, surveys, reporter, harness, training)
        operated = operate(job, directory, tokenizer)
        tokens = [tokenizer.decode([token]) for token in operated.prefix] if tokenizer is not None else None
        reporter.step("write the converted checkpoint")
        manifest = emit(plan, stage, directory, tokenizer, operated, link)
        operated = replace(operated, weights={})  # as large as the model, which is loaded anew
        converted = _measure_stage(job, tokenizer, operated)
        findings = _finish_stage(job, tokenizer, operated, converted, manifest, tokens)
        verdict = _conclude(stage, aside, build_verdict(findings, tokenizer), manifest, verify, keep_failed)
    return {**verdict, "surveys": [operated.survey, converted.survey]} if surveys else verdict


def _require_unmeasured(surveys: bool, tasks: Path | None) -> None:
    """SourceError for what is asked of a model that is not measured."""
    if surveys:
        raise SourceError("a report surveys the converted model on text, which --no-verify leaves out; take one away.")
    if tasks is not None:
        raise SourceError(f"--tasks {tasks} is for gates, which --no-verify leaves out; take one away.")


def _reads_text(recipe: Recipe) -> bool:
    """Whether the operations of `recipe` read text, verified or not."""
    return recipe.searches or recipe.fits is not None or recipe.tune is not None


def _require_elsewhere(keep_failed: Path, out: Path, plan: Plan) -> None:
    require_target(keep_failed, plan.source.root if plan.source.root.is_dir() else None)
    if keep_failed.resolve() == out.resolve():
        raise OutputError(
            f"{keep_failed} is OUT itself, which only ever holds what passed; give another --keep-failed."
        )


def _fitted(plan: Plan, wanted: Chunking, reporter: Reporter) -> Chunking:
    chunking = fit_chunks(wanted, plan.anatomy, max(plan.n_slots, 1))
    if chunking != wanted:
        reporter.note(f"chunks of {chunking.length} tokens: the model has no more positions behind a prefix or BOS")
    return chunking


def _cut_texts(plan: Plan, tokenizer, texts: Texts, chunking: Chunking, verify: bool):
    """Evaluation chunks (N, T) or None, calibration chunks or None. SourceError where text is missing or too short."""
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
    if (fits := plan.recipe.fits) is not None and without_calibration:
        raise SourceError(f"{fits} on text: give --calibration FILE (or --text), and a model with a tokenizer.")
    if plan.prefix is None or fits is not None or (verify and calibrates(plan.recipe.verify)):
        calibrating = cut_calibration(tokenizer, texts.calibration, chunking, vocab_size)
    return evaluation, calibrating


def _materialise(plan: Plan, stage: Stage, reporter: Reporter) -> Path:
    if plan.source.kind != "gguf":
        return plan.source.root
    reporter.step(f"dequantise {plan.source.root.name}")
    return materialise(plan.source, source_work(stage))


def _measure_stage(job: Job, tokenizer, operated: Operated) -> Converted:
    """The files as emitted, through their own tokenizer and a fresh load."""
    if job.evaluation is None:
        return Converted([], [], None, None)
    plan, stage = job.plan, job.stage
    checks = [check_tokenizer(stage.path, tokenizer, operated.prefix, job.texts.evaluation)]
    model = load_converted(stage.path, device=job.device)
    measurement = job.measuring.converted(model, load_tokenizer(stage.path))
    found = job.survey(model, tokenizer, "the converted model", str(stage.out))
    exact = is_exact(plan.recipe, model.config, job.evaluation.shape[1], len(operated.prefix))
    del model
    gc.collect()
    return Converted(checks, quality_gates(plan.recipe, operated.original, measurement, exact), measurement, found)


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
        operated.tuning,
    )
    folds_bos = tokenizer is not None and tokenizer.bos_token_id in operated.prefix
    measured = build_verdict(findings, tokenizer) if converted.measurement is not None else None
    entries = plan.entries(operated.prefix)
    reworked = Reworked(operated.smoothed, plan.lora_layers, operated.tuning)
    stage.add_text(
        "README.md", model_card(plan.source, plan.derived, plan.recipe, entries, tokens, folds_bos, reworked, measured)
    )  # fmt: skip
    manifest["files"] = stage.hashes()
    stage.add_json(MANIFEST, manifest)
    job.reporter.step("check the files against the source")
    # A GGUF's tensors were moved here from their dequantised copy: there is nothing left to compare them with.
    source = plan.source if plan.source.kind != "gguf" else None
    checks = [*check_integrity(stage.path, manifest, source, source and source.root), *converted.checks]
    return replace(findings, checks=checks)


def _aside(adapter: Path | None) -> contextlib.AbstractContextManager[Stage | None]:
    return contextlib.nullcontext() if adapter is None else Stage(Path(adapter))


def _conclude(
    stage: Stage, aside: Stage | None, verdict: dict, manifest: dict, verify: bool, keep_failed: Path | None
) -> dict:
    """Put `verdict` into the manifest, and checkpoint and adapter where they belong by it; the verdict to report."""
    if not verify:
        verdict["passed"] = None if verdict["passed"] else False
    status = "verified" if verdict["passed"] else "unverified"
    stage.replace_json(MANIFEST, {**manifest, "status": status, "verdict": plain_json(verdict)})
    if verdict["passed"] is not False:
        stage.publish()
    elif keep_failed is not None:
        stage.keep(keep_failed)
    else:
        return verdict
    if aside is not None:
        aside.publish()
    return verdict
