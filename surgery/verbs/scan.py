"""`surgery scan`: massive activations and attention sinks of a checkpoint, layer by layer."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from ..anatomy.sites import Anatomy, examine
from ..anatomy.stored import vocabulary_size
from ..checkpoint.disk import require_space
from ..checkpoint.layout import read_layout
from ..checkpoint.source import materialise, open_source, refuse_adapter
from ..converted.described import read_described
from ..converted.reading import is_converted, load_converted
from ..errors import DamagedCheckpoint, SourceError
from ..live.loading import load_original, load_tokenizer, require_device
from ..live.model import Live
from ..live.text import FEW_CHUNKS, Chunking, Files, files, read_texts
from ..progress import SILENT, Reporter
from ..results import Survey
from ..steps.inputs import Reader, fit_chunks
from ..steps.plan import source_tokenizer
from ..survey.full import survey
from ..survey.interventions import audit, plan_interventions, run_interventions


def scan(
    source: Path | str,
    *,
    text: Files,
    interventions: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    chunking: Chunking = FEW_CHUNKS,
    reporter: Reporter = SILENT,
) -> Survey:
    """Survey `source` (a directory, hub id, GGUF, or converted checkpoint) on `text`: layer by layer, and across them.

    Layer 0 is the embedding output and has no attention; layer k carries the attention of block k - 1, which writes it.
    With `interventions`, the live model is also changed in the ways that its survey suggests, and measured each time.
    """
    if not (text := files(text)):
        raise SourceError("a scan needs text to read: give --text FILE.")
    require_device(device)
    words = read_texts(text)
    reporter.step(f"load {source}")
    with _opened(str(source), dtype, revision) as opened:
        fitting = fit_chunks(chunking, opened.anatomy, opened.n_slots)
        chunks = opened.reader.cut(words, fitting, "--text")
        live = Live(opened.load(device), opened.anatomy)
        with reporter.bar("scan", len(chunks)) as advance:
            found = survey(live, opened.reader.tokenizer, chunks, advance=advance)
        if not math.isfinite(found["perplexity"]["nll"]):
            raise DamagedCheckpoint(
                f"{source}: what it predicts is not finite, so there is nothing to survey; check its weights (download "
                "them again), or load it in float32 if it is in half precision."
            )
        found = {"source": str(source), **found}
        if interventions:
            reporter.step("intervene")
            planned = plan_interventions(live, chunks.shape[1], found)
            with reporter.bar("intervene", planned.passes * len(chunks)) as advance:
                found["interventions"] = run_interventions(live, chunks, planned, advance)
            reporter.step("audit: how few scalars hold the model up")
            with reporter.bar("audit", None) as advance:
                found["audit"] = audit(live, chunks, found, advance=advance)
        return cast(Survey, found)


@dataclass(frozen=True)
class _Opened:
    """Everything about a checkpoint that can be refused before its weights are read, and how to read them."""

    anatomy: Anatomy
    reader: Reader
    n_slots: int
    load: Callable[[str], PreTrainedModel]  # of the device


@contextlib.contextmanager
def _opened(source: str, dtype: str | None, revision: str | None) -> Iterator[_Opened]:
    root = Path(source)
    if is_converted(root):
        if dtype is not None or revision is not None:
            raise SourceError(f"{root} is a converted checkpoint on this disk; leave out --dtype and --revision.")
        yield _converted(root)
        return
    opened = open_source(source, revision=revision, dtype=dtype)
    anatomy = examine(opened.config, opened.blank)
    vocab_size = vocabulary_size(opened.layout, anatomy)
    with tempfile.TemporaryDirectory(prefix="surgery-scan-") as scratch:
        if opened.kind == "gguf":
            require_space(Path(scratch), opened.layout.total_bytes)
        tokenizer = source_tokenizer(opened)

        def load(device: str) -> PreTrainedModel:
            return load_original(materialise(opened, Path(scratch) / "model"), device=device)

        yield _Opened(anatomy, Reader(tokenizer, vocab_size), 0, load)


def _converted(root: Path) -> _Opened:
    described = read_described(root)
    refuse_adapter(root)
    vocab_size = vocabulary_size(read_layout(root), described.anatomy)
    return _Opened(
        described.anatomy,
        Reader(load_tokenizer(root), vocab_size),
        described.eab.n_slots,
        lambda device: load_converted(root, device=device),
    )
