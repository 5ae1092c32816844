"""`surgery run`: carry out the operations, write the converted checkpoint, prove it, publish it."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, cast

from ..anatomy.patching import READS
from ..checkpoint.disk import disk_errors, require_target
from ..checkpoint.layout import read_layout
from ..checkpoint.manifest import MANIFEST, Manifest
from ..checkpoint.provenance import moment, name_of, names_only
from ..checkpoint.results import require_result_folder
from ..checkpoint.signature import Signer, manifest_digest
from ..checkpoint.source import materialise
from ..checkpoint.stage import Stage
from ..checkpoint.witness import Reading
from ..converted.card import Shown, model_card
from ..converted.origin import origin
from ..endings.leftovers import clear_for
from ..errors import OutputError, SourceError
from ..live.loading import live_original, load_tokenizer, require_device
from ..live.port import port_of
from ..live.text import no_longer_added
from ..operations import OPERATIONS
from ..operations.base import NothingToDo, Stand
from ..progress import SILENT, Reporter
from ..report.provenance import table as provenance_table
from ..report.verdict import card_tables
from ..results import Verdict
from ..steps.act import provenance, told
from ..steps.emit import emit, emitted, source_entry
from ..steps.inputs import Texts
from ..steps.measure import Pair, measure_pair
from ..steps.operate import Operated, operate
from ..steps.options import RUN, RunKeywords, RunOptions, with_keywords
from ..steps.pictures import Pictures
from ..steps.plan import Plan, prepare
from ..steps.reading import check_reading, reading_of
from ..steps.ready import Ready, gather, make_ready, say_notes
from ..steps.recipe import Given, Recipe, load_recipe
from ..steps.resume import ALWAYS, Steps, identity, keeping
from ..steps.tune import assist, dismiss, prepare_training
from ..verification.checks import integrity_to_dict
from ..verification.integrity import check_integrity, read_config
from ..verification.tokens import check_tokenizer
from ..verification.verdict import Findings, build_verdict, plain_json
from ..words import human


def run(
    recipe: Given, source: Path | str, out: Path | str, options: RunOptions = RUN,
    reporter: Reporter = SILENT, **keywords: Unpack[RunKeywords],
) -> Verdict | None:  # fmt: skip
    """Convert `source` by `recipe` into the new directory `out`, and return the verdict.

    `recipe`: the name of one that comes with surgery, a path, a dict, or a Recipe. Keywords are fields of `options`.

    `out` exists afterwards only if every gate passed, or without proof (`options.verify` False), when the manifest says
    `unverified` and `passed` is None. Where an operation finds nothing to do, nothing is written, and the verdict is
    `passed` None and why in one sentence (`nothing_to_do`). With `options.surveys`, the verdict also has those of
    original and converted (`surveys`, for `surgery.report.write_report`). Of several processes (`accelerate launch`),
    all but the main one help to tune and return None. Raises SurgeryError for what a person can mend.
    """
    chosen = with_keywords("run", options, keywords)
    return cast(Verdict | None, _converted(load_recipe(recipe), str(source), Path(out), chosen, reporter))


def _converted(
    recipe: Recipe, source: str, out: Path, options: RunOptions, reporter: Reporter
) -> dict[str, Any] | None:  # fmt: skip
    # 1. Everything that can be refused without a weight.
    date = moment()
    require_device(options.device)
    _require_measured(options)
    signer = None if options.sign is None else Signer(options.sign)
    texts = gather(options, reporter)
    _clear_leftovers(out, options, reporter)
    reporter.step(f"plan {source}")
    plan = _plan(recipe, source, out, options)
    say_notes(plan, options, reporter)
    inputs = make_ready(plan, texts, options, reporter)
    act = provenance(
        date, command=options.command, device=options.device, files=inputs.files, evaluation=inputs.evaluation,
        calibration=inputs.calibrating, hub_ids=[plan.source.name],
    )  # fmt: skip
    training = prepare_training(plan, texts, inputs, options, out)
    if training is not None and training.assists:
        assist(plan, training)
        return None
    with (
        keeping(options.resume, reporter) as steps, Stage(out) as stage, _aside(options.adapter) as aside,
        reading_of(plan.source, reporter) as reading,
    ):  # fmt: skip
        steps.begin(identity(plan, reading, inputs, options, act.versions))
        # 2. The source as plain files.
        plan, directory = _materialised(plan, stage, reporter)
        # 3. Fit every operation, compare with the original, tune.
        if aside is not None and training is not None:
            training = replace(training, adapter=aside.path)
        try:
            kept = steps if training is None else ALWAYS  # training keeps its own state, and others take part in it
            operated = kept.once("operated", lambda: operate(
                plan, directory, inputs.calibrating, training, options.place, reporter, steps.once
            ))  # fmt: skip
        except NothingToDo as nothing:
            dismiss(training)
            return {
                "passed": None, "nothing_to_do": f"{nothing}.", "gates": [], "integrity": integrity_to_dict([]),
                "provenance": told(act, source_entry(plan, reading.recorded), plan.recipe.to_dict()),
            }  # fmt: skip
        # 4. Write what was fitted.
        reporter.step("write the converted checkpoint")
        manifest = emit(plan, stage, directory, operated, reading.recorded, act, options.link)
        operated = operated.without_tensors(plan)  # as large as the model, which is loaded anew
        # 5. Measure the original and what was written, each freshly loaded.
        findings, surveys = _measure(plan, stage, directory, operated, inputs, texts, options, reporter, steps)
        # 6. Card and manifest; then check all files against the source.
        findings, manifest = _finish(plan, stage, directory, operated, findings, manifest, reading, reporter)
        # 7. Judge, and publish or not.
        found = names_only(build_verdict(findings), [stage.path, out, directory, plan.source.root])
        verdict = _conclude(stage, aside, found, manifest, options, signer)
    verdict["provenance"] = told(act, manifest.source, manifest.recipe)
    return {**verdict, "surveys": surveys} if options.surveys else verdict


# ---- 1. before weights


def _clear_leftovers(out: Path, options: RunOptions, reporter: Reporter) -> None:
    """Remove what runs to the same output left behind that were killed: their room may be needed."""
    for path in (out, options.adapter, options.keep_failed):
        for left in clear_for(path) if path is not None else ():
            reporter.note(f"removed {left.path} ({human(left.bytes)}), which a run that was killed had left")


def _require_measured(options: RunOptions) -> None:
    """SourceError for what is asked of a model that is not measured."""
    if options.verify:
        return
    if options.surveys:
        raise SourceError("a report surveys the converted model on text, which --no-verify leaves out; take one away.")
    if options.tasks is not None:
        raise SourceError(f"--tasks {options.tasks} is for gates, which --no-verify leaves out; take one away.")


def _plan(recipe: Recipe, source: str, out: Path, options: RunOptions) -> Plan:
    reads = not (options.images or options.audio) and (options.verify or recipe.reads_text)
    plan = prepare(
        recipe, source, out, needs_tokenizer=reads, link=options.link, dtype=options.dtype, revision=options.revision,
        place=options.place, reads=next((one for one in READS if getattr(options, one)), None),
    )  # fmt: skip
    apart = [plan.source.root, out, *(path for path in (options.keep_failed, options.adapter) if path is not None)]
    require_result_folder(options.resume, "--resume", apart)
    if (kept := options.keep_failed) is not None:
        require_target(Path(kept), plan.source.root if plan.source.root.is_dir() else None)
        if Path(kept).resolve() == out.resolve():
            raise OutputError(f"{kept} is OUT itself, which only ever holds what passed; give another --keep-failed.")
    return plan


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
    plan: Plan, stage: Stage, directory: Path, operated: Operated, ready: Ready, texts: Texts | Pictures,
    options: RunOptions, reporter: Reporter, steps: Steps,
) -> tuple[Findings, list[dict] | None]:  # fmt: skip
    """What the files as emitted were found to be, through their own tokenizer, beside the original; and surveys."""
    findings = Findings([], random_ids=operated.random_ids, said=operated.said(plan))
    if (evaluation := ready.evaluation) is None:
        return findings, None
    prefix, tokenizer = operated.changes.prefix or (), plan.target.tokenizer
    checks = [check_tokenizer(stage.path, tokenizer, prefix, texts.evaluation)] if isinstance(texts, Texts) else []
    leading = no_longer_added(tokenizer, prefix) if plan.anatomy.patching is not None else ()
    port = port_of(plan.anatomy, evaluation, len(leading))
    pair = Pair(
        prefix, plan.recipe, plan.recipe.verify.gates(), evaluation, ready.calibrating, ready.gates,
        names=(f"{plan.source.name}, original", f"{plan.source.name}, converted") if options.surveys else None,
        pictures=ready.pictures, before=leading,
    )  # fmt: skip
    found = measure_pair(
        pair,
        original=lambda: (live_original(directory, plan.anatomy, options.place, port=port), tokenizer),
        converted=lambda: emitted(stage.path, plan.anatomy, options.place, evaluation),
        reporter=reporter,
        steps=steps,
    )
    if found.surveys is not None:
        gguf = plan.source.kind == "gguf"
        before = plan.source.root.stat().st_size if gguf else plan.source.layout.total_bytes
        after = read_layout(stage.path).total_bytes
        for survey, size, kind in zip(found.surveys, (before, after), ("gguf" if gguf else "", ""), strict=True):
            survey["files"] = {"bytes": size, "kind": kind or "safetensors"}
    return replace(findings, checks=checks, judgements=found.judgements, measured=found.measured), found.surveys


# ---- 6. and 7.


def _finish(
    plan: Plan, stage: Stage, directory: Path, operated: Operated, findings: Findings, manifest: Manifest,
    reading: Reading, reporter: Reporter,
) -> tuple[Findings, Manifest]:  # fmt: skip
    """Write card and manifest, then check the integrity of all of it."""
    recipe = plan.recipe
    stand = Stand(recipe.exact, recipe.tune is not None, operated.changes.trains)
    sections = [change.says(operated.parts[change.name], plan.target, stand) for change in recipe.changes]
    known = origin(plan.source)
    if known.broken is not None:
        reporter.note(f"{known.broken}: the card does not tell its licence")
    stage.add_text("README.md", model_card(
        plan.source, known, plan.anatomy, recipe.to_dict(), sections,
        _shown(stage, findings, manifest, recipe),
    ))  # fmt: skip
    reporter.step("check the files against the source")
    # What was dequantised for this run has been linked into the checkpoint: there is nothing left to compare with.
    if stage.scratch.exists():
        with disk_errors(stage.out):
            shutil.rmtree(stage.scratch)
    source, beside = (plan.source, directory) if plan.source.kind != "gguf" else (None, None)
    manifest = manifest.with_files(stage.hashes())
    stage.add_json(MANIFEST, manifest.to_dict())
    checks = check_integrity(
        stage.path,
        manifest,
        read_config(stage.path),
        OPERATIONS,
        {*plan.changes.changed, *plan.changes.replaced},
        source,
        beside,
        hashes=reading.recorded,
    )
    return replace(findings, checks=[check_reading(reading), *checks, *findings.checks]), manifest


def _shown(stage: Stage, findings: Findings, manifest: Manifest, recipe: Recipe) -> Shown:
    """What the card shows: it is written before the files are checked."""
    assert manifest.provenance is not None
    made = provenance_table(told(manifest.provenance, manifest.source, None))
    verdict = build_verdict(replace(findings, checks=[])) if findings.measured else None
    return Shown(
        name_of(stage.out), verdict, "" if verdict is None else card_tables(verdict, recipe.verify),
        manifest.provenance, "" if made is None else made.markdown(),
    )  # fmt: skip


def _conclude(
    stage: Stage, aside: Stage | None, verdict: dict[str, Any], manifest: Manifest, options: RunOptions,
    signer: Signer | None,
) -> dict[str, Any]:  # fmt: skip
    """Put `verdict` into the manifest, and checkpoint and adapter where they belong by it; the verdict to report.

    What is reported says besides the digest of that manifest, and what signed it: neither can be inside.
    """
    if not options.verify:
        verdict["passed"] = None if verdict["passed"] else False
    stage.replace_json(MANIFEST, manifest.concluded(plain_json(verdict)).to_dict())
    if verdict["passed"] is not False:
        signature = None if signer is None else signer.sign(stage.path)
        seal = {} if signature is None else {"sealed": {"signature": signature, "digest": None}}
        verdict = {**verdict, "digest": manifest_digest(stage.path), **seal}
        stage.publish()
    elif options.keep_failed is not None:
        stage.keep(Path(options.keep_failed))
    else:
        return verdict
    if aside is not None:
        aside.publish()
    return verdict
