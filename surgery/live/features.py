"""What an encoder makes of images or sound, in the end: features, and how alike those of two models are.

What is said of images and patches here holds for recordings and frames.
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


def parts_of(port: Images) -> tuple[int, int]:
    """How many of an image's first tokens are CLS, 0 or 1, and how many of its last are patches: what stands between is
    no feature, and may have been left out."""
    return port.cls, port.grid[0] * port.grid[1]


class Features(Observer):
    """Of each image, after the last norm: CLS, if there is one, and the patches, (1 + P, d) or (P, d), on the CPU.

    Registers and other special tokens are left out: models are compared that differ in them.
    """

    def __init__(self, live: Live) -> None:
        assert isinstance(live.port, Images)
        self.last, self.called = len(live.anatomy.blocks), live.port.called
        self.norm: Callable[[torch.Tensor], torch.Tensor] | None = final_norm(live)
        self.cls, self.patches = parts_of(live.port)
        self.found: list[torch.Tensor] = []

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        if layer == self.last:
            kept = torch.cat([states[:, : self.cls], states[:, -self.patches :]], dim=1)
            self.found.extend((kept if self.norm is None else self.norm(kept)).float().cpu())

    def __getstate__(self) -> dict:  # without the model
        return {**vars(self), "norm": None}

    @property
    def finite(self) -> bool:
        return all(bool(image.isfinite().all()) for image in self.found)

    @property
    def of_image(self) -> torch.Tensor:
        """(N, d): what stands for the whole image, CLS, or the mean patch where there is none."""
        return torch.stack([image[0] if self.cls else image.mean(dim=0) for image in self.found])

    def alike(self, other: Features) -> tuple[list[float] | None, list[float]]:
        """The cosine of each image's CLS to that of `other` (None without one), and the mean cosine of its patches.

        ValueError unless both are of the same images.
        """
        if len(self.found) != len(other.found) or self.cls != other.cls:
            raise ValueError("features can be compared of the same images only")
        pairs = zip(self.found, other.found, strict=True)
        rows = [F.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in pairs]
        return [row[0].item() for row in rows] if self.cls else None, [row[self.cls :].mean().item() for row in rows]

    def distance(self, other: Features) -> float:
        """1 less the mean cosine to `other` of the same images, of which CLS, where there is one, and the patches are
        half each. Not a number where a feature is none."""
        parts = [statistics.fmean(part) for part in self.alike(other) if part is not None]
        return 1.0 - statistics.fmean(parts)


def nearest(features: torch.Tensor) -> torch.Tensor:
    """features (N, d) -> of each image the number of the other image that is nearest by cosine, (N,)."""
    unit = F.normalize(features.double(), dim=-1)
    alike = unit @ unit.T
    return alike.fill_diagonal_(-torch.inf).argmax(dim=1)
