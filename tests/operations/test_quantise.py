"""A quantised checkpoint holds what the scheme says, loads as any other, and computes what the simulation says."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_config, tiny_model
from helpers.tiny_checkpoint import MEASURED, Place, edit_json, rehash, save_tokenizer, surgery_command
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from surgery.checkpoint.compressed import FORMATS, packed
from surgery.checkpoint.layout import read_layout
from surgery.checkpoint.manifest import read_manifest
from surgery.converted.described import read_described
from surgery.converted.reading import load_converted
from surgery.live.loading import load_tokenizer
from surgery.live.model import Live
from surgery.live.quantised import SCHEMES, Scheme, activation_ranges, quantised
from surgery.verbs.plan import plan

RECIPE = """surgery: 1
operations:
  - attention_bias: {{prefix: ["<s>", "\\n"]}}
  - quantise: {settings}
verify:
  perplexity: {{max_ratio: 2.0}}
  massive_activations: {{max: 1000000}}
"""
SETTINGS = {name: f"{{scheme: {name}{', group: 16' if name == 'w4a16' else ''}}}" for name in FORMATS}


def recipe(root: Path, settings: str) -> Path:
    path = root / "quantise.yaml"
    path.write_text(RECIPE.format(settings=settings))
    return path


def converted(place: Place, root: Path, scheme: str, source: Path | None = None) -> Path:
    ended = surgery_command(
        "run", recipe(root, SETTINGS[scheme]), source or place.source, root / "out", "--text", place.text,
        "--calibration", place.text, *MEASURED,
    )  # fmt: skip
    assert ended.code == 0, ended.out + ended.err
    return root / "out"


@pytest.fixture(scope="module")
def static(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(place, tmp_path_factory.mktemp("static"), "w8a8_static")


# ---- one weight


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([16, 32, 64]), st.sampled_from([1e-6, 1.0, 1e6]))
def test_integers_are_the_nearest_of_their_row(seed: int, rows: int, columns: int, size: float) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    weight[0] = 0
    stored = packed(weight, torch.tensor(3.0), "w8a8_static", 16)
    exact = weight.double().numpy()
    largest = np.abs(exact).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1.0)
    assert stored["weight"].dtype == torch.int8 and stored["weight_scale"].dtype == torch.float32
    np.testing.assert_allclose(stored["weight_scale"].double().numpy(), scale, rtol=1e-6)
    assert stored["input_scale"].tolist() == pytest.approx([3.0 / 127])
    found = stored["weight"].double().numpy() * scale
    assert np.all(np.abs(found - exact) <= scale * (0.5 + 1e-4))
    assert np.all(np.abs(stored["weight"].int().numpy()) <= 127)


def test_four_bits_are_packed_by_group() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    stored = packed(weight, None, "w4a16", 32)
    words = stored["weight_packed"].numpy().view(np.uint32)  # eight numbers each, the first lowest, with 8 added
    numbers = np.stack([(words >> (4 * i)) & 15 for i in range(8)], axis=-1).reshape(3, 64).astype(int) - 8
    groups = weight.double().numpy().reshape(3, 2, 32)
    scale = np.abs(groups).max(axis=-1) / 7
    np.testing.assert_allclose(stored["weight_scale"].double().numpy(), scale, rtol=1e-6)
    np.testing.assert_array_equal(numbers.reshape(3, 2, 32), np.round(groups / scale[..., None]))
    assert stored["weight_shape"].tolist() == [3, 64]


def test_shapes_are_known_without_weights() -> None:
    for scheme in FORMATS:
        made = packed(torch.randn(8, 64), torch.ones(()), scheme, 32)
        blank = packed(torch.empty(8, 64, device="meta"), None, scheme, 32)
        assert {k: (v.dtype, v.shape) for k, v in made.items()} == {k: (v.dtype, v.shape) for k, v in blank.items()}


# ---- a checkpoint


def read(place: Place) -> torch.Tensor:
    """The token ids (8 * 32,) that the text begins with."""
    tokenizer = load_tokenizer(place.converted)
    return torch.tensor(tokenizer(place.text.read_text(), add_special_tokens=False)["input_ids"][: 8 * 32])


def simulated(place: Place, out: Path, root: Path, scheme: Scheme, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the checkpoint without quantise, computed as if quantised; scales from the same text."""
    plain = root / "plain"
    shutil.copytree(place.converted, plain, dirs_exist_ok=True)
    live = Live(load_converted(plain), read_described(plain).anatomy)
    peaks = {
        name.removesuffix(".input_scale").removeprefix(live.anatomy.lead): tensor[0] * 127
        for name, tensor in load_file(next(out.glob("*1-of-*"))).items()
        if name.endswith("input_scale")
    }
    with quantised(live, scheme, peaks), torch.no_grad():
        return live.model(input_ids=ids, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8_static", "w4a16"])
def test_the_loaded_model_is_the_simulated_one(place: Place, tmp_path: Path, scheme: str) -> None:
    out = converted(place, tmp_path, scheme)
    ids = read(place).view(8, 32)[:2]
    with torch.no_grad():
        found = load_converted(out)(input_ids=ids, use_cache=False).logits
    wanted = Scheme(4, group=16) if scheme == "w4a16" else SCHEMES[scheme]
    expected, exact = (simulated(place, out, tmp_path, one, ids) for one in (wanted, Scheme()))
    # Beyond the scale the library has -128, which the simulation does not: rarely, and a hundredth of the whole.
    assert (found - expected).abs().mean() <= 0.02 * (expected - exact).abs().mean()


def test_scales_are_the_largest_inputs_of_the_text(place: Place, static: Path) -> None:
    live = Live(load_converted(place.converted), read_described(place.converted).anatomy)
    ranges = activation_ranges(live, read(place).view(8, 32))
    tensors = load_file(next(static.glob("*1-of-*")))
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("input_scale")}
    assert len(scales) == 14
    assert all(bool(scale > 0) for scale in scales.values())
    name = "layers.0.mlp.down_proj"
    assert scales[f"model.{name}.input_scale"].item() * 127 >= 0.5 * ranges[name].item()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w4a16", "fp8_dynamic"])
