"""Model types in vLLM 0.32: those found the same there, and those that are not, with the reason."""

from __future__ import annotations

PROVED: tuple[str, ...] = ("llama",)
REFUSED: dict[str, str] = {}
