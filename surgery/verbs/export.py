"""`surgery export`: a converted checkpoint as another program takes it, and what it measures there."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, Unpack, cast

import torch

from ..anatomy.parsed import parse_config
from ..anatomy.stored import vocabulary_size
from ..checkpoint.config import CONFIG
from ..checkpoint.contents import may_change
from ..checkpoint.copying import sha256_of
from ..checkpoint.disk import require_target
from ..checkpoint.layout import read_layout
from ..checkpoint.manifest import MANIFEST, Manifest
from ..checkpoint.provenance import moment, name_of, plain
from ..checkpoint.signature import manifest_digest
from ..checkpoint.source import Source, has_tokenizer
from ..checkpoint.stage import Stage
from ..converted.described import read_described
from ..converted.origin import said_in
from ..converted.reading import load_converted
from ..delivery import ENGINES, Engine, Finished
from ..delivery.card import EXPORT, Shown, card, export_json
from ..delivery.reading import Expected, distance, text_log_probabilities
from ..endings.leftovers import clear_for
from ..errors import DamagedCheckpoint, SourceError
from ..live.loading import load_tokenizer, require_device
from ..live.score import Score
from ..progress import SILENT, Reporter
from ..results import Export
from ..steps.act import provenance, told
from ..steps.fetch import fetch_converted, fetch_weights, on_hub
from ..steps.inputs import Reader, Texts, fit_chunks, whole_texts
from ..steps.options import EXPORTING, ExportKeywords, ExportOptions, with_keywords
from ..steps.original import open_original, plain_files
from ..verification.against import kept_tensors, same_source
from ..words import human
from .verify import chunking_of, require_sound

# Keys of config.json that say nothing of what is computed from given weights.
NO_SETTINGS = ("architectures", "_name_or_path", "dtype", "transformers_version")


def export(
    engine: str, checkpoint: Path | str, out: Path | str, options: ExportOptions = EXPORTING,
    reporter: Reporter = SILENT, **keywords: Unpack[ExportKeywords],
) -> Export:  # fmt: skip
    """Write the converted `checkpoint` (a directory or hub id) as `engine` takes it into the new directory `out`.

    Keywords are fields of `options`. With text, `out` is measured in that program, beside `checkpoint`; where the two
    differ by more than rounding, `passed` is False and `out` was not written. Raises SurgeryError for what a person can
    mend, DamagedCheckpoint where the checkpoint is not as it was written.
    """
    chosen = with_keywords("export", options, keywords)
    return cast(Export, _exported(_engine(engine, chosen.engine_python), checkpoint, Path(out), chosen, reporter))


def _exported(
    engine: Engine, checkpoint: Path | str, out: Path, options: ExportOptions, reporter: Reporter
) -> dict[str, Any]:  # fmt: skip
    # 1. Everything that can be refused before a byte is written.
    date = moment()
    require_device(options.device)
    if (options.text or options.engine_python) and (missing := engine.absent()) is not None:
        wanted = "--text measures in it" if options.text else "--engine-python is to try the export in it"
        raise SourceError(f"{engine.title} is not installed here, and {wanted}; {missing}.")
    require_target(out)
    texts = whole_texts(options.text)
    for left in clear_for(out):
        reporter.note(f"removed {left.path} ({human(left.bytes)}), which a run that was killed had left")
    finished, integrity = _finished(engine, checkpoint, options, reporter)
    for root in (finished.root, *([] if finished.original is None else [finished.original.root])):
        require_target(out, root if root.is_dir() else None)
    chunks = _chunks(finished, texts, options)
    engine.refuse(finished)
    act = provenance(
        date, command=options.command, device=options.device, files=texts.files, evaluation=chunks,
        hub_ids=[str(given) for given in (checkpoint, options.original) if given and on_hub(given)],
    )  # fmt: skip
    with Stage(out) as stage:
        # 2. Write, and show what can be shown without text.
        reporter.step(f"write {out.name} for {engine.title}")
        engine.write(finished, stage)
        _require_unchanged(finished, stage)
        proof = engine.prove(finished, stage.path, options.device)
        # 3. Measure both on text.
        measured = {} if chunks is None else _measured(engine, finished, stage.path, chunks, options, reporter)
        gates = measured.pop("gates", [])
        # 4. Card and manifest; then publish, or not.
        shown = Shown(proof, measured, act)
        stage.add_text("README.md", card(engine, finished, said_in(finished.root), name_of(out), shown))
        stage.add_json(EXPORT, export_json(engine, finished, shown, stage.hashes()))
        passed = all(gate["passed"] for gate in gates) if gates else None
        found = {
            "passed": passed, "engine": engine.name, "gates": gates, "integrity": integrity, "proof": proof,
            "files": stage.hashes(), **measured, "provenance": told(act, finished.manifest.source, None),
        }  # fmt: skip
        if passed is not False:
            stage.publish()
    return found


def _engine(name: str, python: Path | None) -> Engine:
    found = next((engine for engine in ENGINES if engine.name == name), None)
    if found is None:
        names = ", ".join(engine.name for engine in ENGINES)
        raise SourceError(f"{name!r} is no engine to export to; there are {names}.")
    return found() if python is None else found().with_python(python)


# ---- 1. what is exported, and for what


def _finished(
    engine: Engine, checkpoint: Path | str, options: ExportOptions, reporter: Reporter
) -> tuple[Finished, Any]:  # fmt: skip
    """The checkpoint, whose integrity has been checked, and what those checks found."""
    root = fetch_converted(checkpoint, reporter)
    if not (root / MANIFEST).is_file():
        raise SourceError(f"{root} has no {MANIFEST}, so nothing says what it was made of; give the output of a run.")
    manifest, integrity = require_sound(root, "exported", reporter)
    at = on_hub(checkpoint)
    name = plain(name_of(root)) if at is None else str(at)
    original = _original(engine, root, manifest, name, options, reporter)
    return Finished(root, name, manifest_digest(root), manifest, read_described(root), original), integrity


def _original(
    engine: Engine, root: Path, manifest: Manifest, name: str, options: ExportOptions, reporter: Reporter
) -> Source | None:  # fmt: skip
    """What it was converted from, if that was given, or is needed; SourceError where it is not that."""
    measures = bool(options.text) and engine.uses_original
    given = options.original
    if given is None:
        if not (measures or engine.needs_original):
            return None
        made_of = manifest.source
        if made_of.get("kind") != "hub" or not made_of.get("revision"):
            raise SourceError(
                f"{name} was made of {made_of.get('spec')!r}, which {engine.title} needs here; give it: --original SRC."
            )
        given = f"{str(made_of['spec']).partition('@')[0]}@{made_of['revision']}"
    source = open_original(str(given), manifest)
    reporter.step(f"hash {source.spec}")
    if source.missing and not measures:  # its weights are on the hub, and stay there
        recorded = manifest.source.get("sha256")
        same = isinstance(recorded, dict) and recorded.get(CONFIG) == sha256_of(source.root / CONFIG)
        why = f"{source.spec}: {CONFIG} is not the file that was converted (SHA-256 differs)"
    else:
        if source.kind == "hub":
            fetch_weights(source, reporter)
        same, why = _same(root, source, manifest)
    if not same:
        raise SourceError(f"{why}; give what {name} was made of, {manifest.source.get('spec')}.")
    return source


def _same(root: Path, source: Source, manifest: Manifest) -> tuple[bool, str]:
    """Whether `source` is what was converted into `root`: by its hashes, else by each tensor and what config.json says.

    So another directory of the same weights will do, as a GGUF's dequantised, and another spelling of settings.
    """
    same, why = same_source(source, manifest)[:2]
    if same or source.kind == "gguf":
        return same, why
    settings = [
        {key: value for key, value in config.to_dict().items() if key not in NO_SETTINGS}
        for config in (parse_config(source.config), read_described(root).anatomy.config)
    ]
    if settings[0] != settings[1]:
        return False, why
    kept, differs = kept_tensors(read_layout(root), manifest, source.layout, False, None)[:2]
    return kept, why if kept else f"{source.spec}: {differs}"


def _chunks(finished: Finished, texts: Texts, options: ExportOptions) -> torch.Tensor | None:
    """Chunks (N, T) to measure on; None where no text was given."""
    if texts.evaluation is None:
        return None
    root, anatomy = finished.root, finished.described.anatomy
    if not has_tokenizer(finished.manifest.files):
        raise SourceError(f"{root} was converted without a tokenizer, and --text needs one; export it without text.")
    reader = Reader(load_tokenizer(root), vocabulary_size(read_layout(root), anatomy))
    chunking = fit_chunks(options.chunking or chunking_of(root), anatomy, finished.described.eab.n_slots)
    return reader.cut(texts.evaluation, chunking, "--text")


def _require_unchanged(finished: Finished, stage: Stage) -> None:
    """DamagedCheckpoint where a file was carried over that has changed since its integrity was checked."""
    for name, file in stage.hashes().items():
        entry, path = finished.manifest.files.get(name), finished.root / name
        if entry is None or may_change(name) or entry.sha256 == file["sha256"]:
            continue
        if path.is_file() and sha256_of(path) == file["sha256"]:
            raise DamagedCheckpoint(f"{path} changed while it was exported; restore it, and run again.")


# ---- 3. on text


def _measured(
    engine: Engine, finished: Finished, directory: Path, chunks: torch.Tensor, options: ExportOptions,
    reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Perplexity of the checkpoint and of its export in `engine`, and how far apart the tokens are at worst."""
    reporter.step(f"measure {finished.name}")
    with reporter.bar("measure", len(chunks)) as advance:
        model = load_converted(finished.root, device=options.device)
        converted = text_log_probabilities(model, chunks, advance)
    del model
    gc.collect()
    with plain_files(finished.original if engine.uses_original else None, reporter) as original:
        reporter.step(f"measure it in {engine.title}")
        with reporter.bar("measure", len(chunks)) as advance:
            exported = engine.log_probabilities(finished, directory, original, chunks, options.device, advance)
    if exported.shape != converted.shape:
        raise RuntimeError(f"{engine.title} gave {tuple(exported.shape)} log-probabilities, not {converted.shape}")
    apart = distance(exported, Expected(converted), engine, finished)
    delta = (exported.double() - converted.double()).abs()
    gate = {"name": apart.name, "passed": apart.close, "value": apart.value, "limit": apart.limit}
    return {
        "gates": [gate], "perplexity": {"converted": _score(converted), "exported": _score(exported)},
        "delta_log_probability": delta.max().item(), "mean_delta_log_probability": delta.mean().item(),
        "chunks": chunks.shape[0], "chunk_length": chunks.shape[1],
    }  # fmt: skip


def _score(found: torch.Tensor) -> dict[str, Any]:
    """The score of log-probabilities (N, T - 1)."""
    return Score(tuple((-found.double()).sum(dim=1).tolist()), found.shape[1]).to_dict()