def test_every_scheme_is_written_and_verified(place: Place, tmp_path: Path, scheme: str) -> None:
    out = converted(place, tmp_path, scheme, place.sharded)
    ended = surgery_command("verify", out, "--against", place.sharded)
    assert ended.code == 0, ended.err
    assert "14 weights rounded as computed again" in " ".join(ended.out.split())


@pytest.mark.slow
def test_named_layers_have_a_scale_per_token(place: Place, tmp_path: Path, caplog) -> None:
    """The stored scale of all others is kept; loaded, only the named ones follow their input."""
    path = recipe(tmp_path, "{scheme: w8a8_static, per_token: [down_proj]}")
    out = tmp_path / "out"
    ended = surgery_command("run", path, place.source, out, "--text", place.text, *MEASURED)
    assert ended.code == 0, ended.err
    ended = surgery_command("verify", out, "--against", place.source)
    assert ended.code == 0 and "14 weights rounded as computed again" in " ".join(ended.out.split()), ended.err
    scales = {name for name in read_layout(out).tensors if name.endswith("input_scale")}
    assert len(scales) == 12 and not any("down_proj" in name for name in scales)
    caplog.clear()
    model = load_converted(out)
    assert not [record.message for record in caplog.records if "Could not match" in record.message]
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            dynamic = module.quantization_scheme.input_activations.dynamic
            assert dynamic == name.endswith("down_proj"), name


def test_another_head_is_not_quantised(static: Path) -> None:
    """A classifier on a quantised trunk has a head of its own, to be trained."""
    model = AutoModelForSequenceClassification.from_pretrained(static, trust_remote_code=True)
    assert model.score.weight.dtype == torch.float32 and not hasattr(model.score, "quantization_scheme")
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.int8
    with torch.no_grad():
        assert bool(model(input_ids=torch.tensor([[2, 3, 4]])).logits.isfinite().all())


@pytest.mark.parametrize(
    ("settings", "said"),
    [("{per_token: [up]}", "no linear layer of this model; it has down_proj, gate_proj"),
     ("{scheme: w4a16, per_token: [down_proj]}", "is for a scheme with stored scales")],
)  # fmt: skip
def test_per_token_names_layers_of_static_schemes(place: Place, tmp_path: Path, settings: str, said: str) -> None:
    assert said in refused(place, tmp_path, settings)


def test_what_is_not_rounded_stays_byte_for_byte(place: Place, static: Path) -> None:
    before, after = (read_layout(root) for root in (place.source, static))
    source = load_file(place.source / "model.safetensors")
    stored = load_file(static / "model-00001-of-00002.safetensors")
    kept = [name for name in source if name in stored and stored[name].dtype == source[name].dtype]
    assert {name for name in kept if "proj" in name} == set()
    assert len(kept) == 7 and all(torch.equal(source[name], stored[name]) for name in kept)
    linear = [name for name in source if "proj" in name]
    assert all(stored[name].dtype == torch.int8 for name in linear)
    assert set(after.tensors) - set(before.tensors) >= {name + "_scale" for name in linear}
    assert {entry.status for entry in read_manifest(static).tensors.values()} == {"kept", "quantised", "added"}
    card = (static / "README.md").read_text()
    assert "pip install compressed-tensors" in card and "torch, transformers and compressed-tensors are all" in card


def test_the_plan_knows_every_byte(place: Place, static: Path, tmp_path: Path) -> None:
    told = plan(recipe(tmp_path, SETTINGS["w8a8_static"]), place.source).to_dict()
    sizes = {file["name"]: file["bytes"] for file in told["files"] if file["name"].endswith(".safetensors")}
    assert sizes == {name: (static / name).stat().st_size for name in sizes}
    assert told["quantise"] == {"scheme": "w8a8_static", "layers": 14}
    shown = surgery_command("plan", recipe(tmp_path, SETTINGS["w8a8_static"]), place.source).out
    assert "14 linear layers written in few bits: w8a8_static" in shown
    assert "planned: tensors 4 added, 42 quantised, 7 kept" in shown


# ---- edits


