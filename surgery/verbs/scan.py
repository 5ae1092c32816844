"""`surgery scan`: massive activations and attention sinks of a checkpoint, layer by layer."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..anatomy.sites import Anatomy, examine
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.source import materialise, open_source
from ..checkpoint.stage import require_space
from ..errors import SourceError
from ..loading import load_original, load_tokenizer
from ..reporting import Reporter
from ..survey.likelihood import Likelihood
from ..survey.massive import MassiveActivations
from ..survey.sinks import SinkScores
from ..survey.stream import stream
from ..verification.converted import converted_anatomy, load_converted
from ..verification.integrity import code_is_ours
from ..verification.perplexity import Score
from ..verification.text import Chunking, chunk, read_texts, tokenize
from .inputs import fit_chunks


def scan(
    source: str,
    *,
    text: Sequence[Path],
    dtype: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    chunking: Chunking = Chunking(8),
    reporter: Reporter = Reporter(),
) -> dict:
    """Survey `source` (a directory, hub id, GGUF, or converted checkpoint) on `text`: one entry per layer.

    Layer 0 is the embedding output and has no attention; layer k carries the sink scores of block k - 1, which writes to it.
    """
    if not text:
        raise SourceError("a scan needs text to read: give --text FILE")
    words = read_texts(text)
    reporter.step(f"load {source}")
    with _opened(str(source), dtype, revision, device) as (model, anatomy, tokenizer):
        n_slots = model.get_submodule(anatomy.trunk).config.eab["n_slots"] if hasattr(model.config, "eab") else 0
        chunking = fit_chunks(chunking, anatomy, n_slots)
        chunks = chunk(tokenize(tokenizer, words), chunking, "--text")
        massive, sinks, likelihood = MassiveActivations(), SinkScores(), Likelihood()
        with reporter.bar("scan", len(chunks)) as advance:
            stream(model, anatomy, chunks, [massive, sinks, likelihood], progress=lambda done: advance(done, "scan"))
        return _survey(str(source), anatomy, tokenizer, massive, sinks, likelihood, chunking)


def _survey(source: str, anatomy: Anatomy, tokenizer, massive, sinks, likelihood, chunking: Chunking) -> dict:
    attention = sinks.rows()
    nothing = {"sink_score": None, "slot_score": None, "sink_rate": None}
    layers = []
    for row in massive.rows():
        for entry in row["massive"]:
            entry["token"] = tokenizer.decode([entry["token"]])
        layers.append({**row, **attention.get(row["layer"] - 1, nothing)})
    return {
        "source": source,
        "model_type": anatomy.model_type,
        "chunks": chunking.count,
        "chunk_length": chunking.length,
        "perplexity": Score(tuple(likelihood.nll), likelihood.targets).to_dict(),
        "massive_activations": massive.summary(),
        "layers": layers,
    }


@contextlib.contextmanager
def _opened(source: str, dtype: str | None, revision: str | None, device: str) -> Iterator[tuple]:
    """(model, anatomy, tokenizer) of a source or of a converted checkpoint."""
    root = Path(source)
    if root.is_dir() and (root / MANIFEST).exists():
        yield load_converted(root, code_is_ours(root), device=device), converted_anatomy(root), load_tokenizer(root)
        return
    opened = open_source(source, revision=revision, dtype=dtype)
    anatomy = examine(opened.config)
    with tempfile.TemporaryDirectory(prefix="surgery-scan-") as scratch:
        if opened.kind == "gguf":
            require_space(Path(scratch), opened.layout.total_bytes)
        directory = materialise(opened, Path(scratch) / "model")
        yield load_original(directory, device=device), anatomy, load_tokenizer(directory)
