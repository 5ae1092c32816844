"""Images that verbs are given for an encoder, made ready as texts are for a language model."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from ..anatomy.patching import Reads
from ..anatomy.sites import Anatomy
from ..checkpoint.provenance import TextFiles, described
from ..errors import SourceError
from ..live.images import every_image, read_pixels
from ..live.text import Chunking
from ..progress import Reporter
from .inputs import calibrated


@dataclass(frozen=True)
class Pictures:
    """Files of images to take means, scales and tune on, and others to evaluate on; None where none were given."""

    calibration: tuple[Path, ...] | None
    evaluation: tuple[Path, ...] | None
    split: bool = False
    kind: ClassVar[Reads] = "images"
    called: ClassVar[str] = "images"

    @property
    def option(self) -> str:
        return f"--{self.kind}"

    @property
    def files(self) -> TextFiles:
        """What is told of those that were given, before any was read: nothing."""
        return TextFiles()

    def read(self, evaluated: int, calibrated: int) -> TextFiles:
        """Those that were read, so many of each."""
        return TextFiles(
            evaluation=described((self.evaluation or ())[:evaluated]),
            calibration=described((self.calibration or ())[:calibrated]), split=self.split,
        )  # fmt: skip

    def first(self, evaluated: int, calibrated: int) -> tuple[Path, ...]:
        """The first so many of each."""
        return (*(self.evaluation or ())[:evaluated], *(self.calibration or ())[:calibrated])


Gathered = tuple[tuple[Path, ...] | None, tuple[Path, ...] | None, bool]  # to calibrate on, to evaluate on, split


def gather_images(images: Sequence[Path], calibration: Sequence[Path], reporter: Reporter) -> Pictures:
    """The files among files and directories. Given only some to evaluate on, every other one is to calibrate on."""
    return Pictures(*gather_files(images, calibration, every_image, reporter))


def gather_files(
    given: Sequence[Path], calibration: Sequence[Path], every: Callable[[Sequence[Path]], list[Path]],
    reporter: Reporter,
) -> Gathered:  # fmt: skip
    evaluation = tuple(every(given)) if given else None
    if calibration:
        fitted = tuple(every(calibration))
        if both := {path.resolve() for path in fitted} & {path.resolve() for path in evaluation or ()}:
            reporter.note(f"{min(both)} is to evaluate and to calibrate on: figures are then on what was fitted to")
        return fitted, evaluation, False
    if evaluation is None:
        return None, None, False
    return evaluation[::2], evaluation[1::2], True


class FileReader(abc.ABC):
    """How files become what an encoder reads. `called`: what they are."""

    called: ClassVar[str]

    @abc.abstractmethod
    def read(self, files: Sequence[Path]) -> torch.Tensor:
        """(N, ...) of the files. SourceError for one that cannot be read."""

    def over(self, files: Sequence[Path], reporter: Reporter) -> Self:
        """The reader for just `files`, which are all that will be read."""
        return self

    def cut(self, files: Sequence[Path], chunking: Chunking, name: str) -> torch.Tensor:
        """(N, ...) of the first `chunking.count` files; SourceError where there are fewer."""
        if len(files) < chunking.count:
            raise SourceError(
                f"{name} gives {len(files)} {self.called}, and {chunking.count} are to be read; give more, or ask for "
                "fewer (--chunks)."
            )
        return self.read(files[: chunking.count])

    def cut_calibration(self, files: Sequence[Path], chunking: Chunking, sets: int = 1) -> torch.Tensor:
        """(M, ...) to take means, scales and tune on, as many as are evaluated on and no more than 32.

        `sets`: so many times as many, for gates that calibrate several times.
        """
        return self.cut(files, Chunking(calibrated(chunking, sets), chunking.length), "--calibration")


@dataclass(frozen=True)
class PixelReader(FileReader):
    """How images become pixels (N, C, H, W): the checkpoint's own processor, for the encoder of this anatomy."""

    processor: Any
    anatomy: Anatomy
    called = "images"

    def read(self, files: Sequence[Path]) -> torch.Tensor:
        return read_pixels(self.processor, files, self.anatomy)
