"""What an encoder makes of an image before its first block: a few special tokens, and one for each patch of a grid."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patching:
    """`size` (H, W) and `channels` of the images that it was made for, `patch` (H, W) of each.

    Of the tokens that an image becomes, the first `special` are no patches, and of these `registers` are, after CLS;
    `register_key` is what the tower's config calls their number.
    """

    size: tuple[int, int]
    channels: int
    patch: tuple[int, int]
    special: int
    registers: int
    register_key: str | None = None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """How many patches an image of this size has, rows and columns."""
        return height // self.patch[0], width // self.patch[1]
