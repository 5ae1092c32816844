"""What a converted checkpoint was made of, by the path or id that somebody gives for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.manifest import Manifest
from ..checkpoint.source import Source, materialise, open_source
from ..endings.signals import caught
from ..endings.temporary import temporary
from ..progress import Reporter
from .fetch import fetch_weights

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def open_original(spec: str, manifest: Manifest, revision: str | None = None) -> Source:
    """The source `spec`, opened as the run that wrote `manifest` opened it: a GGUF in the dtype that it chose."""
    found = manifest.source.get("dtype")
    dtype = DTYPES.get(found) if isinstance(found, str) and spec.endswith(".gguf") else None
    return open_source(spec, revision=revision, dtype=dtype)


@contextlib.contextmanager
def plain_files(source: Source | None, reporter: Reporter) -> Iterator[Path | None]:
    """The source as a directory of plain files, None for none; a GGUF is dequantised for the time of the block."""
    if source is None or source.kind != "gguf":
        yield fetch_weights(source, reporter) if source is not None else None
        return
    with caught(), temporary(source.layout.total_bytes) as scratch:
        reporter.step(f"dequantise {source.root.name}")
        yield materialise(source, scratch)
