"""Quantised sources of each format: what is in memory is what the format defines, and slots are exact on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.packed import COMPRESSED, FORMS, SINGLE, save_four_bits, save_packed, unpacked_by_hand
from helpers.tiny import one_thread
from helpers.tiny_checkpoint import edit_json
from safetensors.torch import load_file, save_file

from surgery.anatomy.fit import examine_stored
from surgery.checkpoint.source import open_source
from surgery.errors import DamagedCheckpoint, SourceError, SurgeryError, UnsupportedModel
from surgery.live.graft import fold, grafted
from surgery.live.loading import load_original
from surgery.live.model import Live
from surgery.live.roundings import rounds_values, steady

PREFIX = (3, 70, 7)


def in_tiers(*forms: str) -> list[Any]:
    """All but two of these are slow."""
    quick = ("w8a8 static", "fp8")
    return [form if form in quick else pytest.param(form, marks=pytest.mark.slow) for form in forms]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory):
    """Form -> its checkpoint; made once, so copy before you change it."""
    root, made = tmp_path_factory.mktemp("packed"), {}

    def of(form: str) -> Path:
        if form not in made:
            made[form] = save_packed(root / form.replace(" ", "-"), form)
        return made[form]

    return of


def live_of(root: Path, dtype: torch.dtype = torch.float64) -> Live:
    source = open_source(str(root))
    anatomy, fits = examine_stored(source.config, source.layout)
    assert fits.unused == ()
    model = load_original(root, dtype)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped_mm knows no float64
    return Live(model, anatomy)


@pytest.mark.parametrize("form", in_tiers(*FORMS))
def test_what_is_in_memory_is_what_the_format_defines(form: str, packed) -> None:
    model, wanted = live_of(packed(form)).model, unpacked_by_hand(packed(form))
    names = {name for name, _ in model.named_parameters() if not name.endswith(("_scale", "_shape"))}
    assert names == wanted.keys()
    for name, weight in wanted.items():
        found = model.get_parameter(name)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, weight, rtol=1e-7, atol=0)  # scales are float32


@pytest.mark.parametrize("form", in_tiers(*FORMS))
def test_slots_are_exact_on_a_quantised_source(form: str, packed) -> None:
    """In float64: what rounding there is in the format is the same on both sides."""
    live = live_of(packed(form))
    text = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    lead = torch.tensor(PREFIX).expand(2, -1)
    with torch.no_grad(), steady(live.model):
        control = live.model(torch.cat([lead, text], 1), use_cache=False).logits[:, len(PREFIX) :].log_softmax(-1)
        bare = live.model(text, use_cache=False).logits.log_softmax(-1)
        with grafted(live, fold(live, PREFIX, "as_prefix")):
            found = live.model(text, use_cache=False).logits.log_softmax(-1)
    assert (bare - control).abs().max() > 0.1
    assert (found - control).abs().max() < 1e-12


@pytest.mark.parametrize("form", in_tiers(*COMPRESSED))
def test_inputs_are_rounded_where_the_format_says_so(form: str, packed) -> None:
    live = live_of(packed(form), torch.float32)
    layer = live.model.get_submodule("model.layers.0.mlp.up_proj")
    values = torch.linspace(-1, 1, 32)[None]
    plain = torch.nn.functional.linear(values, layer.weight)
    rounds = "input_activations" in COMPRESSED[form]
    assert rounds_values(live.model) == rounds == (not torch.equal(layer(values), plain))
    assert open_source(str(packed(form))).quantised.rounds_activations == rounds
    if form == "w8a8 static":
        steps = torch.nn.functional.linear((values / 0.05).round() * 0.05, layer.weight)
        torch.testing.assert_close(layer(values), steps)


def changed(root: Path, into: Path, change) -> Path:
    """A copy of `root` with other tensors."""
    shutil.copytree(root, into)
    tensors = load_file(into / SINGLE)
    change(tensors)
    save_file(tensors, into / SINGLE, {"format": "pt"})
    return into


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("form", "name"),
    [("w8a8 static", "weight_scale"), ("w8a8 static", "input_scale"), ("w4a16", "weight_packed"), ("w4a16", "weight")],
)
def test_tensors_that_do_not_fit_the_format_are_damage(form: str, name: str, packed, tmp_path: Path) -> None:
    def change(tensors: dict) -> None:
        tensors[f"{LAYER}.{name}"] = torch.ones(5, 3)

    root = changed(packed(form), tmp_path / "source", change)
    with pytest.raises(SurgeryError, match=rf"do not fit.*{LAYER}.{name}"):
        examine_stored(open_source(str(root)).config, open_source(str(root)).layout)


def test_a_layer_without_its_scales_is_damage(packed, tmp_path: Path) -> None:
    root = changed(packed("w4a16"), tmp_path / "source", lambda tensors: tensors.pop(f"{LAYER}.weight_scale"))
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        live_of(root)


def groups_of(root: Path) -> dict:
    return json.loads((root / "config.json").read_text())["quantization_config"]


def with_settings(root: Path, into: Path, **changes: object) -> Path:
    shutil.copytree(root, into)
    edit_json(into / "config.json", quantization_config={**groups_of(root), **changes})
    return into


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["re:(.*.*)*x", r"re:(\w+\.?)+\d\d$"])
def test_patterns_without_end_are_refused(pattern: str, packed, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("surgery.anatomy.packed._SECONDS", 1)
    root = with_settings(packed("w4a16"), tmp_path / "source", ignore=["lm_head", pattern])
    with pytest.raises(SourceError, match="patterns in quantization_config are too much"):
        live_of(root)


def test_what_is_no_pattern_is_refused(packed, tmp_path: Path) -> None:
    root = with_settings(packed("w4a16"), tmp_path / "source", ignore=["lm_head", "re:((a)*"])
    with pytest.raises(SourceError, match="which is none"):
        live_of(root)


def test_rounding_inside_of_attention_is_refused(packed, tmp_path: Path) -> None:
    groups = groups_of(packed("w8a8 static"))["config_groups"]
    inputs = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
    groups = {**groups, "kv": {"targets": ["LlamaAttention"], "input_activations": inputs}}
    root = with_settings(packed("w8a8 static"), tmp_path / "source", config_groups=groups)
    with pytest.raises(SurgeryError, match="quantization_config|do not fit"):
        live_of(root)


@pytest.mark.parametrize(
    "value", [{"weights": {"num_bits": 77}}, {"targets": 5}, 3, {"weights": {"num_bits": 8, "x": 1}}]
)
def test_groups_that_say_nothing_sane_are_refused(value: object, packed, tmp_path: Path) -> None:
    root = with_settings(packed("w4a16"), tmp_path / "source", config_groups={"g": value})
    with pytest.raises(SurgeryError) as caught:
        live_of(root)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.slow
def test_four_bits_of_bitsandbytes_are_exact_too(tmp_path: Path) -> None:
    """Its shapes are in values, so headers are held against the model's own; slots are those of the unpacked model."""
    pytest.importorskip("bitsandbytes")
    root = save_packed(tmp_path / "source", "bitsandbytes")
    model, stored = live_of(root).model, load_file(root / SINGLE)
    name = f"{LAYER}.weight"
    codes = torch.stack([stored[name] >> 4, stored[name] & 15], dim=-1).flatten().long()  # the high one comes first
    blocks = stored[f"{name}.quant_map"].double()[codes].view(-1, 64) * stored[f"{name}.absmax"].double()[:, None]
    found = model.get_parameter(name)
    torch.testing.assert_close(found, blocks.view(found.shape), rtol=1e-6, atol=0)

    def change(tensors: dict) -> None:
        tensors[name] = tensors[name][:100]

    broken = changed(root, tmp_path / "broken", change)
    with pytest.raises(DamagedCheckpoint, match="do not fit"):
        live_of(broken)
    with pytest.raises(UnsupportedModel, match="blocks of 64 do not fill"):
        live_of(save_four_bits(tmp_path / "narrow", hidden_size=32))
