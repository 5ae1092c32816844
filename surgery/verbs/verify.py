"""`surgery verify`: check a converted checkpoint, alone or against its source. What a CI job of a stranger calls."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from ..checkpoint.disk import require_space
from ..checkpoint.layout import read_layout
from ..checkpoint.manifest import MANIFEST, read_manifest
from ..checkpoint.source import Source, has_tokenizer, materialise, open_source
from ..converted.reading import converted_anatomy, load_converted, read_config, require_converted
from ..errors import DamagedCheckpoint, SourceError
from ..live.loading import load_original, load_tokenizer, require_device
from ..live.text import CHUNKS, Chunking
from ..progress import Reporter
from ..recipe import Recipe, Verify
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
    vocabulary_size,
)
from ..steps.measuring import Measuring
from ..verification.gates.judge import is_exact, quality_gates
from ..verification.gates.measure import Original
from ..verification.integrity import Check, check_integrity
from ..verification.tokens import check_tokenizer
from ..verification.verdict import Findings, build_verdict

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def verify(
    checkpoint: Path | str,
    *,
    against: str | None = None,
    text: Sequence[Path] = (),
    calibration: Sequence[Path] = (),
    tasks: Path | None = None,
    revision: str | None = None,
    device: str = "cpu",
    chunking: Chunking = CHUNKS,
    reporter: Reporter = SILENT,
) -> dict:
    """Check the converted `checkpoint` and return the verdict.

    Alone: integrity of files, tensors, slots, code, tokenizer. With `text`: also perplexity and massive activations of
    the converted model. With `against` (its source): also every kept tensor, and with both, all gates of its recipe.
    Text is cut as `run` cuts it: without `calibration`, from which static scales are taken, its first half is for that
    and its second half is measured on.
    Python files in the checkpoint are compared with what this version writes, and never run.
    """
    root = Path(checkpoint)
    require_device(device)
    _require_use(against, text, calibration, tasks, revision)
    texts = gather_texts(text, calibration, reporter)
    words = texts.evaluation
    require_converted(root)
    try:
        manifest = read_manifest(root)
    except DamagedCheckpoint as error:  # a verdict all the same: CI servers read it from files
        return build_verdict(Findings([Check("manifest", False, str(error))], []))
    if words is not None and not has_tokenizer(manifest["files"]):
        raise SourceError(f"{root} was converted without a tokenizer, and --text needs one; verify it without text.")
    if (manifest["verdict"] or {}).get("passed") is False:
        reporter.note(f"{root} was kept though it failed when it was written, as {MANIFEST} says")
    source = _open_source(against, revision, manifest) if against is not None else None
    reporter.step(f"check the files of {root}")
    with _plain_files(source, reporter) as directory:
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        with reporter.bar("hash", size) as advance:
            checks = check_integrity(root, manifest, source, directory, lambda done: advance(done, "hash"))
        if _passed(checks, "config") and has_tokenizer(manifest["files"]):
            original = load_tokenizer(directory) if source is not None and has_tokenizer(source.companions) else None
            checks.append(check_tokenizer(root, original, read_config(root)["eab"]["prefix_ids"], words))
        if words is None or not all(check.passed for check in checks):
            return build_verdict(Findings(checks, []))
        return _measured(root, manifest, checks, source, directory, texts, tasks, chunking, device, reporter)


def _require_use(
    against: str | None,
    text: Sequence[Path],
    calibration: Sequence[Path],
    tasks: Path | None,
    revision: str | None,
) -> None:
    """SourceError for what is given and would not be used."""
    if revision is not None and against is None:
        raise SourceError(f"--revision {revision} is that of a hub id; give it with --against.")
    if calibration and not text:
        raise SourceError(f"--calibration {calibration[0]} is for what is measured on text; give it with --text.")
    if tasks is not None and not (text and against is not None):
        raise SourceError(f"--tasks {tasks} is for gates of the recipe; give it with --against and --text.")


def _passed(checks: list[Check], name: str) -> bool:
    return any(check.passed for check in checks if check.name == name)


def _measured(
    root: Path,
    manifest: dict,
    checks: list[Check],
    source: Source | None,
    directory: Path | None,
    texts: Texts,
    tasks: Path | None,
    chunking,
    device,
    reporter,
) -> dict:
    """The verdict with perplexity and massive activations, on files whose integrity holds."""
    anatomy = converted_anatomy(root)
    tokenizer = load_tokenizer(root)
    config, recipe = read_config(root), _recipe(root, manifest)
    prefix = config["eab"]["prefix_ids"]
    n_slots = max(len(prefix), recipe.attention_bias.max_slots) if recipe.searches else len(prefix)  # as `run` cut
    fitting = fit_chunks(chunking, anatomy, max(n_slots, 1))
    vocab_size = vocabulary_size(read_layout(root), config)
    chunks, calibrating = cut(tokenizer, texts.evaluation, fitting, vocab_size, "--text"), None
    gates = recipe.verify if source is not None else Verify()  # what is compared needs both
    require_length(gates, fitting)
    require_tools(gates, device)
    harness = gather_tasks(gates, tasks, room_behind(anatomy, n_slots))
    if calibrates(gates):
        calibrating = cut_calibration(tokenizer, texts.calibration, fitting, vocab_size)
    measuring = Measuring(anatomy, chunks, calibrating, gates, reporter, harness)
    original = _original(measuring, directory, tokenizer, prefix, device) if source is not None else None
    # The integrity check has compared the code.
    model = load_converted(root, device=device)
    converted = measuring.converted(model, tokenizer)
    exact = is_exact(recipe, model.config, chunks.shape[1], len(prefix))
    gates = quality_gates(recipe, original, converted, exact)
    tokens = {"ids": prefix, "tokens": [tokenizer.decode([token]) for token in prefix]} if prefix else None
    return build_verdict(Findings(checks, gates, original, converted, prefix=tokens), tokenizer)


def _original(measuring: Measuring, directory: Path, tokenizer, prefix, device: str) -> Original:
    model = load_original(directory, device=device)
    own = load_tokenizer(directory) if has_tokenizer(path.name for path in directory.iterdir()) else tokenizer
    found = measuring.original(model, prefix, own)
    del model
    gc.collect()
    return found


def _open_source(against: str, revision: str | None, manifest: dict) -> Source:
    found = manifest["source"].get("dtype")
    dtype = DTYPES.get(found) if isinstance(found, str) and str(against).endswith(".gguf") else None
    return open_source(str(against), revision=revision, dtype=dtype)


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


def _recipe(root: Path, manifest: dict) -> Recipe:
    try:
        return Recipe.model_validate(manifest["recipe"])
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DamagedCheckpoint(
            f"{root / MANIFEST}: its recipe does not parse (at {where or 'its top'}), so there are no gates; "
            "convert the source again."
        ) from error
