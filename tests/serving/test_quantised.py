"""Quantised checkpoints in vLLM's own kernels: integers, float8, four bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.serving import make, vllm_python

from surgery.serving.score import unfit

pytestmark = [pytest.mark.serve, pytest.mark.slow]


FORMATS = {"w8a8": "int-quantized", "w4a16": "pack-quantized"}


def _require_kernels(scheme: str) -> None:
    """On other processors vLLM 0.32 has no kernel that is right, and says so."""
    form = next((form for name, form in FORMATS.items() if name in scheme), None)
    if why := unfit(form):
        pytest.skip(why)


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
    _require_kernels(settings)
    require_same("llama", tmp_path, settings)


# Layers with a bias, layers that the family itself has fused, and layers that it calls otherwise.
@pytest.mark.parametrize(
    ("kind", "last"), [("llama", "down_proj"), ("qwen2", "down_proj"), ("phi3", "down_proj"), ("opt", "fc2")]
)
def test_layers_with_a_scale_per_token_are_so_in_vllm(kind: str, last: str, tmp_path: Path) -> None:
    _require_kernels("w8a8")
    require_same(kind, tmp_path, f"scheme: w8a8_static, per_token: [{last}]")


def test_a_processor_without_the_kernels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has = dict.fromkeys(["avx512_bf16", "vnni", "amx_tile"], True)
    for name in has:
        monkeypatch.setattr(f"torch.cpu._is_{name}_supported", lambda name=name: has[name])
    assert "AMX" in (unfit("int-quantized") or "") and unfit("pack-quantized") is None
    has["amx_tile"] = False
    assert unfit("int-quantized") is None and unfit("pack-quantized") is None and unfit("float-quantized") is None
    has.update(vnni=False, avx512_bf16=False)
    assert "saturate" in (unfit("int-quantized") or "") and "BF16" in (unfit("pack-quantized") or "")
    assert unfit("float-quantized") is None and unfit(None) is None
