"""`surgery verify`: check a converted checkpoint, alone or against its source. What a CI job of a stranger calls."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..anatomy.sites import Anatomy
from ..checkpoint.layout import read_json
from ..checkpoint.manifest import read_manifest
from ..checkpoint.source import Source, materialise, open_source
from ..checkpoint.stage import require_space
from ..errors import DamagedCheckpoint, SourceError
from ..loading import load_original, load_tokenizer
from ..recipe import Recipe
from ..reporting import Reporter
from ..verification.converted import converted_anatomy, load_converted
from ..verification.gates import quality_gates
from ..verification.integrity import Check, check_integrity
from ..verification.measure import Measurement, Original, measure, measure_original
from ..verification.text import Chunking, chunk, read_texts, tokenize
from ..verification.tokens import check_tokenizer
from ..verification.verdict import Findings, build_verdict
from .inputs import fit_chunks, has_tokenizer

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def verify(
    checkpoint: Path | str,
    *,
    against: str | None = None,
    text: Sequence[Path] = (),
    revision: str | None = None,
    device: str = "cpu",
    chunking: Chunking = Chunking(),
    reporter: Reporter = Reporter(),
) -> dict:
    """Check the converted `checkpoint` and return the verdict.

    Alone: integrity of files, tensors, slots, code, tokenizer. With `text`: also perplexity and massive activations of the
    converted model. With `against` (its source): also every kept tensor, and with both, all gates of its recipe.
    Python files in the checkpoint are run only if they are exactly what this version writes.
    """
    root = Path(checkpoint)
    if not root.is_dir():
        raise SourceError(f"{root}: is not a directory; give the output of a run")
    manifest = read_manifest(root)
    words = read_texts(text) if text else None
    source = _open_source(against, revision, manifest) if against is not None else None
    reporter.step(f"check the files of {root}")
    with _plain_files(source, root, reporter) as directory:
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        with reporter.bar("hash", size) as advance:
            checks = check_integrity(root, manifest, source, directory, lambda done: advance(done, "hash"))
        original = load_tokenizer(directory) if source is not None and has_tokenizer(source) else None
        prefix = _prefix(root)
        if any(name.startswith("tokenizer") for name in manifest["files"]):
            checks.append(check_tokenizer(root, original, prefix, words))
        if words is None or not all(check.passed for check in checks):
            return build_verdict(Findings(checks, []))
        return _measured(root, manifest, checks, source, directory, prefix, words, chunking, device, reporter)


def _measured(
    root: Path, manifest: dict, checks: list[Check], source: Source | None, directory: Path | None, prefix, words: str, chunking, device, reporter
) -> dict:
    """The verdict with perplexity and massive activations, on files whose integrity holds."""
    anatomy = converted_anatomy(root)
    tokenizer = load_tokenizer(root)
    chunks = chunk(tokenize(tokenizer, words), fit_chunks(chunking, anatomy, len(prefix)), "--text")
    original = _original(anatomy, directory, tokenizer, chunks, prefix, device, reporter) if source is not None else None
    converted = _converted(root, anatomy, chunks, device, reporter)
    gates = quality_gates(Recipe.model_validate(manifest["recipe"]).verify, original, converted)
    tokens = {"ids": prefix, "tokens": [tokenizer.decode([token]) for token in prefix]}
    return build_verdict(Findings(checks, gates, original, converted, prefix=tokens), tokenizer)


def _original(anatomy: Anatomy, directory: Path, tokenizer, chunks, prefix, device: str, reporter: Reporter) -> Original:
    reporter.step("measure the original")
    model = load_original(directory, device=device)
    passes = 2 if tokenizer.bos_token_id is None or tuple(prefix) == (tokenizer.bos_token_id,) else 3
    with reporter.bar("original", passes * len(chunks)) as advance:
        original = measure_original(model, anatomy, chunks, prefix, tokenizer.bos_token_id, lambda what, done: advance(done, what))
    del model
    gc.collect()
    return original


def _converted(root: Path, anatomy: Anatomy, chunks, device: str, reporter: Reporter) -> Measurement:
    reporter.step("measure the converted model")
    model = load_converted(root, code_is_ours=True, device=device)  # the integrity check has compared the code
    with reporter.bar("converted", len(chunks)) as advance:
        return measure(model, anatomy, chunks, "converted", lambda what, done: advance(done, what), massive=True)


def _open_source(against: str, revision: str | None, manifest: dict) -> Source:
    dtype = DTYPES.get(manifest["source"].get("dtype")) if str(against).endswith(".gguf") else None
    return open_source(str(against), revision=revision, dtype=dtype)


@contextlib.contextmanager
def _plain_files(source: Source | None, root: Path, reporter: Reporter) -> Iterator[Path | None]:
    """The source as a directory of plain files; a GGUF is dequantised beside the checkpoint for the time of the check."""
    if source is None or source.kind != "gguf":
        yield source.root if source is not None else None
        return
    with tempfile.TemporaryDirectory(prefix="surgery-source-") as scratch:
        require_space(Path(scratch), source.layout.total_bytes)
        reporter.step(f"dequantise {source.root.name}")
        yield materialise(source, Path(scratch) / "model")


def _prefix(root: Path) -> list[int]:
    eab = read_json(root / "config.json").get("eab")
    ids = eab.get("prefix_ids") if isinstance(eab, dict) else None
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise DamagedCheckpoint(f"{root / 'config.json'}: eab.prefix_ids is missing or no list of token ids; convert the source again")
    return ids
