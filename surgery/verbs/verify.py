"""`surgery verify`: check a converted checkpoint, alone or against its source. What a CI job of a stranger calls."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from pydantic import ValidationError

from ..anatomy.encoders import examine_encoder
from ..anatomy.sites import Anatomy
from ..anatomy.stored import vocabulary_size
from ..checkpoint.layout import read_layout
from ..checkpoint.manifest import MANIFEST, Manifest, read_manifest
from ..checkpoint.provenance import TextFiles, moment, names_only
from ..checkpoint.signature import PublicKey, parse_digest
from ..checkpoint.source import Source, has_tokenizer
from ..converted.described import Described
from ..converted.reading import live_converted
from ..errors import DamagedCheckpoint, OutputError, SourceError
from ..live.loading import live_original, load_tokenizer, require_device
from ..live.memory import Needs
from ..live.port import port_of
from ..live.text import CHUNKS, Chunking, no_longer_added, token_texts
from ..operations import OPERATIONS
from ..progress import SILENT, Reporter
from ..results import Integrity, Verdict
from ..steps.act import provenance, told
from ..steps.again import check_again
from ..steps.fetch import fetch_converted
from ..steps.inputs import Cutter, Texts, calibrated, fit_chunks, require_inputs, room_after, taken_by, text_reader
from ..steps.measure import Pair, measure_pair
from ..steps.options import VERIFY, VerifyKeywords, VerifyOptions, with_keywords
from ..steps.original import open_original, plain_files
from ..steps.pictures import FileReader, Pictures
from ..steps.ready import classifies, gather, require_port
from ..steps.recipe import Recipe
from ..steps.recordings import file_reader
from ..verification.checks import Check
from ..verification.gates import Gate
from ..verification.gates.base import Inputs
from ..verification.integrity import check_integrity, read_config
from ..verification.seals import check_seals, required_checks, seal_notes, seals_said
from ..verification.tokens import check_tokenizer
from ..verification.verdict import Findings, build_verdict


def verify(
    checkpoint: Path | str, options: VerifyOptions = VERIFY, reporter: Reporter = SILENT,
    **keywords: Unpack[VerifyKeywords],
) -> Verdict:  # fmt: skip
    """Check the converted `checkpoint`, a directory or a hub id ("owner/name@revision"), and return the verdict.

    Keywords are fields of `options`.

    Alone: integrity of files, tensors, slots, code, tokenizer; `status`, `digest` and `sealed` of the verdict say what
    its manifest claims, and what vouches for that. With text: also perplexity and massive activations of
    the converted model. Against its source: also every kept tensor, and with both, all gates of its recipe.
    Text is cut as `run` cuts it: without calibration text, from which static scales are taken, its first half is for
    that and its second half is measured on.
    Python files in the checkpoint are compared with what this version writes, and never run.
    """
    return cast(Verdict, _verified(checkpoint, with_keywords("verify", options, keywords), reporter))


def _verified(checkpoint: Path | str, options: VerifyOptions, reporter: Reporter) -> dict[str, Any]:
    date = moment()
    # 1. Everything that can be refused without reading much.
    require_device(options.device)
    _require_use(options)
    texts = gather(options, reporter)
    digest = None if options.digest is None else parse_digest(options.digest)
    key = None if options.public_key is None else PublicKey(options.public_key)
    root = fetch_converted(checkpoint, reporter)
    try:
        manifest = read_manifest(root)
        standing = _standing(root, manifest, digest, key, options)
    except DamagedCheckpoint as error:  # a verdict all the same: CI servers read it from files
        return _told(Findings([Check("manifest", False, str(error))]), [root], date, options, texts)
    if isinstance(texts, Texts) and texts.evaluation is not None and not has_tokenizer(manifest.files):
        raise SourceError(f"{root} was converted without a tokenizer, and --text needs one; verify it without text.")
    if manifest.failed:
        reporter.note(f"{root} was kept though it failed when it was written, as {MANIFEST} says")
    source = open_original(str(options.against), manifest, options.revision) if options.against is not None else None
    # 2. The files.
    reporter.step(f"check the files of {root}")
    with plain_files(source, reporter) as directory:
        paths = [root, *([] if source is None or directory is None else [source.root, directory])]
        checks, described, recipe = _integrity(root, manifest, source, directory, reporter)
        if described is not None and recipe is not None:
            _say_how(root, described, recipe, options, reporter)
        original = None
        if described is not None and has_tokenizer(manifest.files) and described.anatomy.reads == "text":
            if source is not None and directory is not None and has_tokenizer(source.companions):
                original = load_tokenizer(directory)
            said = texts.evaluation if isinstance(texts, Texts) else None
            checks.append(check_tokenizer(root, original, described.eab.prefix_ids, said))
        if source is not None and directory is not None and described is not None and recipe is not None:
            if all(check.passed for check in checks):  # or the source is another, and that has been said
                checks += check_again(described, manifest, recipe, source, directory, options.place, reporter)
        standing = replace(standing, checks=[*checks, *standing.checks])
        if described is None or recipe is None or texts.evaluation is None:
            return _told(standing, paths, date, options, texts, manifest)
        if not all(check.passed for check in standing.checks):
            return _told(standing, paths, date, options, texts, manifest)
        # 3. The models, on text.
        recipe = recipe.of("images" if described.encodes else "text")
        ready = _ready(root, described, recipe, directory, texts, options, reporter)
        found = _measured(root, described, recipe, source, directory, original, ready, options, reporter)
        found = replace(
            standing, judgements=found.judgements, measured=found.measured, said={**standing.said, **found.said}
        )
        return _told(found, paths, date, options, texts, manifest, ready)


def _say_how(root: Path, described: Described, recipe: Recipe, options: VerifyOptions, reporter: Reporter) -> None:
    """Say that the models come layer by layer, where they do. NoSpace where what is to be done needs them whole."""
    asking: list[Any] = [] if options.against is None else [one for one in recipe.changes if one.repeats]
    asking += recipe.verify.gates(compared=options.against is not None) if options.reads else []
    needs = Needs.of(described.anatomy, read_layout(root), torch.float32)
    if options.place.comes_by_layers(root, needs, asking) and (options.reads or options.against):
        reporter.note(f"{root} does not fit into memory, and comes layer by layer")


def require_sound(root: Path, done: str, reporter: Reporter) -> tuple[Manifest, Integrity]:
    """The manifest of a checkpoint that is to be `done` ("pushed"), and what the checks of its files found.

    DamagedCheckpoint where it is not as it was written, OutputError where it failed its gates then.
    """
    integrity = verify(root, reporter=reporter)["integrity"]
    for found in integrity["checks"]:
        if not found["passed"]:
            raise DamagedCheckpoint(f"{root} was not {done}: {found['name']}: {found['detail'].rstrip('.')}.")
    manifest = read_manifest(root)
    if manifest.failed:
        raise OutputError(f"{root} was not {done}: it failed its gates when it was written; convert the source again.")
    if manifest.status != "verified":
        reporter.note(f"{root} is unverified, as {MANIFEST} says: nothing has been measured")
    return manifest, integrity


def _standing(
    root: Path, manifest: Manifest, digest: str | None, key: PublicKey | None, options: VerifyOptions
) -> Findings:  # fmt: skip
    """What vouches for the manifest, what it says of itself, and what is not looked at."""
    held = check_seals(root, digest, key)
    unchecked = [] if options.against else ["whether weights, slots and settings are what the source gives (--against)"]
    unchecked += [] if options.reads else ["what the model predicts (--text, --images or --audio)"]
    said = seals_said(root, manifest, digest, key, held)
    return Findings(
        held, said={**said, "unchecked": unchecked} if unchecked else said,
        required=required_checks(manifest, options.require), notes=seal_notes(root, key),
    )  # fmt: skip


def chunking_of(root: Path, count: int | None = None, length: int | None = None) -> Chunking:
    """How the run that wrote `root` cut its evaluation text, so far as its manifest says; but as given here."""
    try:
        act = read_manifest(root).provenance
    except DamagedCheckpoint:  # which `verify` says
        act = None
    cut = CHUNKS if act is None or act.chunks.evaluation is None else act.chunks.evaluation
    return Chunking(cut.count if count is None else count, (cut.length or CHUNKS.length) if length is None else length)


def _told(
    findings: Findings, paths: Sequence[Path], date: str, options: VerifyOptions, texts: Texts | Pictures,
    manifest: Manifest | None = None, ready: _Ready | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The verdict, with the provenance of this verification; source and recipe are those of the checkpoint."""
    against = [] if options.against is None or os.path.exists(options.against) else [str(options.against)]
    act = provenance(
        date, command=options.command, device=options.device, files=texts.files if ready is None else ready.files,
        hub_ids=against,
        **({} if ready is None else {"evaluation": ready.evaluation, "calibration": ready.calibrating}),
    )  # fmt: skip
    source, recipe = (None, None) if manifest is None else (manifest.source, manifest.recipe)
    return {**names_only(build_verdict(findings), paths), "provenance": told(act, source, recipe)}


