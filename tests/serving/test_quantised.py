"""Quantised checkpoints in vLLM's own kernels: integers, float8, four bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.serving import make, vllm_python


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", ["w8a8_static", "w8a8_static, per_token: [down_proj]", "w8a8_dynamic", "fp8_dynamic", "w4a16"]
)
def test_a_scheme_is_the_same_in_vllm(scheme: str, tmp_path: Path) -> None:
    """Random weights make much noise of rounding; another function would be off by a nat and more."""
    group = ", group: 64" if scheme == "w4a16" else ""
    text = ("--text", tmp_path / "text.txt", "--chunks", 4, "--chunk-length", 32)
    made = make(
        "llama", tmp_path, "--engine-python", vllm_python(), *text,
        further=f"  - quantise: {{scheme: {scheme}{group}}}\n",
    )  # fmt: skip
    found = json.loads((made.directory / "export.json").read_text())["measured"]
    ppl = found["perplexity"]
    assert abs(ppl["exported"]["nll"] - ppl["converted"]["nll"]) < 0.1
    assert "in vLLM, the mean |delta log-probability|" in made.card
