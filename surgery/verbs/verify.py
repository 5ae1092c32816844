"""`surgery verify`: check a converted checkpoint, alone or against its source. What a CI job of a stranger calls."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ..anatomy.stored import vocabulary_size
from ..checkpoint.disk import require_space
from ..checkpoint.layout import read_layout
from ..checkpoint.manifest import MANIFEST, Manifest, read_manifest
from ..checkpoint.provenance import moment, names_only
from ..checkpoint.source import Source, has_tokenizer, materialise, open_source
from ..converted.described import Described
from ..converted.reading import load_converted, require_converted
from ..errors import DamagedCheckpoint, SourceError
from ..live.loading import load_original, load_tokenizer, require_device
from ..live.text import CHUNKS, Chunking
from ..operations import OPERATIONS
from ..progress import SILENT, Reporter
from ..steps.act import provenance, told
from ..steps.inputs import Reader, Texts, fit_chunks, gather_texts, require_inputs, room_after
from ..steps.measure import Pair, measure_pair
from ..steps.options import VERIFY, VerifyOptions
from ..steps.recipe import Recipe
from ..verification.gates import Gate
from ..verification.gates.base import Inputs
from ..verification.integrity import Check, check_integrity, read_config
from ..verification.tokens import check_tokenizer
from ..verification.verdict import Findings, build_verdict

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def verify(
    checkpoint: Path | str, options: VerifyOptions = VERIFY, reporter: Reporter = SILENT
) -> dict[str, Any]:  # fmt: skip
    """Check the converted `checkpoint` and return the verdict.

    Alone: integrity of files, tensors, slots, code, tokenizer. With text: also perplexity and massive activations of
    the converted model. Against its source: also every kept tensor, and with both, all gates of its recipe.
    Text is cut as `run` cuts it: without calibration text, from which static scales are taken, its first half is for
    that and its second half is measured on.
    Python files in the checkpoint are compared with what this version writes, and never run.
    """
    root, date = Path(checkpoint), moment()
    # 1. Everything that can be refused without reading much.
    require_device(options.device)
    _require_use(options)
    texts = gather_texts(options.text, options.calibration, reporter)
    require_converted(root)
    try:
        manifest = read_manifest(root)
    except DamagedCheckpoint as error:  # a verdict all the same: CI servers read it from files
        return _told(Findings([Check("manifest", False, str(error))]), [root], date, options, texts)
    if texts.evaluation is not None and not has_tokenizer(manifest.files):
        raise SourceError(f"{root} was converted without a tokenizer, and --text needs one; verify it without text.")
    if manifest.failed:
        reporter.note(f"{root} was kept though it failed when it was written, as {MANIFEST} says")
    source = _open_source(options, manifest) if options.against is not None else None
    # 2. The files.
    reporter.step(f"check the files of {root}")
    with _plain_files(source, reporter) as directory:
        paths = [root, *([] if source is None or directory is None else [source.root, directory])]
        checks, described, recipe = _integrity(root, manifest, source, directory, reporter)
        if described is not None and has_tokenizer(manifest.files):
            original = None
            if source is not None and directory is not None and has_tokenizer(source.companions):
                original = load_tokenizer(directory)
            checks.append(check_tokenizer(root, original, described.eab.prefix_ids, texts.evaluation))
        if described is None or recipe is None or not all(check.passed for check in checks):
            return _told(Findings(checks), paths, date, options, texts, manifest)
        if texts.evaluation is None:
            return _told(Findings(checks), paths, date, options, texts, manifest)
        # 3. The models, on text.
        ready = _ready(root, described, recipe, directory, texts, options)
        findings = replace(_measured(root, described, recipe, directory, ready, options, reporter), checks=checks)
        return _told(findings, paths, date, options, texts, manifest, ready)


def chunking_of(root: Path, count: int | None = None, length: int | None = None) -> Chunking:
    """How the run that wrote `root` cut its evaluation text, so far as its manifest says; but as given here."""
    try:
        act = read_manifest(root).provenance
    except DamagedCheckpoint:  # which `verify` says
        act = None
    cut = CHUNKS if act is None or act.chunks.evaluation is None else act.chunks.evaluation
    return Chunking(cut.count if count is None else count, cut.length if length is None else length)


def _told(
    findings: Findings, paths: Sequence[Path], date: str, options: VerifyOptions, texts: Texts,
    manifest: Manifest | None = None, ready: _Ready | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The verdict, with the provenance of this verification; source and recipe are those of the checkpoint."""
    against = [] if options.against is None or os.path.exists(options.against) else [options.against]
    act = provenance(
        date, command=options.command, device=options.device, files=texts.files, hub_ids=against,
        **({} if ready is None else {"evaluation": ready.evaluation, "calibration": ready.calibrating}),
    )  # fmt: skip
    source, recipe = (None, None) if manifest is None else (manifest.source, manifest.recipe)
    return {**names_only(build_verdict(findings), paths), "provenance": told(act, source, recipe)}


