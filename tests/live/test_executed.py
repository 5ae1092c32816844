"""int8 executed for real: a layer against numpy's integers, and the model as it was afterwards."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.families import any_model
from helpers.tiny import live_of, one_thread, tiny_model, tiny_text
from helpers.tiny_checkpoint import MEASURED, Place, surgery_command
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.anatomy.linears import linears
from surgery.errors import SourceError
from surgery.live.executed import executing, require_int8
from surgery.live.quantised import SCHEMES, activation_ranges, quantised
from surgery.live.text import Chunking
from surgery.progress import unseen
from surgery.steps.inputs import Reader

INT8 = ("w8a8_static", "w8a8_dynamic", "w8a8_per_token")


@pytest.fixture(autouse=True)
def _int8_here() -> None:
    try:
        require_int8("cpu")
    except SourceError as error:
        if "VNNI" not in str(error):
            raise
        pytest.skip("this processor's int8 kernels overflow")


class Products(TorchDispatchMode):
    """Counts products of matrices, by the dtype of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        if function in (torch.ops.aten._int_mm.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen[args[-1].dtype] = self.seen.get(args[-1].dtype, 0) + 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])  # plain; weights transposed; tokens in one row
@pytest.mark.parametrize("name", INT8)
def test_a_layer_computes_with_integers(model_type: str, name: str) -> None:
    model, text = tiny_model(model_type, torch.float32), tiny_text()
    live = live_of(model)
    inside = linears(model, live.anatomy)
    path, layer = list(inside.items())[-1]
    with one_thread(), torch.no_grad():
        peaks = activation_ranges(live, tiny_text(seed=5), unseen)
        seen = {}
        keep = layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0].numpy(), y=out.numpy()))
        with executing(live, SCHEMES[name], peaks), Products() as products:
            model(text)
        keep.remove()
    assert products.seen.pop(torch.int8) == len(inside) and sum(products.seen.values()) <= 1  # the output layer's
    x, y = seen["x"].reshape(-1, seen["x"].shape[-1]).astype(np.float64), seen["y"].reshape(len(text) * 40, -1)
    weight = layer.weight.detach().numpy().astype(np.float64)
    weight = weight.T if model_type == "gpt2" else weight
    rows = np.abs(weight).max(axis=1, keepdims=True) / 127
    scale = {
        "w8a8_static": peaks[path].item() / 127,
        "w8a8_dynamic": np.abs(x).max() / 127.5,
        "w8a8_per_token": np.abs(x).max(axis=1, keepdims=True) / 127.5,
    }[name]
    integers = np.clip(np.rint(x / scale), -128, 127).astype(np.int64) @ np.rint(weight / rows).astype(np.int64).T
    bias = 0 if layer.bias is None else layer.bias.detach().numpy()
    expected = integers * scale * rows.T + bias
    # Where x or a weight lies on the edge between two integers, float32 may take the other: one step of one product.
    # At max |x| / 127.5 the largest entry itself lies there, so that whole rows may be off by it.
    apart = np.abs(y - expected) / np.abs(expected).max()
    assert apart.max() < 0.02 and np.median(apart) < 1e-6
    assert name != "w8a8_static" or (apart > 1e-5).mean() < 0.02


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "falcon"])
@pytest.mark.parametrize("name", INT8)
def test_it_lasts_no_longer_than_it_should(model_type: str, name: str) -> None:
    model, text = any_model(model_type).float(), tiny_text()
    live = live_of(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with one_thread(), torch.no_grad():
        before = model(text).logits
        peaks = activation_ranges(live, text, unseen)
        with pytest.raises(KeyboardInterrupt), executing(live, SCHEMES[name], peaks):
            inside = model(text).logits
            assert 1e-4 < (inside - before).abs().max() < 0.5 * before.abs().max()
            raise KeyboardInterrupt
        assert torch.equal(model(text).logits, before)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_of_a_real_model_compute_what_is_simulated(smollm2, wikipedia_calibration: Path) -> None:
    """Given the same inputs. Given each other's outputs the flips grow into another draw of the same rounding noise."""
    model, tokenizer = smollm2
    live = live_of(model)
    reader = Reader(tokenizer, 10**6)
    text = reader.cut(wikipedia_calibration.read_text(encoding="utf-8")[:4000], Chunking(2, 64), "text")
    layers, inputs = linears(model, live.anatomy), {}
    with contextlib.ExitStack() as undo, torch.no_grad():
        for name, layer in layers.items():
            watch = layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, args[0]))
            undo.callback(watch.remove)
        model(text)
    ranges = activation_ranges(live, text, unseen)  # nothing is clipped, at -127 or at -128
    static, outputs = (live, SCHEMES["w8a8_static"], ranges), []
    for context in (contextlib.nullcontext(), quantised(*static), executing(*static)):
        with context, torch.no_grad():
            outputs.append({name: layer(inputs[name]) for name, layer in layers.items()})
    for exact, simulated, executed in zip(*(found.values() for found in outputs), strict=True):
        apart, lost = (executed - simulated).norm() / exact.norm(), (simulated - exact).norm() / exact.norm()
        assert apart < lost / 30


