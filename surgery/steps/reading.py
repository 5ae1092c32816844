"""The source while a run is at work on it: of one content from its opening to the last file written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..checkpoint.source import Source
from ..checkpoint.witness import Reading, begin_reading
from ..errors import DamagedCheckpoint, SourceError
from ..progress import Reporter
from ..verification.checks import Check
from .fetch import fetch_weights


@contextlib.contextmanager
def reading_of(source: Source, reporter: Reporter) -> Iterator[Reading]:
    """Hash the source's files, before a weight is loaded; whatever then goes wrong within the block is its doing, if it
    has changed meanwhile (DamagedCheckpoint). SourceError for a file that cannot be read."""
    if source.kind == "hub":
        fetch_weights(source, reporter)
    reporter.step(f"hash {source.spec}")
    try:
        total = source.root.stat().st_size if source.kind == "gguf" else sum(source.layout.sizes.values())
        with reporter.bar("hash", total, of_bytes=True) as advance:
            reading = begin_reading(source, advance)
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be read ({error.strerror}); check the source.") from error
    try:
        yield reading
    except Exception as error:
        if (changed := reading.changed()) is not None:
            raise DamagedCheckpoint(f"{changed}; run again.") from error
        raise


def check_reading(reading: Reading) -> Check:
    """Whether what was read at the beginning, copied and recorded is what is there now."""
    if (changed := reading.changed()) is not None:
        return Check("source as read", False, f"{changed}; run again")
    return Check("source as read", True, f"{len(reading.hashes)} files of the source, unchanged while they were read")
