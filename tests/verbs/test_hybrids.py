"""Every verb on a hybrid: gated delta nets and attention in turn (Qwen3-Next), and Mamba-2 beside it (Falcon-H1)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.families import families
from helpers.measured import Notes
from helpers.tiny import build, one_thread
from helpers.tiny_checkpoint import edit_json, save_tokenizer, sha256_of_files, surgery_command, write_text
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import SourceError, UnsupportedModel
from surgery.report.summary import summary

CHUNKS = surgery.Chunking(8, 32)
GATES = {
    "equivalence": {"max_delta_nll": 1e-3}, "perplexity": {"max_ratio": 9.0}, "massive_activations": {"max": 10**6},
    "quantised": {"w8a8_static": {"max_ratio": 99.0}}, "streaming": {"window": 16, "max_ratio": 99.0},
}  # fmt: skip
FOLD = {"attention_bias": {"prefix": [1, 5]}}
TUNE = {"steps": 3, "length": 32, "batch": 2, "learning_rate": 0.02, "objectives": {"lm": 1.0}}
ADDED = "model-attention-bias.safetensors"


@dataclass(frozen=True)
class Hybrid:
    """A source, its conversion and the verdict, and the text that both were measured on."""

    source: Path
    out: Path
    verdict: dict
    text: Path
    calibration: Path


@pytest.fixture(scope="module", params=["qwen3_next", pytest.param("falcon_h1", marks=pytest.mark.slow)])
def hybrid(request, tmp_path_factory) -> Hybrid:
    root = tmp_path_factory.mktemp(request.param)
    text, calibration = write_text(root / "text.txt", 2000, 1), write_text(root / "calibration.txt", 4000, 0)
    family = families()[request.param]
    with one_thread(), family.default_dtype():
        config = family.config(vocab_size=320, bos_token_id=0, eos_token_id=1, pad_token_id=None)
        build(config).to(torch.bfloat16).save_pretrained(root / "source", max_shard_size="60KB")
        save_tokenizer(root / "source", text)
        gates = GATES if request.param == "falcon_h1" else {k: v for k, v in GATES.items() if k != "quantised"}
        recipe = {"surgery": 1, "operations": [FOLD], "verify": gates}
        given = {"text": text, "calibration": calibration, "chunking": CHUNKS}
        verdict = surgery.run(recipe, root / "source", root / "out", **given)
    return Hybrid(root / "source", root / "out", json.loads(json.dumps(verdict)), text, calibration)


def test_a_run_is_exact_and_verify_computes_it_again(hybrid: Hybrid) -> None:
    assert hybrid.verdict["passed"]
    assert {"remembered inputs", "slots"} <= {check["name"] for check in hybrid.verdict["integrity"]["checks"]}
    with one_thread():
        again = surgery.verify(hybrid.out, against=hybrid.source, text=hybrid.text, chunking=CHUNKS)
    assert again["passed"] and "tensors again" in {check["name"] for check in again["integrity"]["checks"]}


@pytest.mark.slow
def test_layer_by_layer_it_is_the_same_to_the_bit(hybrid: Hybrid, tmp_path: Path) -> None:
    recipe = {"surgery": 1, "operations": [FOLD]}
    least = surgery.plan(recipe, hybrid.source).memory()["least"]
    with one_thread():
        surgery.run(recipe, hybrid.source, tmp_path / "out", verify=False, memory=least)
        surgery.run(recipe, hybrid.source, tmp_path / "resident", verify=False)
    files, others = sha256_of_files(tmp_path / "out"), sha256_of_files(tmp_path / "resident")
    shards = [name for name in files if name.endswith(".safetensors")]
    assert ADDED in shards and all(files[name] == others[name] for name in shards)


def test_a_scan_has_attention_where_there_is_some(hybrid: Hybrid) -> None:
    with one_thread():
        found = surgery.scan(hybrid.out, text=hybrid.text, chunking=surgery.Chunking(2, 32))
    attending = [layer for layer, row in enumerate(found["layers"]) if row.get("sink_score")]
    assert attending == sorted(int(site.split(".")[1]) + 1 for site in surgery_config(hybrid)["sites"])
    said = " ".join(summary(found, "out"))
    assert ("4 blocks (1 with attention)" in said) == (len(attending) == 1), said


def test_a_scan_says_what_states_remember(hybrid: Hybrid) -> None:
    given = ("--text", hybrid.text, "--chunks", 2, "--chunk-length", 32)
    with one_thread():
        ended = surgery_command("scan", hybrid.out, *given)
    shown = " ".join(ended.out.split())
    assert ended.code == 0 and "States layer mixer" in shown and "lead: how much of what such a layer gives" in shown
    least = surgery.plan({"surgery": 1, "operations": [FOLD]}, hybrid.source).memory()["least"]
    with one_thread():
        whole, layers = (
            surgery.scan(hybrid.out, text=hybrid.text, chunking=surgery.Chunking(2, 32), memory=memory)["layers"]
            for memory in (None, least)
        )
    mixed = [row for row in whole if row.get("mixer")]
    assert mixed and all(row["lead_near"] > 0 and row["state_rest"] > 0 for row in mixed)
    assert json.dumps(whole) == json.dumps(layers)


@pytest.mark.slow
def test_what_is_kept_of_a_survey_is_taken_up(hybrid: Hybrid, tmp_path: Path) -> None:
    recipe = {"surgery": 1, "operations": [FOLD], "verify": {"perplexity": {"max_ratio": 9.0}}}
    given = {"text": hybrid.text, "chunking": CHUNKS, "surveys": True, "resume": tmp_path / "steps"}
    notes = Notes()
    with one_thread():
        found = [surgery.run(recipe, hybrid.source, tmp_path / name, reporter=notes, **given) for name in ("a", "b")]
    assert "what the original measures is taken up" in " ".join(notes.seen)
    assert found[0]["surveys"][0]["layers"] == found[1]["surveys"][0]["layers"]


def test_tuning_runs_on_it(hybrid: Hybrid, tmp_path: Path) -> None:
    recipe = {
        "surgery": 1, "operations": [FOLD], "tune": TUNE, "verify": {"perplexity": {"max_ratio": 99.0}},
    }  # fmt: skip
    given = {"text": hybrid.text, "calibration": hybrid.calibration, "chunking": CHUNKS}
    with one_thread():
        verdict = surgery.run(recipe, hybrid.source, tmp_path / "out", **given)
    assert verdict["passed"] and verdict["tuning"]["losses"]


@pytest.mark.parametrize("engine", ["peft", "vllm", "mlx"])
def test_engines_that_know_slots_alone_refuse(hybrid: Hybrid, engine: str, tmp_path: Path) -> None:
    ended = surgery_command("export", engine, hybrid.out, tmp_path / "export", "--original", hybrid.source)
    assert ended.code == 2 and "more of its prefix than slots" in ended.error and not (tmp_path / "export").exists()


@pytest.mark.parametrize("what", ["zeros", "missing", "swapped", "undeclared", "width"])
def test_what_is_wrong_with_remembered_inputs_is_seen(hybrid: Hybrid, what: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(hybrid.out, out)
    tensors, config = load_file(out / ADDED), json.loads((out / "config.json").read_text(encoding="utf-8"))
    one, other = [name for name in tensors if ".remembered_inputs." in name][:2]
    if what == "zeros":
        tensors[one] = torch.zeros_like(tensors[one])
    elif what == "missing":
        del tensors[one]
    elif what == "swapped":
        tensors[one], tensors[other] = tensors[other], tensors[one]
    else:
        mixers = config["eab"]["mixers"]
        first = next(iter(mixers))
        if what == "undeclared":
            del mixers[first]
        else:
            mixers[first]["inputs"] = {"hidden_states": 7}
        edit_json(out / "config.json", eab=config["eab"])
    save_file(tensors, out / ADDED, metadata={"format": "pt"})
    ended = surgery_command("verify", out)
    assert ended.code == 3, ended.out + ended.err


def test_norms_go_where_there_is_attention(hybrid: Hybrid) -> None:
    attending = {int(site.split(".")[1]) for site in surgery_config(hybrid)["sites"]}
    without = sorted(set(range(4)) - attending)
    for layer in without[:1]:
        with pytest.raises(SourceError, match=f"layer {layer} has no attention"):
            surgery.plan({"surgery": 1, "operations": [{"head_norm": {"layers": [layer]}}]}, hybrid.source)


def surgery_config(hybrid: Hybrid) -> dict:
    return json.loads((hybrid.out / "config.json").read_text(encoding="utf-8"))["eab"]


def test_a_converted_model_is_no_source(hybrid: Hybrid, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:
        surgery.plan({"surgery": 1, "operations": [FOLD]}, hybrid.out)
    assert isinstance(caught.value, surgery.SurgeryError) and not isinstance(caught.value, UnsupportedModel)


def test_a_plan_counts_what_remembers(hybrid: Hybrid) -> None:
    planned = surgery.plan({"surgery": 1, "operations": [FOLD]}, hybrid.source).to_dict()
    mixers = surgery_config(hybrid)["mixers"]
    assert planned["mixers"] == len(mixers) and planned["n_slots"] == 2 and "indexers" not in planned
    added = [name for name, one in planned["tensors"].items() if one["status"] == "added"]
    assert sum(".remembered_inputs." in name for name in added) == len(mixers)
