"""Quantised checkpoints in vLLM's own kernels: integers, float8, four bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.serving import make, vllm_python

pytestmark = [pytest.mark.serve, pytest.mark.slow]


def _require_float32_int8(scheme: object) -> None:
    """vLLM 0.32's int8 kernel for processors with AMX takes half precision alone, and these models are float32."""
    if "w8a8" in str(scheme) and torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's int8 kernel for AMX takes no float32")


def require_same(kind: str, root: Path, settings: str) -> None:
    """Random weights make much noise of rounding; another function would be off by a nat and more."""
    text = ("--text", root / "text.txt", "--chunks", 4, "--chunk-length", 32)
    made = make(
        kind, root, "--engine-python", vllm_python(), *text, further=f"  - quantise: {{{settings}}}\n",
    )  # fmt: skip
    found = json.loads((made.directory / "export.json").read_text())["measured"]
    ppl = found["perplexity"]
    assert abs(ppl["exported"]["nll"] - ppl["converted"]["nll"]) < 0.1
    assert "in vLLM, the mean |delta log-probability|" in made.card and "the mean is judged" in made.card


@pytest.mark.parametrize(
    "settings", ["scheme: w8a8_static", "scheme: w8a8_dynamic", "scheme: fp8_dynamic", "scheme: w4a16, group: 64"]
)
def test_a_scheme_is_the_same_in_vllm(settings: str, tmp_path: Path) -> None:
    _require_float32_int8(settings)
    require_same("llama", tmp_path, settings)


# Layers with a bias, layers that the family itself has fused, and layers that it calls otherwise.
@pytest.mark.parametrize(
    ("kind", "last"), [("llama", "down_proj"), ("qwen2", "down_proj"), ("phi3", "down_proj"), ("opt", "fc2")]
)
def test_layers_with_a_scale_per_token_are_so_in_vllm(kind: str, last: str, tmp_path: Path) -> None:
    _require_float32_int8("w8a8_static")
    require_same(kind, tmp_path, f"scheme: w8a8_static, per_token: [{last}]")
