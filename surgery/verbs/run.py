"""`surgery run`: carry out the operations, write the converted checkpoint, prove it, publish it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.disk import disk_errors, require_target
from ..checkpoint.manifest import MANIFEST, Manifest
from ..checkpoint.source import materialise
from ..checkpoint.stage import Stage
from ..converted.card import model_card
from ..converted.reading import load_converted
from ..errors import OutputError, SourceError
from ..live.loading import load_original, load_tokenizer, require_device
from ..live.text import Chunking
from ..operations import OPERATIONS
from ..operations.base import NothingToDo, Stand
from ..progress import SILENT, Reporter
from ..report.verdict import card_tables
from ..steps.emit import emit
from ..steps.inputs import Texts, fit_chunks, gather_texts, require_inputs, room_after
from ..steps.measure import Pair, measure_pair
from ..steps.operate import Operated, operate
from ..steps.options import RUN, RunOptions
from ..steps.plan import Plan, prepare
from ..steps.recipe import Recipe, load_recipe
from ..steps.tune import assist, dismiss, prepare_training
from ..verification.gates.base import Inputs
from ..verification.integrity import check_integrity, read_config
from ..verification.tokens import check_tokenizer
from ..verification.verdict import Findings, build_verdict, plain_json

Verdict = dict[str, Any]


def run(
    recipe: Recipe | Path | str, source: str, out: Path | str, options: RunOptions = RUN,
    reporter: Reporter = SILENT,
) -> Verdict | None:  # fmt: skip
    """Convert `source` by `recipe` into the new directory `out`, and return the verdict.

    `out` exists afterwards only if every gate passed, or without proof (`options.verify` False), when the manifest says
    `unverified` and `passed` is None. Where an operation finds nothing to do, nothing is written, and the verdict is
    `passed` None and why in one sentence (`nothing_to_do`). With `options.surveys`, the verdict also has those of
    original and converted (`surveys`, for `surgery.report.write_report`). Of several processes (`accelerate launch`),
    all but the main one help to tune and return None. Raises SurgeryError for what a person can mend.
    """
    out = Path(out)
    # 1. Everything that can be refused without a weight.
    require_device(options.device)
    _require_measured(options)
    texts = gather_texts(options.text, options.calibration, reporter)
    reporter.step(f"plan {source}")
    plan = _plan(recipe, source, out, options)
    inputs = _inputs(plan, texts, options, reporter)
    training = prepare_training(plan, texts, inputs.calibrating, inputs.chunking, options, out)
    if training is not None and training.assists:
        assist(plan, training)
        return None
    with Stage(out) as stage, _aside(options.adapter) as aside:
        # 2. The source as plain files.
        plan, directory = _materialised(plan, stage, reporter)
        # 3. Fit every operation, compare with the original, tune.
        if aside is not None and training is not None:
            training = replace(training, adapter=aside.path)
        try:
            operated = operate(plan, directory, inputs.calibrating, training, options.device, reporter)
        except NothingToDo as nothing:
            dismiss(training)
            return {"passed": None, "nothing_to_do": f"{nothing}."}
        # 4. Write what was fitted.
        reporter.step("write the converted checkpoint")
        manifest = emit(plan, stage, directory, operated, options.link)
        operated = operated.without_tensors(plan)  # as large as the model, which is loaded anew
        # 5. Measure the original and what was written, each freshly loaded.
        findings, surveys = _measure(plan, stage, directory, operated, inputs, texts, options, reporter)
        # 6. Card and manifest; then check all files against the source.
        findings, manifest = _finish(plan, stage, directory, operated, findings, manifest, reporter)
        # 7. Judge, and publish or not.
        verdict = _conclude(stage, aside, build_verdict(findings), manifest, options)
    return {**verdict, "surveys": surveys} if options.surveys else verdict


# ---- 1. before weights


@dataclass(frozen=True)
class _Ready:
    """Chunks of evaluation text (N, T) and of calibration text (M, T), where they are read; what gates have ready."""

    chunking: Chunking
    evaluation: torch.Tensor | None
    calibrating: torch.Tensor | None
    gates: Mapping[str, Any]


def _require_measured(options: RunOptions) -> None:
    """SourceError for what is asked of a model that is not measured."""
    if options.verify:
        return
    if options.surveys:
        raise SourceError("a report surveys the converted model on text, which --no-verify leaves out; take one away.")
    if options.tasks is not None:
        raise SourceError(f"--tasks {options.tasks} is for gates, which --no-verify leaves out; take one away.")


def _plan(recipe: Recipe | Path | str, source: str, out: Path, options: RunOptions) -> Plan:
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    plan = prepare(
        recipe, source, out, needs_tokenizer=options.verify or recipe.reads_text, link=options.link,
        dtype=options.dtype, revision=options.revision,
    )  # fmt: skip
    if (kept := options.keep_failed) is not None:
        require_target(Path(kept), plan.source.root if plan.source.root.is_dir() else None)
        if Path(kept).resolve() == out.resolve():
            raise OutputError(f"{kept} is OUT itself, which only ever holds what passed; give another --keep-failed.")
    return plan


def _inputs(plan: Plan, texts: Texts, options: RunOptions, reporter: Reporter) -> _Ready:
    """Gates and texts made ready. SourceError where something is missing, or text too short."""
    recipe, reader, taken = plan.recipe, plan.reader, plan.changes.positions
    gates = recipe.verify.gates() if options.verify else ()
    for gate in gates:
        gate.require_tools(options.device)
    chunking = fit_chunks(options.chunking, plan.anatomy, max(taken, 1))
    if chunking != options.chunking:
        reporter.note(f"chunks of {chunking.length} tokens: the model has no more positions after a prefix or BOS")
    room = room_after(plan.anatomy, taken)
    ready = require_inputs(gates, Inputs(chunking, options.device, room, options.tasks)) if options.verify else {}
    evaluation = calibrating = None
    if options.verify:
        if texts.evaluation is None:
            raise SourceError("verification needs text: give --text FILE, or --no-verify to write without proof.")
        evaluation = reader.cut(texts.evaluation, chunking, "--text")
    _require_calibration(recipe, texts, reader.tokenizer)
    if recipe.searches or recipe.reads is not None or any(gate.calibrates for gate in gates):
        assert texts.calibration is not None  # half of the evaluation text, if no other was given
        calibrating = reader.cut_calibration(texts.calibration, chunking)
    return _Ready(chunking, evaluation, calibrating, ready)


def _require_calibration(recipe: Recipe, texts: Texts, tokenizer: object) -> None:
    """SourceError where operations read text, and there is none that they could read."""
    if texts.calibration is not None and tokenizer is not None:
        return
    if recipe.searches:
        raise SourceError(
            "prefix: auto is searched on text: give --calibration FILE (or --text) and a tokenizer, or list the prefix "
            "in the recipe."
        )
    if (reads := recipe.reads) is not None:
        raise SourceError(f"{reads} on text: give --calibration FILE (or --text), and a model with a tokenizer.")


# ---- 2. to 5.


def _aside(adapter: Path | None) -> contextlib.AbstractContextManager[Stage | None]:
    return contextlib.nullcontext() if adapter is None else Stage(Path(adapter))


def _materialised(plan: Plan, stage: Stage, reporter: Reporter) -> tuple[Plan, Path]:
    """The source as a directory of plain files: its own, or a GGUF's dequantised inside the stage."""
    if plan.source.kind != "gguf":
        return plan, plan.source.root
    reporter.step(f"dequantise {plan.source.root.name}")
    directory = materialise(plan.source, stage.scratch)
    if plan.target.tokenizer is None:
        return plan, directory
    # It is by now in files, which the converted checkpoint's come from.
    return replace(plan, target=replace(plan.target, tokenizer=load_tokenizer(directory))), directory


