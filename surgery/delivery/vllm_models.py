"""Model types in vLLM 0.32: those found the same there, and those that are not, with the reason."""

from __future__ import annotations

# tests/serving/test_families.py tries them. Others are exported where vLLM is at hand to try them.
PROVED: tuple[str, ...] = (
    "arcee", "bloom", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "llama", "mistral", "mixtral", "opt", "phi3", "qwen2",
    "qwen3", "qwen3_moe",
)  # fmt: skip
REFUSED: dict[str, str] = {}