def _require_use(options: VerifyOptions) -> None:
    """SourceError for what is given and would not be used."""
    if options.revision is not None and options.against is None:
        raise SourceError(
            f"--revision {options.revision} is that of a hub id given with --against; of the checkpoint it is written "
            f"owner/name@{options.revision}."
        )
    if options.calibration and not options.reads:
        raise SourceError(
            f"--calibration {options.calibration[0]} is for what is measured; give it with --text, --images or --audio."
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
    if isinstance(described, Described) and described.packed is not None:
        described.packed.require_loader(root)
    may_change = None if recipe is None or recipe.changes_weights else ()  # what cannot be read is told, once
    with reporter.bar("hash", sum(entry.bytes for entry in manifest.files.values()), of_bytes=True) as advance:
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
    files: TextFiles


def _ready(
    root: Path, described: Described, recipe: Recipe, directory: Path | None, texts: Texts | Pictures,
    options: VerifyOptions, reporter: Reporter,
) -> _Ready:  # fmt: skip
    """Texts, or files for an encoder, and gates made ready. SourceError where something is missing, or too short."""
    texts = require_port(described.anatomy, texts)
    assert texts.evaluation is not None and texts.calibration is not None
    anatomy, prefix = described.anatomy, described.eab.prefix_ids
    tokenizer = load_tokenizer(root) if anatomy.reads == "text" else None
    reader = _reader(root, anatomy, tokenizer)
    taken = max(len(prefix), *(change.most_positions for change in recipe.changes))  # as `run` cut its text
    chunking = fit_chunks(options.chunking or chunking_of(root), anatomy, taken_by(anatomy, taken))
    gates = recipe.verify.gates(compared=directory is not None)
    sets = max((gate.calibration_sets for gate in gates), default=1)
    if isinstance(texts, Pictures) and isinstance(reader, FileReader):
        reader = reader.over(texts.first(chunking.count, calibrated(chunking, sets)), reporter)
    chunks = reader.cut(texts.evaluation, chunking, f"--{anatomy.reads}")
    for gate in gates:
        gate.require_tools(options.device)
    room = room_after(anatomy, taken)
    ready = require_inputs(gates, Inputs(chunking, options.device, room, options.tasks, classifies(anatomy)))
    calibrating = None
    if any(gate.calibrates for gate in gates):
        calibrating = reader.cut_calibration(texts.calibration, chunking, sets)
    files = texts.files
    if isinstance(texts, Pictures):
        files = texts.read(len(chunks), 0 if calibrating is None else len(calibrating))
    return _Ready(tokenizer, chunks, calibrating, gates, ready, files)


def _reader(root: Path, anatomy: Anatomy, tokenizer: Any) -> Cutter:
    if tokenizer is None:
        return file_reader(root, anatomy)
    return text_reader(anatomy, tokenizer, vocabulary_size(read_layout(root), anatomy))


def _measured(
    root: Path, described: Described, recipe: Recipe, source: Source | None, directory: Path | None, original: Any,
    ready: _Ready, options: VerifyOptions, reporter: Reporter,
) -> Findings:  # fmt: skip
    """What the models are found to be on text, on files whose integrity holds. Their code has been compared.

    `original`: the source's own tokenizer, None where it has none.
    """
    anatomy, tokenizer, prefix = described.anatomy, ready.tokenizer, described.eab.prefix_ids
    own, first = tokenizer if original is None else original, anatomy
    if anatomy.patching is not None and source is not None:  # registers may have been left out
        first = examine_encoder(source.config, anatomy.reads)
    before = no_longer_added(own, prefix) if first.patching is not None else ()
    ports = [port_of(first, ready.evaluation, len(before)), port_of(anatomy, ready.evaluation)]
    found = measure_pair(
        Pair(prefix, recipe, ready.gates, ready.evaluation, ready.calibrating, ready.by_gate, before=before),
        original=None
        if directory is None
        else lambda: (live_original(directory, first, options.place, port=ports[0]), own),
        converted=lambda: (live_converted(root, anatomy, options.place, ports[1]), tokenizer),
        reporter=reporter,
    )
    if not prefix:
        return Findings([], found.judgements, found.measured)
    tokens = {"ids": list(prefix), "tokens": token_texts(tokenizer, prefix)}
    return Findings([], found.judgements, found.measured, said={"prefix": tokens})