def _measure(
    plan: Plan, stage: Stage, directory: Path, operated: Operated, ready: _Ready, texts: Texts, options: RunOptions,
    reporter: Reporter,
) -> tuple[Findings, list[dict] | None]:  # fmt: skip
    """What the files as emitted were found to be, through their own tokenizer, beside the original; and surveys."""
    findings = Findings([], random_ids=operated.random_ids, said=_said(plan, operated))
    if ready.evaluation is None:
        return findings, None
    prefix, tokenizer = operated.changes.prefix or (), plan.target.tokenizer
    checks = [check_tokenizer(stage.path, tokenizer, prefix, texts.evaluation)]
    pair = Pair(
        plan.anatomy, prefix, plan.recipe, plan.recipe.verify.gates(), ready.evaluation, ready.calibrating, ready.gates,
        names=(plan.source.spec, str(stage.out)) if options.surveys else None,
    )  # fmt: skip
    found = measure_pair(
        pair,
        original=lambda: (load_original(directory, device=options.device), tokenizer),
        converted=lambda: (load_converted(stage.path, device=options.device), load_tokenizer(stage.path)),
        reporter=reporter,
    )
    return replace(findings, checks=checks, judgements=found.judgements, measured=found.measured), found.surveys


def _said(plan: Plan, operated: Operated) -> dict[str, Any]:
    """What the operations have to say in the verdict."""
    said: dict[str, Any] = {}
    for change in plan.recipe.changes:
        said |= change.found(operated.parts[change.name], plan.target.tokenizer)
    return said


# ---- 6. and 7.


def _finish(
    plan: Plan, stage: Stage, directory: Path, operated: Operated, findings: Findings, manifest: Manifest,
    reporter: Reporter,
) -> tuple[Findings, Manifest]:  # fmt: skip
    """Write card and manifest, then check the integrity of all of it."""
    recipe = plan.recipe
    stand = Stand(recipe.exact, recipe.tune is not None, operated.changes.trains)
    sections = [change.says(operated.parts[change.name], plan.target, stand) for change in recipe.changes]
    results = card_tables(build_verdict(replace(findings, checks=[])), recipe.verify) if findings.measured else None
    stage.add_text(
        "README.md", model_card(plan.source, plan.anatomy.model_class.__name__, recipe.to_dict(), sections, results)
    )
    reporter.step("check the files against the source")
    # What was dequantised for this run has been linked into the checkpoint: there is nothing left to compare with.
    if stage.scratch.exists():
        with disk_errors(stage.out):
            shutil.rmtree(stage.scratch)
    source, beside = (plan.source, directory) if plan.source.kind != "gguf" else (None, None)
    manifest = manifest.with_files(stage.hashes())
    stage.add_json(MANIFEST, manifest.to_dict())
    checks = check_integrity(
        stage.path, manifest, read_config(stage.path), OPERATIONS, recipe.changes_weights, source, beside
    )
    return replace(findings, checks=[*checks, *findings.checks]), manifest


def _conclude(
    stage: Stage, aside: Stage | None, verdict: Verdict, manifest: Manifest, options: RunOptions
) -> Verdict:  # fmt: skip
    """Put `verdict` into the manifest, and checkpoint and adapter where they belong by it; the verdict to report."""
    if not options.verify:
        verdict["passed"] = None if verdict["passed"] else False
    stage.replace_json(MANIFEST, manifest.concluded(plain_json(verdict)).to_dict())
    if verdict["passed"] is not False:
        stage.publish()
    elif options.keep_failed is not None:
        stage.keep(Path(options.keep_failed))
    else:
        return verdict
    if aside is not None:
        aside.publish()
    return verdict
