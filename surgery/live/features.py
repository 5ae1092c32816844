"""What an encoder makes of images, sound or text, in the end: features, and how alike those of two models are.

What is said of images and patches here holds for recordings and frames, and for texts and tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .model import Live
from .places import final_norm
from .port import Batch, Images
from .stream import Observer


def features_of(port: Images, states: torch.Tensor) -> list[torch.Tensor]:
    """What of `states` (B, T, d) is features: what stands for the whole image, (B, 1, d), if anything does
    (`Images.whole`), and the patches, (B, P, d).

    Registers, and what else is in front of the patches, may have been left out.
    """
    patches = states[:, -port.grid[0] * port.grid[1] :]
    if port.whole == "last":
        return [patches[:, -1:], patches[:, :-1]]
    return [states[:, :1], patches] if port.whole else [patches]


class Features(Observer):
    """Of each image, after the last norm: what stands for all of it, if anything does, and the patches, (1 + P, d) or
    (P, d), on the CPU.

    Registers and other special tokens are left out: models are compared that differ in them.
    """

    def __init__(self, live: Live) -> None:
        assert isinstance(live.port, Images)
        self.last, self.called = len(live.anatomy.blocks), live.port.called
        self.norm: Callable[[torch.Tensor], torch.Tensor] | None = final_norm(live)
        self.port, self.whole = live.port, live.port.whole
        self.found: list[torch.Tensor] = []

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        if layer == self.last:
            kept = torch.cat(features_of(self.port, states), dim=1)
            self.found.extend((kept if self.norm is None else self.norm(kept)).float().cpu())

    def __getstate__(self) -> dict:  # without the model
        return {**vars(self), "norm": None}

    @property
    def finite(self) -> bool:
        return all(bool(image.isfinite().all()) for image in self.found)

    @property
    def of_image(self) -> torch.Tensor:
        """(N, d): what stands for the whole image, or the mean patch where nothing does."""
        return torch.stack([image[0] if self.whole else image.mean(dim=0) for image in self.found])

    def alike(self, other: Features) -> tuple[list[float] | None, list[float]]:
        """The cosine of what stands for each image to that of `other` (None without), and the mean one of its patches.

        ValueError unless both are of the same images.
        """
        if len(self.found) != len(other.found) or self.whole != other.whole:
            raise ValueError("features can be compared of the same images only")
        pairs = zip(self.found, other.found, strict=True)
        rows = [F.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in pairs]
        first = int(self.whole is not None)
        return [row[0].item() for row in rows] if first else None, [row[first:].mean().item() for row in rows]

    def distance(self, other: Features) -> float:
        """1 less the mean cosine to `other` of the same images, of which what stands for all of one, where anything
        does, and the patches are half each. Not a number where a feature is none."""
        parts = [statistics.fmean(part) for part in self.alike(other) if part is not None]
        return 1.0 - statistics.fmean(parts)


def nearest(features: torch.Tensor) -> torch.Tensor:
    """features (N, d) -> of each image the number of the other image that is nearest by cosine, (N,)."""
    unit = F.normalize(features.double(), dim=-1)
    alike = unit @ unit.T
    return alike.fill_diagonal_(-torch.inf).argmax(dim=1)
