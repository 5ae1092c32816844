"""What training reads: sequences, or images, to train on, in an order that seed and step alone decide; and others that
are held out."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import SourceError
from ..recipe.training import Training

SCALED = 32  # sequences of the training text, or images, that static scales come from


@dataclass(frozen=True)
class Corpus:
    """training (N, T), held_out (K, L) to judge on, scaling (M, L), some of the former, for static scales.

    Token ids of sequences; or pixels of images, (N, C, H, W), (K, C, H, W) and (M, C, H, W).
    """

    training: torch.Tensor
    held_out: torch.Tensor
    scaling: torch.Tensor
    seed: int

    def batch(self, step: int, size: int) -> torch.Tensor:
        """The `size` sequences, or images, of optimiser step `step` (0, 1, ...): each epoch all of them, in turn."""
        count = len(self.training)
        rows = [self._order(i // count)[i % count] for i in range(step * size, (step + 1) * size)]
        return self.training[rows]

    def _order(self, epoch: int) -> list[int]:
        return _permutation(len(self.training), self.seed, epoch)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator).tolist()


def make_corpus(
    ids: Sequence[int], settings: Training, length: int, name: str = "the calibration text", part: str = "tune"
) -> Corpus:
    """Cut token ids: `held_out` chunks of `length` tokens first, then training sequences of `settings.length`.

    SourceError for a text that is too short for one batch besides; `name` is the text's, `part` of which recipe key.
    """
    held = settings.held_out * length
    rest = torch.tensor(ids[held:], dtype=torch.long)
    needed = held + max(settings.batch * settings.length, length)
    if len(ids) < needed:
        raise SourceError(
            f"{name} has {len(ids)} tokens, and {part} needs {needed} ({settings.held_out} held-out chunks of {length} "
            f"and a batch); give more of it, or lower {part}.held_out."
        )
    training = rest[: len(rest) // settings.length * settings.length].view(-1, settings.length)
    scaling = rest[: min(len(rest) // length, SCALED) * length].view(-1, length)
    held_out = torch.tensor(ids[:held], dtype=torch.long).view(-1, length)
    return Corpus(training, held_out, scaling, settings.seed)


def require_images(count: int, settings: Training, name: str, called: str = "images", fitted: int = 0) -> None:
    """SourceError where so many images, or what they are `called`, are too few to hold some out, and for one batch
    besides, or for those that the rest of the recipe is `fitted` on; `name` says where they come from."""
    needed = settings.held_out + max(settings.batch, fitted)
    if count < needed:
        raise SourceError(
            f"{name} gives {count} {called}, and tune needs {needed} ({settings.held_out} that are held out, and "
            f"{needed - settings.held_out} to learn from); give more of them, or lower tune.held_out."
        )


def make_image_corpus(pixels: torch.Tensor, settings: Training) -> Corpus:
    """Pixels (N, C, H, W): the last `held_out` images are held out, and all others are trained on.

    Not the first, which operations take their means over: judged on those, no training is as good as the means are.
    """
    training, held_out = pixels[: -settings.held_out], pixels[-settings.held_out :]
    return Corpus(training, held_out, training[:SCALED], settings.seed)
