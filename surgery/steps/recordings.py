"""Recordings that verbs are given for an encoder of sound, made ready as images are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..anatomy.patching import Reads
from ..anatomy.sites import Anatomy
from ..live.audio import (
    LONGEST,
    WINDOW,
    cuts_by_itself,
    every_recording,
    load_extractor,
    read_features,
    require_readers,
    seconds_of,
)
from ..live.images import every_image, load_processor
from ..progress import Reporter
from .pictures import FileReader, Pictures, PixelReader, gather_files


@dataclass(frozen=True)
class Recordings(Pictures):
    """The same of sound."""

    kind = "audio"
    called = "recordings"


def gather_audio(audio: Sequence[Path], calibration: Sequence[Path], reporter: Reporter) -> Recordings:
    """The files among files and directories, as `gather_images` has them. SourceError where nothing can read them."""
    require_readers()
    return Recordings(*gather_files(audio, calibration, every_recording, reporter))


@dataclass(frozen=True)
class SoundReader(FileReader):
    """How recordings become what an encoder reads: the checkpoint's own feature extractor, on the first `seconds` of
    each."""

    extractor: Any
    anatomy: Anatomy
    seconds: float = WINDOW
    called = "recordings"

    def over(self, files: Sequence[Path], reporter: Reporter) -> SoundReader:
        """The same for `files`: cut to the length of the shortest, where the extractor gives them no length itself."""
        if cuts_by_itself(self.extractor, self.anatomy):
            return self
        shortest = min((seconds_of(path) for path in files), default=LONGEST)
        seconds = min(math.floor(shortest * 100) / 100, LONGEST)
        reporter.note(f"of each recording the first {seconds:g} seconds are read")
        return replace(self, seconds=seconds)

    def read(self, files: Sequence[Path]) -> torch.Tensor:
        """(N, ...), as the encoder is called with it."""
        return read_features(self.extractor, files, self.anatomy, self.seconds)


def file_reader(root: Path, anatomy: Anatomy) -> FileReader:
    """How files become what the encoder in `root` reads. SourceError where it has no processor or feature extractor."""
    assert anatomy.patching is not None
    if anatomy.patching.is_sound:
        return SoundReader(load_extractor(root), anatomy)
    return PixelReader(load_processor(root), anatomy)


def whole_files(kind: Reads, given: Sequence[Path]) -> Pictures:
    """The files among files and directories, all of them to evaluate on."""
    if kind == "images":
        return Pictures(None, tuple(every_image(given)))
    require_readers()
    return Recordings(None, tuple(every_recording(given)))
