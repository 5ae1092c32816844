"""`surgery run`: fold the prefix into k', v', write the converted checkpoint, prove it, publish it."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .. import __version__
from ..checkpoint.layout import INDEX, TensorInfo, index_json, plan_file
from ..checkpoint.manifest import MANIFEST, build_manifest
from ..checkpoint.source import materialise, source_hashes
from ..checkpoint.stage import Stage, require_target
from ..errors import DamagedCheckpoint, SourceError
from ..loading import load_original, load_tokenizer
from ..operations.attention_bias import Slots, eab_config, fold
from ..operations.card import model_card
from ..operations.emission import converted_config, converted_tokenizer, slot_tensors, slot_values
from ..operations.prefix_search import PrefixSearch
from ..planning import Plan
from ..recipe import Recipe, load_recipe
from ..reporting import Reporter
from ..verification.converted import load_converted
from ..verification.equivalence import Equivalence, compare_random_ids
from ..verification.gates import quality_gates
from ..verification.integrity import check_integrity
from ..verification.measure import Measurement, Original, measure, measure_original
from ..verification.text import Chunking, chunk, tokenize
from ..verification.tokens import check_tokenizer
from ..verification.verdict import Findings, build_verdict
from .inputs import Texts, fit_chunks, gather_texts, has_tokenizer, source_work
from .plan import prepare

CALIBRATION_CHUNKS = 32


@dataclass(frozen=True)
class Operated:
    """What came out of the original while it was loaded."""

    prefix: tuple[int, ...]
    slots: Slots
    random_ids: Equivalence
    search: dict | None
    original: Original | None


def run(
    recipe: Recipe | Path | str,
    source: str,
    out: Path | str,
    *,
    text: Sequence[Path] = (),
    calibration: Sequence[Path] = (),
    verify: bool = True,
    keep_failed: Path | None = None,
    link: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    chunking: Chunking = Chunking(),
    reporter: Reporter = Reporter(),
) -> dict:
    """Convert `source` by `recipe` into the new directory `out`, and return the verdict.

    `out` exists afterwards only if every gate passed, or with `verify=False`, when the manifest says `unverified` (`passed` is
    None). What fails goes to `keep_failed`, where given. Raises SurgeryError for anything that a person can mend.
    """
    texts = gather_texts(text, calibration)
    if keep_failed is not None:
        require_target(Path(keep_failed))
    reporter.step(f"plan {source}")
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    searched = recipe.operations[0].attention_bias.prefix == "auto"
    prepared = prepare(recipe, source, Path(out), needs_tokenizer=verify or searched, link=link, dtype=dtype, revision=revision)
    plan, tokenizer = prepared.plan, prepared.tokenizer
    chunking = fit_chunks(chunking, plan.anatomy, plan.n_slots)
    evaluation, calibrating = _cut_texts(plan, tokenizer, texts, chunking, verify)
    with Stage(Path(out)) as stage:
        directory = _materialise(plan, stage, reporter)
        if tokenizer is not None or has_tokenizer(plan.source):
            tokenizer = load_tokenizer(directory)
        operated = _operate(plan, directory, tokenizer, evaluation, calibrating, device, reporter)
        tokens = [tokenizer.decode([token]) for token in operated.prefix] if tokenizer is not None else None
        reporter.step("write the converted checkpoint")
        manifest = _emit(plan, stage, directory, tokenizer, operated, link)
        findings = _verify_stage(plan, stage, directory, tokenizer, texts, operated, evaluation, manifest, tokens, device, reporter)
        verdict = build_verdict(findings, tokenizer)
        if not verify:
            verdict["passed"] = None if verdict["passed"] else False
        stage.replace_json(MANIFEST, {**manifest, "status": "verified" if verdict["passed"] else "unverified", "verdict": verdict})
        if verdict["passed"] is not False:
            stage.publish()
        elif keep_failed is not None:
            stage.keep(Path(keep_failed))
    return verdict


def _cut_texts(plan: Plan, tokenizer, texts: Texts, chunking: Chunking, verify: bool):
    """Evaluation chunks (N, T) or None, calibration chunks or None. SourceError for text that is missing or too short."""
    evaluation = calibrating = None
    if verify:
        if texts.evaluation is None:
            raise SourceError("verification needs text: give --text FILE, or --no-verify to write without proof")
        evaluation = chunk(tokenize(tokenizer, texts.evaluation), chunking, "--text")
    if plan.prefix is None:
        if texts.calibration is None or tokenizer is None:
            raise SourceError(
                "prefix: auto is searched on text: give --calibration FILE (or --text) and a tokenizer, or list the prefix in the recipe"
            )
        wanted = Chunking(min(CALIBRATION_CHUNKS, chunking.count), chunking.length)
        calibrating = chunk(tokenize(tokenizer, texts.calibration), wanted, "the calibration text")
    return evaluation, calibrating


def _materialise(plan: Plan, stage: Stage, reporter: Reporter) -> Path:
    if plan.source.kind != "gguf":
        return plan.source.root
    reporter.step(f"dequantise {plan.source.root.name}")
    return materialise(plan.source, source_work(stage))


def _operate(plan: Plan, directory: Path, tokenizer, evaluation, calibrating, device: str, reporter: Reporter) -> Operated:
    """Everything that needs the original's weights: search, fold, comparison on random ids, baselines."""
    reporter.step("load the original")
    model = load_original(directory, device=device)
    _require_finite(model)
    prefix, search, visible = plan.prefix, None, plan.operation.slots_visible
    if prefix is None:
        reporter.step(f"search for a prefix of up to {plan.n_slots} tokens")
        with reporter.bar("search", None) as advance:
            searching = PrefixSearch(model, plan.anatomy, tokenizer, calibrating, visible, lambda what: advance(1, what))
            best = searching.run(plan.n_slots)
        prefix, search = best.prefix, searching.to_dict()
        reporter.note(f"prefix {searching.shown(prefix)} leaves {best.massive} massive activations on the calibration text")
    reporter.step("fold the prefix and compare with the original on random token ids")
    slots = fold(model, plan.anatomy, prefix)
    random_ids = compare_random_ids(model, plan.anatomy, prefix, slots, visible)
    original = None
    if evaluation is not None:
        reporter.step("measure the original")
        bos = tokenizer.bos_token_id
        passes = 2 if bos is None or tuple(prefix) == (bos,) else 3
        with reporter.bar("original", passes * len(evaluation)) as advance:
            original = measure_original(model, plan.anatomy, evaluation, prefix, bos, lambda what, done: advance(done, what))
    slots = {site: (key.float().cpu(), value.float().cpu()) for site, (key, value) in slots.items()}
    del model
    gc.collect()
    return Operated(tuple(prefix), slots, random_ids, search, original)


