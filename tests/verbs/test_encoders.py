"""`surgery run` on encoders of images: registers become slots, and what comes out loads, verifies and is surveyed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.encoders import (
    BLOCK,
    BLOCKS,
    ENCODERS,
    UNIT,
    config_of,
    marked,
    reference,
    save_encoder,
    save_marked,
    save_pictures,
    save_planted,
)
from helpers.tiny import one_thread
from helpers.tiny_checkpoint import edit_json, save_model, surgery_command
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig

import surgery
from surgery.anatomy.calls import Call, observing
from surgery.anatomy.encoders import examine_encoder
from surgery.converted.described import read_described
from surgery.converted.reading import live_converted
from surgery.errors import RecipeError, SourceError, SurgeryError, UnsupportedModel
from surgery.live.features import Features
from surgery.live.images import load_processor
from surgery.live.model import Live
from surgery.live.port import port_of
from surgery.live.stream import stream
from surgery.survey import patches, register_neurons

FEW = surgery.Chunking(6)
ANY = {"fidelity": {"min_cls": -0.99, "min_patches": -0.99}}
WITH_REGISTERS = [kind for kind, (_, _, registers) in ENCODERS.items() if registers]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    save_marked(root / "pictures", 12)
    save_encoder(root / "with", "dinov2_with_registers")
    save_planted(root / "planted")
    return root


def recipe(*operations: dict, **verify: object) -> dict:
    return {"surgery": 1, "operations": [*operations], "verify": {**ANY, **verify}}


FROM_REGISTERS = {"attention_bias": {"from": "registers"}}
FROM_MASSIVE = {"attention_bias": {"from": "massive_tokens"}}


def tower(root: Path):
    anatomy = read_described(root).anatomy
    return live_converted(root, anatomy, port=port_of(anatomy))


# ---- what is exact


@pytest.mark.parametrize("kind", WITH_REGISTERS)
def test_of_one_image_registers_and_slots_are_the_same(kind: str, tmp_path: Path) -> None:
    """Of the image that the means are over, slots are its registers' own keys and values: the same features."""
    source = save_encoder(tmp_path / kind, kind)
    # Of several copies the mean is the one: a gate wants more than one image.
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        for index in range(3):
            marked(3).save(tmp_path / place / f"{index}.png")
    found = surgery.run(
        recipe(FROM_REGISTERS), source, tmp_path / "out", images=tmp_path / "a", calibration=tmp_path / "b",
        chunking=surgery.Chunking(3),
    )  # fmt: skip
    registers = ENCODERS[kind][2]
    assert found is not None and found["passed"]
    assert found["fidelity"]["cls"]["mean"] > 1 - 1e-9 and found["fidelity"]["patches"]["mean"] > 1 - 1e-9
    length = found["fidelity"]["length"]
    assert length["original"] - length["converted"] == registers == found["estimated"]["n_slots"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_register_tokens"] == 0 and config["eab"]["sees_all"] is True


def test_slots_are_means_over_the_calibration_images(ground: Path, tmp_path: Path) -> None:
    found = surgery.run(
        recipe(FROM_REGISTERS), ground / "with", tmp_path / "out", images=ground / "pictures", chunking=FEW
    )
    assert found is not None and found["passed"]
    calibration = sorted((ground / "pictures").iterdir())[::2][:6]
    read = found["provenance"]["texts"]
    assert [file["name"] for file in read["calibration"]] == [path.name for path in calibration]
    assert not {file["sha256"] for file in read["calibration"]} & {file["sha256"] for file in read["evaluation"]}
    model = AutoModel.from_pretrained(ground / "with", attn_implementation="sdpa").eval()
    calls: list[Call] = []
    pixels = torch.stack([as_pixels(path) for path in calibration])
    with torch.no_grad(), observing(calls.append):
        model(pixel_values=pixels)
    tensors = load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    assert len(calls) == BLOCKS and len(tensors) == 2 * BLOCKS
    for index, call in enumerate(calls):
        for part, states in (("key", call.key), ("value", call.value)):
            wanted = states[:, :, 1:5].double().mean(dim=0).transpose(0, 1)  # (registers, heads, dim)
            stored = tensors[f"encoder.layer.{index}.attention.attention_bias.{part}"]
            assert torch.allclose(stored.double(), wanted, atol=1e-5)


def as_pixels(path: Path) -> torch.Tensor:
    processor = load_processor(path.parent.parent / "with")
    return processor(Image.open(path), return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("kind", [k if k == "dinov2" else pytest.param(k, marks=pytest.mark.slow) for k in ENCODERS])
def test_each_type_attends_to_its_slots(
    kind: str, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every site of what was written is softmax over slots and keys, by a plain reference in float64."""
    monkeypatch.setattr(patches, "HIGH", 1.02)  # in tiny random encoders few tokens stand out
    source = save_encoder(tmp_path / kind, kind)
    found = surgery.run(recipe(FROM_MASSIVE), source, tmp_path / "out", images=ground / "pictures", chunking=FEW)
    assert found is not None and found["passed"], found
    verified = surgery.verify(tmp_path / "out", against=source, images=ground / "pictures")
    assert verified["passed"] and verified["fidelity"] == found["fidelity"]
    live = tower(tmp_path / "out")
    seen: list[tuple[Call, torch.Tensor]] = []
    pixels = torch.randn(2, 3, *live.anatomy.patching.size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), observing(None, lambda call, output: seen.append((call, output))):
        live.trunk(**live.port.given(live, pixels))
    assert len(seen) == BLOCKS
    for call, output in seen:
        wanted = reference(call)
        assert torch.allclose(output.double(), wanted, atol=1e-5)
        assert not torch.allclose(output.double(), reference(call, slots=False), atol=1e-3)


# ---- test-time registers


def test_a_register_neuron_is_found_and_left_out(ground: Path, tmp_path: Path) -> None:
    found = surgery.run(
        recipe({"registers": {}}, FROM_REGISTERS), ground / "planted", tmp_path / "out", images=ground / "pictures",
        chunking=FEW,
    )  # fmt: skip
    assert found is not None and found["passed"]
    assert [(one["block"], one["unit"]) for one in found["register_neurons"]["neurons"]] == [(BLOCK, UNIT)]
    before, after = (
        surgery.scan(root, images=ground / "pictures", chunking=FEW)["layers"][2]
        for root in (ground / "planted", tmp_path / "out")
    )
    assert before["patch_norm_max"] > 10 * after["patch_norm_max"] and before["high_norm"] > 0 == after["high_norm"]
    up = f"encoder.layer.{BLOCK}.mlp.fc1.weight"
    old = load_file(ground / "planted" / "model.safetensors")
    new = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {up, up.replace("weight", "bias")}  # so that nothing large enters the down projection either
    others = [unit for unit in range(len(old[up])) if unit != UNIT]
    assert torch.equal(old[up][others], new[up][others]) and not new[up][UNIT].any()
    assert surgery.verify(tmp_path / "out", against=ground / "planted", images=ground / "pictures")["passed"]
    new[up][0, 0] += 1
    save_file(new, tmp_path / "out" / "model-00001-of-00002.safetensors", {"format": "pt"})
    assert not surgery.verify(tmp_path / "out", against=ground / "planted")["passed"]


def test_a_test_time_register_takes_the_spike(ground: Path, tmp_path: Path) -> None:
    """It enters the first block as zeros and is gone behind the last: nothing outside sees it, no weight changes."""
    found = surgery.run(
        recipe({"registers": {"neurons": 1}}), ground / "planted", tmp_path / "out", images=ground / "pictures",
        chunking=FEW,
    )  # fmt: skip
    assert (
        found is not None and found["passed"] and not (tmp_path / "out" / "model-00002-of-00002.safetensors").exists()
    )
    source, written = (root / "model.safetensors" for root in (ground / "planted", tmp_path / "out"))
    assert source.read_bytes() == written.read_bytes()
    rows = surgery.scan(tmp_path / "out", images=ground / "pictures", chunking=FEW)["layers"]
    assert rows[0]["register_norm"] == 0 and rows[-1]["register_norm"] > 10 * rows[-1]["patch_norm_max"]
    assert surgery.verify(tmp_path / "out", against=ground / "planted", images=ground / "pictures")["passed"]
    # By hand: the largest activation of a token goes to the register, and no other token has any.
    live, model = tower(tmp_path / "out"), AutoModel.from_pretrained(ground / "planted").eval()
    mlp, pixels = model.encoder.layer[BLOCK].mlp, torch.stack([as_pixels(ground / "pictures" / "00.png")] * 2)

    def moved(module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states = args[0].clone()
        states[:, 1, UNIT] = states[:, :, UNIT].gather(1, states[:, :, UNIT].abs().argmax(1, keepdim=True))[:, 0]
        states[:, 0, UNIT], states[:, 2:, UNIT] = 0, 0
        return (states,)

    def longer(module: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = args[0] if args else kwargs["hidden_states"]
        grown = torch.cat([states[:, :1], torch.zeros_like(states[:, :1]), states[:, 1:]], dim=1)
        return ((grown, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": grown})

    mlp.fc2.register_forward_pre_hook(moved)
    model.encoder.layer[0].register_forward_pre_hook(longer, with_kwargs=True)
    with torch.no_grad():
        wanted, got = model(pixel_values=pixels)[0], live.trunk(pixel_values=pixels)[0]
    assert got.shape[1] == wanted.shape[1] - 1
    assert torch.allclose(got, torch.cat([wanted[:, :1], wanted[:, 2:]], dim=1), atol=1e-5)


# ---- smoothing, norms, classifiers


def test_smoothing_and_norms_leave_an_encoder_what_it_was(ground: Path, tmp_path: Path) -> None:
    operations = recipe(
        {"smoothing": {"inputs": ["norm"]}}, {"head_norm": {}}, fidelity={"min_cls": 0.9999, "min_patches": 0.9999},
        quantised_features={"w8a8_static": {"min_cosine": 0.5}},
    )  # fmt: skip
    found = surgery.run(operations, ground / "planted", tmp_path / "out", images=ground / "pictures", chunking=FEW)
    assert found is not None and found["passed"] and found["quantised_features"]["w8a8_static"]["original"]["cls"]
    assert surgery.verify(tmp_path / "out", against=ground / "planted", images=ground / "pictures")["passed"]


def save_classifier(root: Path, ground: Path) -> Path:
    settings = {key: value for key, value in config_of("vit").items() if key != "model_type"}
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(ViTConfig(**settings, num_labels=7)).save_pretrained(root)
    shutil.copy(ground / "with" / "preprocessor_config.json", root)
    return root


@pytest.mark.slow
def test_a_classifier_stays_one(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "HIGH", 1.02)
    source = save_classifier(tmp_path / "vit", ground)
    found = surgery.run(
        recipe(FROM_MASSIVE, top1={"min_share": 0.1}), source, tmp_path / "out", images=ground / "pictures",
        chunking=FEW,
    )  # fmt: skip
    assert found is not None and found["passed"] and found["top1"]["images"] == 6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["EabViTForImageClassification"] and config["eab"]["trunk"] == "ViTModel"
    program = (
        "import json, sys, torch\nfrom transformers import AutoModelForImageClassification as A, AutoImageProcessor\n"
        "model = A.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "AutoImageProcessor.from_pretrained(sys.argv[1])\n"
        "assert 'surgery' not in sys.modules\n"
        "logits = model(pixel_values=torch.ones(1, 3, 32, 32)).logits\n"
        "print(json.dumps([type(model).__name__, logits.tolist()]))"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, "-I", "-c", program, str(tmp_path / "out")], check=True, env=environment, cwd=tmp_path,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    name, logits = json.loads(told.splitlines()[-1])
    live = tower(tmp_path / "out")
    with torch.no_grad():
        ours = live.model(pixel_values=torch.ones(1, 3, 32, 32)).logits
    assert name == "EabViTForImageClassification" and torch.allclose(torch.tensor(logits), ours, atol=1e-6)


# ---- what is refused


def refusals(ground: Path, root: Path) -> dict[str, tuple]:
    text = root / "text.txt"
    text.write_text("words " * 2000)
    pictures = {"images": ground / "pictures", "chunking": FEW}
    return {
        "no registers": (FROM_REGISTERS, "planted", pictures, "has no registers by its config; put the operation"),
        "registers twice": ({"registers": {}}, "with", pictures, "has 4 registers already"),
        "text for an encoder": (FROM_REGISTERS, "with", {"text": text}, "is an encoder of images, which reads no text"),
        "both": (FROM_REGISTERS, "with", {**pictures, "text": text}, "take one of them away"),
        "no images": (FROM_REGISTERS, "with", {}, "verification needs images: give --images DIR"),
        "no images at all": (FROM_REGISTERS, "with", {"verify": False}, "takes its means over images"),
        "too few images": (FROM_REGISTERS, "with", {"images": ground / "pictures"}, "6 images, and 64 are to be read"),
        "a prefix": ({"attention_bias": {"prefix": [3]}}, "with", pictures, "each of its tokens sees all others"),
        "an encoder's slots": (FROM_REGISTERS, "llama", pictures, "no part of it reads images alone"),
        "images for text": ({"attention_bias": {"prefix": [3]}}, "llama", pictures, "reads no --images; give --text"),
    }


@pytest.mark.parametrize("case", list(refusals(Path(), Path("/tmp"))))
def test_what_does_not_go_together_is_one_sentence(case: str, ground: Path, tmp_path: Path) -> None:
    operation, name, given, words = refusals(ground, tmp_path)[case]
    source = save_model(tmp_path / "llama") if name == "llama" else ground / name
    with pytest.raises(SurgeryError) as caught:
        surgery.run({"surgery": 1, "operations": [operation]}, source or tmp_path / "llama", tmp_path / "out", **given)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_gates_are_of_what_a_model_reads(ground: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"asks for verify.perplexity, which is not for an encoder"):
        surgery.run(
            recipe(FROM_REGISTERS, perplexity={"max_ratio": 1.1}), ground / "with", tmp_path / "out",
            images=ground / "pictures", chunking=FEW,
        )  # fmt: skip
    with pytest.raises(SourceError, match=r"verify.top1: the checkpoint is no classifier"):
        surgery.run(
            recipe(FROM_REGISTERS, top1={"min_share": 0.5}), ground / "with", tmp_path / "out",
            images=ground / "pictures", chunking=FEW,
        )  # fmt: skip
    save_model(tmp_path / "llama")
    with pytest.raises(RecipeError, match=r"asks for verify.fidelity, which is not for a language model"):
        surgery.plan(
            {"surgery": 1, "operations": [{"attention_bias": {"prefix": [3]}}], "verify": {"fidelity": {}}},
            tmp_path / "llama",
        )


def test_a_gate_that_fails_publishes_nothing(ground: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "surgery: 1\noperations:\n  - attention_bias: {from: registers}\n"
        "verify: {fidelity: {min_cls: 1.0, min_patches: 1.0}}\n"
    )
    ended = surgery_command(
        "run", tmp_path / "r.yaml", ground / "with", tmp_path / "out", "--images", ground / "pictures", "--chunks", 6
    )
    assert ended.code == 1 and not (tmp_path / "out").exists()
    assert "cosine of CLS with the original's" in " ".join(ended.out.split())


def test_registers_that_are_not_as_the_config_says(ground: Path, tmp_path: Path) -> None:
    shutil.copytree(ground / "with", tmp_path / "odd")
    edit_json(tmp_path / "odd" / "config.json", num_register_tokens=3)  # the tensor has 4
    with pytest.raises(SurgeryError, match="do not fit its config.json"):
        surgery.run(
            recipe(FROM_REGISTERS), tmp_path / "odd", tmp_path / "out", images=ground / "pictures", chunking=FEW
        )


def test_nothing_to_do_is_said(ground: Path, tmp_path: Path) -> None:
    save_pictures(tmp_path / "plain", 12)
    found = surgery.run(
        recipe(FROM_MASSIVE), save_encoder(tmp_path / "vit", "vit"), tmp_path / "out", images=tmp_path / "plain",
        chunking=FEW,
    )  # fmt: skip
    assert found is not None and found["passed"] is None and "stands out" in found["nothing_to_do"]
    assert not (tmp_path / "out").exists()


def test_features_are_of_cls_and_patches(ground: Path) -> None:
    model = AutoModel.from_pretrained(ground / "with").eval()
    anatomy = examine_encoder(config_of("dinov2_with_registers"))
    live = Live(model, anatomy, port_of(anatomy))
    found = Features(live)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    stream(live, pixels, [found])
    with torch.no_grad():
        out = model(pixel_values=pixels).last_hidden_state
    wanted = torch.cat([out[:, :1], out[:, 5:]], dim=1)
    assert torch.allclose(torch.stack(found.found), wanted, atol=1e-6)
    assert torch.equal(found.of_image, torch.stack(found.found)[:, 0])
    with pytest.raises(UnsupportedModel, match="no registers"):
        surgery.plan(recipe(FROM_REGISTERS), ground / "planted")


def test_an_encoder_is_not_exported(ground: Path, tmp_path: Path) -> None:
    surgery.run(recipe(FROM_REGISTERS), ground / "with", tmp_path / "out", images=ground / "pictures", chunking=FEW)
    for engine in ("peft", "mlx", "vllm"):
        with pytest.raises(SurgeryError) as caught:
            surgery.export(engine, tmp_path / "out", tmp_path / engine, original=ground / "with")
        assert "is an encoder, and exports are for language models" in str(caught.value)


@pytest.mark.slow
def test_without_proof_and_from_kept_steps(ground: Path, tmp_path: Path) -> None:
    found = surgery.run(
        recipe(FROM_REGISTERS), ground / "with", tmp_path / "out", calibration=ground / "pictures",
        images=ground / "pictures", chunking=FEW, verify=False,
    )  # fmt: skip
    assert found is not None and found["passed"] is None and found["gates"] == []
    kept = dict(resume=tmp_path / "steps", images=ground / "pictures", chunking=FEW, surveys=True)
    first, again = (
        surgery.run(recipe(FROM_REGISTERS), ground / "with", tmp_path / name, **kept) for name in ("a", "b")
    )
    assert first is not None and again is not None and first["fidelity"] == again["fidelity"]
    assert [survey["images"]["registers"] for survey in first["surveys"]] == [4, 0]
    assert {image["name"] for image in first["surveys"][1]["norm_maps"]["images"]} <= {f"{i:02}.png" for i in range(12)}


# ---- what stands around an encoder


def easily(monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiny random encoders few tokens stand out, and no unit is all that makes them."""
    monkeypatch.setattr(patches, "HIGH", 1.02)
    monkeypatch.setattr(register_neurons, "SELECTIVE", 0.5)
    monkeypatch.setattr(register_neurons, "GROWS", -1.0)


@pytest.mark.parametrize(
    "kind", ["siglip", *(pytest.param(k, marks=pytest.mark.slow) for k in ("vit", "clip", "llava", "dpt", "ijepa"))]
)
def test_nothing_outside_of_the_blocks_sees_a_register(
    kind: str, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any type, with CLS or without: the hidden states of all layers are as many as they were."""
    easily(monkeypatch)
    source = save_encoder(tmp_path / kind, kind)
    found = surgery.run(
        recipe({"registers": {"neurons": 2}}), source, tmp_path / "out", images=ground / "pictures", chunking=FEW
    )
    assert found is not None and found["passed"], found
    live, pixels = tower(tmp_path / "out"), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        out = live.trunk(pixel_values=pixels, output_hidden_states=True)
    tokens = ENCODERS[kind][1] + 16
    assert {states.shape[1] for states in out.hidden_states} == {tokens} == {out[0].shape[1]}
    scanned = surgery.scan(tmp_path / "out", images=ground / "pictures", chunking=FEW, interventions=True)
    assert scanned["images"]["registers"] == 1 and not any("error" in row for row in scanned["interventions"])


def test_what_counts_its_tokens_takes_no_register(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    easily(monkeypatch)
    source = save_encoder(tmp_path / "beit", "beit")
    with pytest.raises(UnsupportedModel, match=r"beit: its blocks do not take one token more .*; leave registers out"):
        surgery.run(
            recipe({"registers": {"neurons": 2}}), source, tmp_path / "out", images=ground / "pictures", chunking=FEW
        )


@pytest.mark.parametrize("kind", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_a_text_tower_beside_it_stays_what_it_was(
    kind: str, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    easily(monkeypatch)
    source = save_encoder(tmp_path / kind, kind)
    surgery.run(recipe(FROM_MASSIVE), source, tmp_path / "out", images=ground / "pictures", chunking=FEW)
    model, ids = tower(tmp_path / "out").model, torch.tensor([[1, 7, 9, 2], [1, 5, 2, 0]])
    before, mask = AutoModel.from_pretrained(source).eval(), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            ours, theirs = (
                one.get_text_features(input_ids=ids, attention_mask=mask).pooler_output for one in (model, before)
            )
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_interventions_on_what_was_converted(ground: Path, tmp_path: Path) -> None:
    surgery.run(recipe(FROM_REGISTERS), ground / "with", tmp_path / "out", images=ground / "pictures", chunking=FEW)
    rows = surgery.scan(tmp_path / "out", images=ground / "pictures", chunking=FEW, interventions=True)["interventions"]
    assert rows and all(row["fidelity"] is not None for row in rows)


@pytest.mark.slow
def test_test_time_registers_can_be_exported_and_trained(ground: Path, tmp_path: Path) -> None:
    surgery.run(
        recipe({"registers": {"neurons": 1}}), ground / "planted", tmp_path / "out", images=ground / "pictures",
        chunking=FEW,
    )  # fmt: skip
    model, pixels = tower(tmp_path / "out").model, torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (), {"pixel_values": pixels}).module()
    with torch.no_grad():
        wanted = model(pixel_values=pixels).last_hidden_state
        assert torch.allclose(exported(pixel_values=pixels).last_hidden_state, wanted, atol=1e-5)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(pixel_values=pixels).last_hidden_state.square().mean().backward()
        gradients.append(model.embeddings.cls_token.grad.clone())
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].any()