def _require_use(options: VerifyOptions) -> None:
    """SourceError for what is given and would not be used."""
    if options.revision is not None and options.against is None:
        raise SourceError(f"--revision {options.revision} is that of a hub id; give it with --against.")
    if options.calibration and not options.text:
        raise SourceError(
            f"--calibration {options.calibration[0]} is for what is measured on text; give it with --text."
        )
    if options.tasks is not None and not (options.text and options.against is not None):
        raise SourceError(f"--tasks {options.tasks} is for gates of the recipe; give it with --against and --text.")


def _integrity(
    root: Path, manifest: Manifest, source: Source | None, directory: Path | None, reporter: Reporter
) -> tuple[list[Check], Described | None, Recipe | None]:
    """The checks; and what config.json and the manifest's recipe say, None where they say nothing that can be read."""
    recipe, checks = None, []
    try:
        recipe = Recipe.model_validate(manifest.recipe)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        said = f"the recipe in {MANIFEST} does not parse (at {where or 'its top'}), so there are no gates"
        checks.append(Check("recipe", False, f"{said}; convert the source again"))
    described = read_config(root)
    may_change = recipe is None or recipe.changes_weights  # what cannot be read is told, and once is enough
    with reporter.bar("hash", sum(entry.bytes for entry in manifest.files.values())) as advance:
        checks += check_integrity(root, manifest, described, OPERATIONS, may_change, source, directory, advance)
    well = any(check.name == "config" and check.passed for check in checks)
    return checks, described if well and isinstance(described, Described) else None, recipe


@dataclass(frozen=True)
class _Ready:
    """Chunks of evaluation text (N, T) and, where it is read, of calibration text (M, T); what gates have ready."""

    tokenizer: Any
    evaluation: torch.Tensor
    calibrating: torch.Tensor | None
    gates: tuple[Gate, ...]
    by_gate: Mapping[str, Any]


def _ready(
    root: Path, described: Described, recipe: Recipe, directory: Path | None, texts: Texts, options: VerifyOptions
) -> _Ready:  # fmt: skip
    """Texts and gates made ready. SourceError where something is missing, or text too short."""
    assert texts.evaluation is not None and texts.calibration is not None
    anatomy, tokenizer, prefix = described.anatomy, load_tokenizer(root), described.eab.prefix_ids
    reader = Reader(tokenizer, vocabulary_size(read_layout(root), anatomy))
    taken = max(len(prefix), *(change.most_positions for change in recipe.changes))  # as `run` cut its text
    chunking = fit_chunks(options.chunking or chunking_of(root), anatomy, max(taken, 1))
    chunks = reader.cut(texts.evaluation, chunking, "--text")
    gates = recipe.verify.gates(compared=directory is not None)
    for gate in gates:
        gate.require_tools(options.device)
    ready = require_inputs(gates, Inputs(chunking, options.device, room_after(anatomy, taken), options.tasks))
    calibrating = None
    if any(gate.calibrates for gate in gates):
        calibrating = reader.cut_calibration(texts.calibration, chunking)
    return _Ready(tokenizer, chunks, calibrating, gates, ready)


def _measured(
    root: Path, described: Described, recipe: Recipe, directory: Path | None, ready: _Ready, options: VerifyOptions,
    reporter: Reporter,
) -> Findings:  # fmt: skip
    """What the models are found to be on text, on files whose integrity holds. Their code has been compared."""
    anatomy, tokenizer, prefix = described.anatomy, ready.tokenizer, described.eab.prefix_ids
    own = load_tokenizer(directory) if directory is not None and has_tokenizer(_names(directory)) else tokenizer
    found = measure_pair(
        Pair(anatomy, prefix, recipe, ready.gates, ready.evaluation, ready.calibrating, ready.by_gate),
        original=None if directory is None else lambda: (load_original(directory, device=options.device), own),
        converted=lambda: (load_converted(root, device=options.device), tokenizer),
        reporter=reporter,
    )
    tokens = {"ids": list(prefix), "tokens": [tokenizer.decode([token]) for token in prefix]}
    return Findings([], found.judgements, found.measured, said={"prefix": tokens} if prefix else {})


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def _open_source(options: VerifyOptions, manifest: Manifest) -> Source:
    found, against = manifest.source.get("dtype"), str(options.against)
    dtype = DTYPES.get(found) if isinstance(found, str) and against.endswith(".gguf") else None
    return open_source(against, revision=options.revision, dtype=dtype)


@contextlib.contextmanager
def _plain_files(source: Source | None, reporter: Reporter) -> Iterator[Path | None]:
    """The source as a directory of plain files; a GGUF is dequantised for the time of the check."""
    if source is None or source.kind != "gguf":
        yield source.root if source is not None else None
        return
    with tempfile.TemporaryDirectory(prefix="surgery-source-") as scratch:
        require_space(Path(scratch), source.layout.total_bytes)
        reporter.step(f"dequantise {source.root.name}")
        yield materialise(source, Path(scratch) / "model")
