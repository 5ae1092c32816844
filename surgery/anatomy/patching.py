"""What an encoder makes of an image, a recording or a text before its first block: a few special tokens, and one for
each patch of a grid, or for each frame of a row; of a text, those that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..words import IMAGE, RECORDING, SPECTROGRAM, WRITTEN, Called

PIXELS = "pixel_values"
# What a tower is called with: pixels; or such that are cut into patches already; or with the order of patches, which it
# would make at random.
Handed = Literal["whole", "packed", "ordered"]
Reads = Literal["text", "images", "audio"]  # what a model is given, and how options are called
READS: tuple[Reads, ...] = ("text", "images", "audio")
SOUND = ("input_features", "input_values")  # as the towers of audio call what they read
TOKENS = "input_ids"


@dataclass(frozen=True)
class Patching:
    """`shape` of one `input` that it was made for, as the tower is called with it: images are (C, H, W), recordings
    (samples,), or (frames, bins) in either order, texts (tokens,).

    `patch` (H, W) and `stride` of each; None where tokens are a row of frames, as long as the recording makes it. Of
    the tokens that an image becomes, the first `special` are no patches, and of these `registers` are, after CLS;
    `register_key` is what the tower's config calls their number. `handed`: what the tower is called with
    (`tower.given_to`). `causal`: tokens see only those before them, as in the text tower of CLIP.
    """

    input: str
    shape: tuple[int, ...]
    patch: tuple[int, int] | None
    stride: tuple[int, int] | None
    special: int
    registers: int
    register_key: str | None = None
    handed: Handed = "whole"
    causal: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of an image."""
        height, width = self.shape[-2:]
        return height, width

    @property
    def is_sound(self) -> bool:
        return self.input in SOUND

    @property
    def is_text(self) -> bool:
        return self.input == TOKENS

    @property
    def cls(self) -> int:
        """How many CLS there are: one, unless all that is special are registers."""
        return int(self.special > self.registers)

    @property
    def called(self) -> Called:
        if not self.is_sound:
            return WRITTEN if self.is_text else IMAGE
        return RECORDING if self.patch is None else SPECTROGRAM

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """How many patches an image of this size has, rows and columns."""
        assert self.patch is not None and self.stride is not None
        (high, wide), (down, right) = self.patch, self.stride
        return (height - high) // down + 1, (width - wide) // right + 1


def read_by(patching: Patching | None) -> Reads:
    """What a model reads, of which this is known."""
    if patching is None or patching.is_text:
        return "text"
    return "audio" if patching.is_sound else "images"