def _require_finite(model: PreTrainedModel) -> None:
    for name, tensor in model.named_parameters():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise DamagedCheckpoint(f"{name} of the source holds NaN or Inf, so nothing computed from it would mean anything; restore it")


def _emit(plan: Plan, stage: Stage, directory: Path, tokenizer, operated: Operated, link: bool) -> dict:
    """Write every file but the card into the stage; returns the manifest, without file hashes and verdict yet."""
    for old, new in plan.shards.items():
        if plan.source.kind == "gguf":
            os.replace(directory / old, stage.path / new)
        else:
            stage.add_file(directory / old, new, link=link)
    stage.add_tensors(plan.slot_shard, slot_values(plan.anatomy, operated.slots), {"format": "pt"})
    n = len(operated.prefix)
    eab = eab_config(plan.anatomy, operated.prefix, plan.operation.slots_visible)
    lowered = {key: value + plan.n_slots - n for key, value in plan.lowered.items()}  # planned for the most slots there could be
    stage.add_json("config.json", converted_config(plan.source.config, plan.derived, eab, lowered))
    _, slot_infos = plan_file(plan.slot_shard, [(name, "F32", shape) for name, shape in slot_tensors(plan.anatomy, n).items()])
    tensors = {name: dict(entry) for name, entry in plan.tensors.items() if entry["status"] == "kept"}
    tensors.update({name: {"status": "added", "shard": plan.slot_shard, "dtype": "F32", "shape": list(i.shape)} for name, i in slot_infos.items()})
    kept = {t.name: TensorInfo(t.name, t.dtype, t.shape, plan.shards[t.shard], t.start, t.stop) for t in plan.source.layout.tensors.values()}
    stage.add_json(INDEX, index_json({**kept, **slot_infos}))
    changed = {}
    if tokenizer is not None:
        folded_bos = tokenizer.bos_token if tokenizer.bos_token_id in operated.prefix else None
        changed = converted_tokenizer(directory, plan.source.companions, tokenizer, n, folded_bos)
    for name in plan.source.companions:
        if name not in changed:
            stage.add_file(directory / name, name)
    for name, content in {**changed, **plan.derived.files()}.items():
        stage.add_text(name, content)
    if plan.source.kind == "gguf":
        shutil.rmtree(directory)
    return build_manifest(
        source=source_entry(plan), recipe=plan.recipe.to_dict(), versions=_versions(), tensors=tensors, files={}, verdict=None
    )