def test_what_it_needs_is_said_before_the_work(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "q.yaml"
    recipe.write_text(
        place.recipe.read_text().rstrip() + "\n  quantised: {w8a8_static: {max_ratio: 3.0, executed: true}}\n"
    )
    texts = ("--text", place.text, "--calibration", place.text, *MEASURED)
    with pytest.raises(SourceError, match="--device meta"):
        require_int8("meta")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setattr("surgery.steps.operate.live_original", lambda *a, **k: pytest.fail("weights were read"))
    for arguments in (("plan", recipe, place.source), ("run", recipe, place.source, tmp_path / "out", *texts)):
        refused = surgery_command(*arguments)
        assert refused.code == 2 and "checkpoint-surgery[int8]" in refused.error


@pytest.mark.slow
def test_gates_on_both(place: Place, tmp_path: Path) -> None:
    recipe, out, found = tmp_path / "q.yaml", tmp_path / "out", tmp_path / "v.json"
    gates = "{w8a8_static: {max_ratio: 3.0, executed: true}, w8a8_per_token: {max_ratio: 3.0}}"
    recipe.write_text(place.recipe.read_text().rstrip() + f"\n  quantised: {gates}\n")
    texts = ("--text", place.text, "--calibration", place.text, *MEASURED, "--json", found)
    ended = surgery_command("run", recipe, place.source, out, *texts)
    assert ended.code == 0 and "8 bit, static scales, run in int8" in ended.out, ended.err
    verdict = json.loads(found.read_text())
    limits = {gate["name"]: gate["value"] for gate in verdict["gates"] if gate["name"].startswith("quantised")}
    entry = verdict["quantised"]["w8a8_static"]
    real = entry["executed"]["delta_nll"]
    assert limits == pytest.approx(
        {
            "quantised.w8a8_static": math.exp(entry["delta_nll"]["converted"]["high"]),
            "quantised.w8a8_static.executed": math.exp(real["converted"]["high"]),
            "quantised.w8a8_per_token": math.exp(
                verdict["quantised"]["w8a8_per_token"]["delta_nll"]["converted"]["high"]
            ),
        }
    )
    for whose in ("original", "converted"):
        assert real[f"{whose}_vs_simulated"]["mean"] == pytest.approx(
            real[whose]["mean"] - entry["delta_nll"][whose]["mean"]
        )
        assert 0 < abs(real[f"{whose}_vs_simulated"]["mean"]) < 0.05
    ended = surgery_command("verify", out, "--against", place.source, *texts)
    assert ended.code == 0 and json.loads(found.read_text())["quantised"] == verdict["quantised"]


def test_static_scales_are_needed() -> None:
    model = tiny_model("llama", torch.float32)
    live = live_of(model)
    with pytest.raises(ValueError, match="calibration"), executing(live, SCHEMES["w8a8_static"]):
        pass