def tampered(static: Path, tmp_path: Path, part: str, data: bytes) -> Path:
    """A copy with another byte in a tensor, and with hashes that fit it."""
    out = tmp_path / "out"
    shutil.copytree(static, out)
    info = read_layout(out).tensors[f"model.layers.1.mlp.up_proj.{part}"]
    with (out / info.shard).open("r+b") as file:
        file.seek(info.start)
        before = file.read(len(data))
        assert before != data
        file.seek(info.start)
        file.write(data)
    rehash(out)
    return out


@pytest.mark.parametrize(
    ("part", "data", "said"),
    [
        ("weight", b"\x01\x02", "up_proj.weight is not what quantise makes"),
        ("weight_scale", b"\x01", "up_proj.weight_scale is not what quantise makes"),
        ("input_scale", b"\0\0\xc0\xff", "input_scale holds what is no positive number"),
        ("weight_scale", b"\0\0\0\0", "weight_scale holds what is no positive number"),
    ],
)
def test_an_edited_weight_or_scale_is_found(place: Place, static: Path, tmp_path: Path, part, data, said) -> None:
    ended = surgery_command("verify", tampered(static, tmp_path, part, data), "--against", place.source)
    assert ended.code == 3 and said in ended.error


def test_what_the_recipe_keeps_is_not_quantised(place: Place, static: Path, tmp_path: Path) -> None:
    """Whatever the manifest says of it: a head that was turned round would pass for rounded."""
    out = tmp_path / "out"
    shutil.copytree(static, out)
    info = read_layout(out).tensors["lm_head.weight"]
    with (out / info.shard).open("r+b") as file:
        file.seek(info.start + 3)
        file.write(b"\xbf")
    manifest = json.loads((out / "surgery.json").read_text())
    manifest["tensors"]["lm_head.weight"] |= {"status": "quantised", "of": "lm_head.weight"}
    (out / "surgery.json").write_text(json.dumps(manifest))
    rehash(out)
    ended = surgery_command("verify", out, "--against", place.source)
    assert ended.code == 3 and "lm_head.weight: the recipe does not quantise it" in ended.error


def test_other_settings_of_the_format_are_found(place: Place, static: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(static, out)
    entry = read_described(static).config["quantization_config"]
    entry["ignore"] = ["lm_head", "model.layers.0.mlp.up_proj"]
    edit_json(out / "config.json", quantization_config=entry)
    rehash(out)
    ended = surgery_command("verify", out)
    assert ended.code == 3 and "quantization_config is not the one" in ended.error


# ---- what cannot be had


def refused(place: Place, tmp_path: Path, settings: str, source: Path | None = None) -> str:
    ended = surgery_command("plan", recipe(tmp_path, settings), source or place.source)
    assert ended.code == 2
    return ended.error


def test_a_group_that_does_not_divide_is_refused(place: Place, tmp_path: Path) -> None:
    said = refused(place, tmp_path, "{scheme: w4a16, group: 32}")
    assert "groups of 32 do not divide" in said and "another group" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [("{scheme: w4a16, group: 20}", "group is 20; it must be a multiple of 16"),
     ("{group: 64}", "group is of w4a16, whose weights have scales for groups")],
)  # fmt: skip
def test_groups_are_of_schemes_that_have_them(place: Place, tmp_path: Path, settings: str, said: str) -> None:
    assert said in refused(place, tmp_path, settings)


def test_experts_in_one_tensor_are_refused(place: Place, tmp_path: Path) -> None:
    tiny_model("mixtral", config=tiny_config("mixtral", vocab_size=320)).save_pretrained(tmp_path / "mixtral")
    save_tokenizer(tmp_path / "mixtral", place.text)
    assert "leave 'quantise', 'quantised' and 'lora' out" in refused(place, tmp_path, "{}", tmp_path / "mixtral")


def test_other_layers_than_linear_ones_are_refused(place: Place, tmp_path: Path) -> None:
    tiny_model("gpt2", config=tiny_config("gpt2", vocab_size=320)).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2", place.text)
    assert "is a Conv1D" in refused(place, tmp_path, "{}", tmp_path / "gpt2")


def test_the_library_is_asked_for_by_name(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert "pip install 'checkpoint-surgery[quantised]'" in refused(place, tmp_path, "{}")


def test_what_no_engine_here_runs_is_refused(place: Place, tmp_path: Path) -> None:
    assert "write fp8_dynamic" in refused(place, tmp_path, "{scheme: fp8_static}")


def test_nothing_is_fitted_to_rounded_weights(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        'surgery: 1\noperations:\n  - attention_bias: {prefix: ["<s>"]}\n  - quantise: {}\n  - smoothing: {}\n'
    )
    ended = surgery_command("plan", path, place.source)
    assert ended.code == 2 and "quantise too early" in ended.error
    path.write_text(
        'surgery: 1\noperations:\n  - attention_bias: {prefix: ["<s>"]}\n  - quantise: {}\n'
        "verify:\n  quantised: {w8a8_static: {max_ratio: 1.1}}\n"
    )
    ended = surgery_command("plan", path, place.source)
    assert ended.code == 2 and "perplexity judges" in ended.error