def source_entry(plan: Plan) -> dict:
    """`source` of the manifest."""
    source = plan.source
    dtype = next(iter(source.layout.tensors.values())).dtype if source.kind == "gguf" else None
    return {"spec": source.spec, "kind": source.kind, "revision": source.revision, "dtype": dtype, "sha256": source_hashes(source)}


def _versions() -> dict[str, str]:
    return {"surgery": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}}


def _verify_stage(
    plan: Plan, stage: Stage, directory: Path, tokenizer, texts: Texts, operated: Operated, evaluation, manifest: dict, tokens, device, reporter
) -> Findings:
    """Measure the files as emitted, write card and manifest, then check the integrity of all of it."""
    converted: Measurement | None = None
    checks, gates = [], []
    if evaluation is not None:
        reporter.step("measure the converted model, loaded fresh from its files")
        checks.append(check_tokenizer(stage.path, tokenizer, operated.prefix, texts.evaluation))
        model = load_converted(stage.path, code_is_ours=True, device=device)
        with reporter.bar("converted", len(evaluation)) as advance:
            converted = measure(model, plan.anatomy, evaluation, "converted", lambda what, done: advance(done, what), massive=True)
        del model
        gc.collect()
        gates = quality_gates(plan.recipe.verify, operated.original, converted)
    findings = Findings(
        [], gates, operated.original, converted, operated.random_ids, operated.search, {"ids": list(operated.prefix), "tokens": tokens}
    )
    eab = eab_config(plan.anatomy, operated.prefix, plan.operation.slots_visible)
    folds_bos = tokenizer is not None and tokenizer.bos_token_id in operated.prefix
    measured = build_verdict(findings, tokenizer) if converted is not None else None
    stage.add_text("README.md", model_card(plan.source, plan.derived, plan.recipe.to_dict(), eab, tokens, folds_bos, measured))
    manifest["files"] = stage.hashes()
    stage.add_json(MANIFEST, manifest)
    reporter.step("check the files against the source")
    if plan.source.kind == "gguf":  # its tensors were moved here from the dequantised copy; there is nothing left to compare them with
        checks = [*check_integrity(stage.path, manifest, None, None), *checks]
    else:
        checks = [*check_integrity(stage.path, manifest, plan.source, plan.source.root), *checks]
    return Findings(checks, gates, findings.original, converted, findings.random_ids, findings.search, findings.prefix)
