"""Quantised sources, from plan to verdict: bytes stay, strangers load the result, what touches weights is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bench import DAMAGED, INPUT
from helpers.fresh_process import ask
from helpers.packed import COMPRESSED, FORMS, SINGLE, save_packed
from helpers.tiny_checkpoint import (
    MEASURED,
    RECIPE,
    Ended,
    edit_json,
    rehash,
    save_tokenizer,
    surgery_command,
    write_text,
)
from safetensors.torch import load_file

from surgery.checkpoint.copying import sha256_of
from surgery.live.loading import load_original
from surgery.live.roundings import steady

PREFIX = (0, 200)  # "<s>", "\n"
KEPT = "model-00001-of-00002.safetensors"
# float64 on both sides, from slots stored in float32: where layers round, such a difference may become a step.
TOLERANCE = 1e-5
STEPS = 0.5
QUICK = "w8a8 static"


def in_tiers(*forms: str) -> list[Any]:
    """All but one of these are slow."""
    return [form if form == QUICK else pytest.param(form, marks=pytest.mark.slow) for form in forms]


@dataclass(frozen=True)
class Made:
    """Sources in each form, and what a run made of them."""

    root: Path

    def source(self, form: str) -> Path:
        return self.root / form.replace(" ", "-")

    def out(self, form: str) -> Path:
        return self.root / f"{form.replace(' ', '-')}-eab"

    def ended(self, form: str) -> Any:
        """How its plan ended, in words, and the plan's JSON; how its run ended, and the verdict."""
        return json.loads((self.root / f"{form.replace(' ', '-')}.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Each form is made and converted when it is first asked for."""
    found = Made(tmp_path_factory.mktemp("made"))
    (found.root / "recipe.yaml").write_text(RECIPE)
    write_text(found.root / "text.txt", 1500, seed=1)

    def of(form: str) -> Made:
        if not found.source(form).exists():
            save_packed(found.source(form), form)
            save_tokenizer(found.source(form), found.root / "text.txt")
            ended = run(found, form, found.out(form))
            assert ended.code == 0, ended.out + ended.err
        return found

    return of


def run(made: Made, form: str, out: Path, recipe: str | None = None, *options: object) -> Ended:
    path = made.root / "recipe.yaml"
    if recipe is not None:
        path = made.root / "other.yaml"
        path.write_text(recipe)
    told = made.root / f"{form.replace(' ', '-')}.json"
    return surgery_command(
        "run", path, made.source(form), out, "--text", made.root / "text.txt", *MEASURED, "--json", told, *options
    )


@pytest.mark.parametrize("form", in_tiers(*FORMS))
def test_weights_stay_byte_for_byte(form: str, made) -> None:
    found = made(form)
    source, out = found.source(form), found.out(form)
    assert sha256_of(source / SINGLE) == sha256_of(out / KEPT)
    before, after = (json.loads((root / "config.json").read_text()) for root in (source, out))
    assert before["quantization_config"] == after["quantization_config"]
    assert after["model_type"] == f"eab_{before['model_type']}"
    verdict = found.ended(form)
    steps = "input_activations" in COMPRESSED.get(form, {})
    assert ("equivalence" in [gate["name"] for gate in verdict["gates"]]) is not steps
    assert verdict["random_ids"]["plain"] < (1e-9 if steps else 1e-4)  # in float64 and in float32


@pytest.mark.parametrize("form", in_tiers("w8a8 static", "w8a8 per token", "fp8"))
def test_verify_computes_the_same_again(form: str, made) -> None:
    found = made(form)
    text = found.root / "text.txt"
    ended = surgery_command("verify", found.out(form), "--against", found.source(form), "--text", text)
    assert ended.code == 0, ended.err
    assert "tensors as computed again" in ended.out and "to the bit" in ended.out


@pytest.mark.slow
def test_strangers_load_it_as_they_load_the_source(made, tmp_path: Path) -> None:
    """A process without surgery, each form: the original after the prefix, under the same rounding."""
    text = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    lead = torch.tensor(PREFIX).expand(2, -1)
    task = {"text": text, "prompt": text[:, :9], "new_tokens": 4, "caches": ["dynamic"]}
    tasks = {
        form: {**task, "path": str(made(form).out(form)), "default_dtype": torch.float32}
        for form in FORMS
        if form not in ("fp8", "mxfp4", "w4a16 off centre")  # which transformers reads in a dtype, or way, of its own
    }
    report = ask(tmp_path, {"families": tasks}, timeout=500)
    for form in tasks:
        assert "failed" not in report[form], report[form]["failed"]
        assert report[form]["problems"] == {}
        model = load_original(made(form).source(form), torch.float64)
        with torch.no_grad():
            control = model(torch.cat([lead, text], 1), use_cache=False).logits[:, 2:].log_softmax(-1)
            bare = model(text, use_cache=False).logits.log_softmax(-1)
        distance = (report[form]["logits"].log_softmax(-1) - control).abs().max()
        assert (
            distance < (STEPS if "input_activations" in COMPRESSED[form] else TOLERANCE) < (bare - control).abs().max()
        )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_transformers_unpacks_the_result_as_the_source(form: str, made) -> None:
    """In bfloat16, which these formats are unpacked into: as far from the original after the prefix as rounding is."""
    from transformers import AutoModelForCausalLM

    import surgery  # noqa: F401  knows the derived types

    found = made(form)
    text = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    lead = torch.tensor(PREFIX).expand(2, -1)
    models = [
        AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32) for at in (found.source(form), found.out(form))
    ]
    with torch.no_grad():
        control = models[0](torch.cat([lead, text], 1), use_cache=False).logits[:, 2:].log_softmax(-1)
        bare, after = (model(text, use_cache=False).logits.log_softmax(-1) for model in models)
    assert (after - control).abs().max() < 1e-4 < (bare - control).abs().max()


def test_the_plan_names_the_format_and_its_bytes(made) -> None:
    found = made("w8a8 static")
    source, told = found.source("w8a8 static"), found.root / "plan.json"
    ended = surgery_command("plan", found.root / "recipe.yaml", source, "--json", told)
    assert ended.code == 0 and "int-quantized" in ended.out and "kept byte for byte" in ended.out
    planned = json.loads(told.read_text())["quantised"]
    packed = sum(t.nbytes for name, t in load_file(source / SINGLE).items() if "_proj." in name)
    assert planned["bytes"] == packed and planned["method"] == "compressed-tensors"
    assert planned["format"].endswith("weights int8 per channel and inputs int8 per tensor, static")


@pytest.mark.slow
def test_the_card_says_how_zero_points_are_read(made) -> None:
    card = (made("w4a16 off centre").out("w4a16 off centre") / "README.md").read_text()
    assert "CompressedTensorsConfig(dequantize=True)" in card


def test_the_card_says_what_to_install(made) -> None:
    card = (made("w8a8 static").out("w8a8 static") / "README.md").read_text()
    assert "torch, transformers and compressed-tensors are all it needs" in " ".join(card.split())
    assert "weights int8 per channel" in " ".join(card.split())


TOUCHING = {
    "smoothing": ("  - smoothing: {}\n", "smoothing changes weights"),
    "rotation": ("  - rotation: {}\n", "rotation changes weights"),
    "lora": ("tune: {steps: 2, lora: {rank: 2}}\n", "tune changes weights"),
    "rounding": ("tune: {steps: 2, quantised: w8a8_static}\n", "tune simulates quantisation"),
    "a gate": ("  quantised: {w8a8_static: {max_ratio: 9}}\n", "verify simulates quantisation"),
}


@pytest.mark.parametrize("case", TOUCHING)
def test_what_touches_packed_weights_is_refused_at_plan(case: str, made) -> None:
    added, words = TOUCHING[case]
    recipe = RECIPE.replace("  equivalence: {max_delta_nll: 1.0e-3}\n", "")
    recipe = recipe + added if case == "a gate" else recipe.replace("verify:\n", f"{added}verify:\n")
    found = made("w8a8 static")
    ended = run(found, "w8a8 static", found.root / "refused", recipe)
    assert ended.code == INPUT and words in ended.error and "quantised from" in ended.error
    assert not (found.root / "refused").exists()


def test_a_missing_package_is_named(made, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made("w8a8 static")
    monkeypatch.setattr("surgery.checkpoint.quantised.importlib.util.find_spec", lambda name: None)
    for command in (
        ("plan", found.root / "recipe.yaml", found.source("w8a8 static")),
        ("verify", found.out("w8a8 static")),
        ("scan", found.out("w8a8 static"), "--text", found.root / "text.txt"),
    ):
        ended = surgery_command(*command)
        assert ended.code == INPUT and "pip install compressed-tensors" in ended.error


def ignoring(content: dict) -> dict:
    return {**content, "ignore": ["lm_head", "model.layers.0.mlp.up_proj"]}


TAMPERED = {
    "another layer left out": (ignoring, "quantization_config is not the one that the run wrote"),
    "how to load": (lambda content: {**content, "dequantize": True}, "quantization_config.dequantize"),
    "kernels": (lambda content: {**content, "use_optimized_inference": True}, "use_optimized_inference"),
    "another method": (lambda content: {**content, "quant_method": "fp8"}, "quantization_config"),
    "none": (lambda content: None, "quantization_config is not the one"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_verify_sees_another_quantization_config(case: str, made, tmp_path: Path) -> None:
    change, words = TAMPERED[case]
    out = Path(shutil.copytree(made("w8a8 static").out("w8a8 static"), tmp_path / "out"))
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    edit_json(out / "config.json", quantization_config=change(settings))
    rehash(out)
    ended = surgery_command("verify", out)
    assert ended.code == DAMAGED and ended.error.startswith("config: ") and words in ended.error


@pytest.mark.slow
def test_scan_reads_quantised_sources_and_results(made, tmp_path: Path) -> None:
    found = made("w4a16")
    for root in (found.source("w4a16"), found.out("w4a16")):
        ended = surgery_command(
            "scan", root, "--text", found.root / "text.txt", *MEASURED, "--json", tmp_path / f"{root.name}.json"
        )
        assert ended.code == 0, ended.err
    assert json.loads((tmp_path / f"{root.name}.json").read_text())["n_slots"] == 2


@pytest.mark.slow
def test_an_adapter_is_proven_on_the_model_that_rounds(made, tmp_path: Path) -> None:
    """Not on one of its unpacked weights, in which no layer rounds its input."""
    found = made(QUICK)
    asked = ("export", "peft", found.out(QUICK), tmp_path / "adapter", "--original", found.source(QUICK))
    ended = surgery_command(*asked, "--json", tmp_path / "said.json")
    assert ended.code == 0, ended.err
    said = re.search(r"log-probability\| is (\S+),", json.loads((tmp_path / "said.json").read_text())["proof"])
    assert said is not None and float(said[1]) < 0.05


@pytest.mark.slow
def test_head_norms_go_with_a_quantised_source(made) -> None:
    found = made("w8a8 static")
    recipe = RECIPE.replace("verify:\n", "  - head_norm: {}\nverify:\n")
    ended = run(found, "w8a8 static", found.root / "normed", recipe)
    assert ended.code == 0, ended.err
    ended = surgery_command("verify", found.root / "normed", "--against", found.source("w8a8 static"))
    assert ended.code == 0, ended.err


@pytest.mark.slow
def test_slots_are_tuned_through_what_layers_round(made) -> None:
    found = made("w8a8 static")
    recipe = RECIPE.replace("  equivalence: {max_delta_nll: 1.0e-3}\n", "").replace(
        "verify:\n", "tune: {steps: 4, length: 32, held_out: 2, evaluate_every: 2, warmup: 0, batch: 2}\nverify:\n"
    )
    ended = run(found, "w8a8 static", found.root / "tuned", recipe, "--calibration", found.root / "text.txt")
    assert ended.code == 0, ended.err
    assert sha256_of(found.source("w8a8 static") / SINGLE) == sha256_of(found.root / "tuned" / KEPT)


def test_gradients_pass_what_is_rounded(made) -> None:
    from surgery.live.roundings import straight_through

    model = load_original(made("w8a8 static").source("w8a8 static"))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    values = torch.linspace(-1, 1, 32)[None].requires_grad_()
    plain = layer(values)
    assert not plain.requires_grad
    with straight_through(model):
        passed = layer(values)
        assert torch.equal(passed, plain)
        passed.sum().backward()
    torch.testing.assert_close(values.grad[0], layer.weight.sum(0))
    assert torch.equal(layer(values), plain)
    with steady(model):
        assert torch.equal(layer(values), plain)  # static scales have no edge
