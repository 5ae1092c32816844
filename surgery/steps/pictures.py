"""Images that verbs are given for an encoder, made ready as texts are for a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..anatomy.sites import Anatomy
from ..checkpoint.provenance import TextFiles, described
from ..errors import SourceError
from ..live.images import every_image, read_pixels
from ..live.text import Chunking
from ..progress import Reporter
from .inputs import CALIBRATION_CHUNKS


@dataclass(frozen=True)
class Pictures:
    """Files of images to take means, scales and tune on, and others to evaluate on; None where none were given."""

    calibration: tuple[Path, ...] | None
    evaluation: tuple[Path, ...] | None
    split: bool = False

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


def gather_images(images: Sequence[Path], calibration: Sequence[Path], reporter: Reporter) -> Pictures:
    """The files among files and directories. Given only some to evaluate on, every other one is to calibrate on."""
    evaluation = tuple(every_image(images)) if images else None
    if calibration:
        fitted = tuple(every_image(calibration))
        if both := {path.resolve() for path in fitted} & {path.resolve() for path in evaluation or ()}:
            reporter.note(f"{min(both)} is to evaluate and to calibrate on: figures are then on what was fitted to")
        return Pictures(fitted, evaluation)
    if evaluation is None:
        return Pictures(None, None)
    return Pictures(evaluation[::2], evaluation[1::2], split=True)


@dataclass(frozen=True)
class PixelReader:
    """How images become pixels: the checkpoint's own processor, for the encoder of this anatomy."""

    processor: Any
    anatomy: Anatomy

    def cut(self, images: Sequence[Path], chunking: Chunking, name: str) -> torch.Tensor:
        """Pixels (N, C, H, W) of the first `chunking.count` images; SourceError where there are fewer."""
        if len(images) < chunking.count:
            raise SourceError(
                f"{name} gives {len(images)} images, and {chunking.count} are to be read; give more, or ask for fewer "
                "(--chunks)."
            )
        return read_pixels(self.processor, images[: chunking.count], self.anatomy)

    def cut_calibration(self, images: Sequence[Path], chunking: Chunking, sets: int = 1) -> torch.Tensor:
        """Pixels (M, C, H, W) to take means, scales and tune on, as many as are evaluated on and no more than 32.

        `sets`: so many times as many, for gates that calibrate several times.
        """
        wanted = Chunking(sets * min(CALIBRATION_CHUNKS, chunking.count), chunking.length)
        return self.cut(images, wanted, "--calibration")
