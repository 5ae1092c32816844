"""Recipes that tune and smooth: planned, run, cut off and resumed, shared among processes, verified, tampered with."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.tiny import one_thread, tiny_text
from helpers.tiny_checkpoint import MEASURED, Ended, Place, rehash, sha256_of_files, surgery_command
from peft import PeftModel
from safetensors.torch import load_file, save_file

from surgery.checkpoint.layout import read_layout
from surgery.checkpoint.manifest import read_manifest
from surgery.converted.reading import load_converted
from surgery.tuning import loop

OPERATIONS = """surgery: 1
operations:
  - attention_bias: {prefix: ["<s>", "\\n"]}
  - smoothing: {}
  - head_norm: {gate: 1, per_head: true}
"""
VERIFY = """verify:
  perplexity: {max_ratio: 3.0}
  massive_activations: {max: 1000000}
  quantised: {w8a8_static: {max_ratio: 3.0}}
"""
TUNE = """tune:
  steps: 6
  length: 32
  held_out: 2
  warmup: 0
  evaluate_every: 3
  quantised: w8a8_static
  objectives: {lm: 1.0}
  lora: {rank: 2, targets: [q_proj, down_proj]}
"""
SLOTS_ONLY = """surgery: 1
operations:
  - attention_bias: {prefix: ["<s>", "\\n"]}
tune: {steps: 3, length: 32, held_out: 2, evaluate_every: 3, objectives: {lm: 1.0}}
verify: {perplexity: {max_ratio: 3.0}, massive_activations: {max: 1000000}}
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


def run(place: Place, recipe: str, root: Path, *options, source: Path | None = None) -> Ended:
    """`surgery run` of the recipe into root/out; its verdict is root/v.json."""
    root.mkdir(exist_ok=True)
    (root / "recipe.yaml").write_text(recipe)
    return surgery_command(
        "run", root / "recipe.yaml", source or place.source, root / "out", "--text", place.text, *MEASURED,
        "--json", root / "v.json", *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(place: Place, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tuned")
    ended = run(place, OPERATIONS + TUNE + VERIFY, root, "--adapter", root / "adapter", "--tuning", root / "state")
    assert ended.code == 0, ended.out + ended.err
    assert "held-out perplexity" in ended.out and "\nkept  " in ended.out
    return root


def statuses(root: Path) -> dict[str, str]:
    return {name: entry.status for name, entry in read_manifest(root).tensors.items()}


def values(root: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in read_layout(root).shards for name, t in load_file(root / shard).items()}


def test_what_was_trained_is_what_is_written(place: Place, tuned: Path) -> None:
    verdict = json.loads((tuned / "v.json").read_text())
    found = verdict["tuning"]
    assert [entry["step"] for entry in found["held_out"]] == [0, 3, 6] and len(found["losses"]) == 6
    assert found["best_step"] > 0 and found["stopped"] is None
    assert [gate["name"] for gate in verdict["gates"]] == ["perplexity", "quantised.w8a8_static", "massive_activations"]
    before, after = values(place.source), values(tuned / "out")
    changed = {name for name, status in statuses(tuned / "out").items() if status == "changed"}
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in changed), name
    trained = {name for name in changed if "q_proj" in name or "down_proj" in name}
    assert len(trained) == 4
    for name in changed - trained:  # smoothed alone, or q_proj would not be among the trained
        powers = (after[name] / before[name]).log2()
        assert torch.equal(powers, powers.round())
    ratio = after["model.layers.0.self_attn.head_norm.weight"]
    assert ratio.shape == (4, 8) and "model.layers.0.self_attn.head_norm.gate" not in after
    card = (tuned / "out" / "README.md").read_text()
    assert "In exact arithmetic" not in card


def test_the_plan_names_what_may_change(place: Place, tuned: Path) -> None:
    ended = surgery_command("plan", tuned / "recipe.yaml", place.source, "--json", tuned / "plan.json")
    assert ended.code == 0 and "may change" in ended.out
    planned = {name: t["status"] for name, t in json.loads((tuned / "plan.json").read_text())["tensors"].items()}
    found = statuses(tuned / "out")
    assert planned.keys() == found.keys()
    for name, status in found.items():
        assert planned[name] == status or planned[name] == "may change", name
    assert {name for name, status in planned.items() if status == "changed"} == {
        name for name in planned if "q_proj" in name or "down_proj" in name
    }


def test_verify_takes_it_and_notices_what_was_put_back(place: Place, tuned: Path, tmp_path: Path) -> None:
    texts = ("--text", place.text, "--calibration", place.text, *MEASURED)
    ended = surgery_command("verify", tuned / "out", "--against", place.source, *texts)
    assert ended.code == 0, ended.out + ended.err
    copy = tmp_path / "copy"
    shutil.copytree(tuned / "out", copy)
    layout = read_layout(copy)
    name = "model.layers.1.mlp.down_proj.weight"
    shard = layout.tensors[name].shard
    tensors = load_file(copy / shard)
    save_file({**tensors, name: values(place.source)[name]}, copy / shard, {"format": "pt"})
    rehash(copy)
    assert surgery_command("verify", copy).code == 0  # alone, nothing tells
    assert f"{name} is said to be changed" in surgery_command("verify", copy, "--against", place.source).error


def test_changed_shards_are_written_anew_and_the_source_kept(place: Place, tmp_path: Path) -> None:
    """Shards that change are written anew. The source is not touched."""
    before = sha256_of_files(place.sharded)
    ended = run(place, OPERATIONS + TUNE + VERIFY, tmp_path, "--link", source=place.sharded)
    assert ended.code == 0, ended.out + ended.err
    assert sha256_of_files(place.sharded) == before
    changed = {n for n, status in statuses(tmp_path / "out").items() if status == "changed"}
    layout = read_layout(tmp_path / "out")
    assert changed and all((tmp_path / "out" / layout.tensors[name].shard).stat().st_nlink == 1 for name in changed)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_to_the_same_files(
    place: Place, tuned: Path, tmp_path: Path, monkeypatch
) -> None:
    step = loop.Loop._step

    def cut(self, number: int) -> None:
        if number == 4:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(loop.Loop, "_step", cut)
    ended = run(place, OPERATIONS + TUNE + VERIFY, tmp_path, "--tuning", tmp_path / "state")
    assert ended.code == 130 and sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "state"]
    monkeypatch.undo()
    other = TUNE.replace("length: 32", "length: 16")
    ended = run(place, OPERATIONS + other + VERIFY, tmp_path, "--tuning", tmp_path / "state")
    assert ended.code == 2 and "is of another run (its tune differs)" in ended.error and "load" not in ended.err
    ended = run(place, OPERATIONS + TUNE + VERIFY, tmp_path, "--tuning", tmp_path / "state")
    assert ended.code == 0, ended.out + ended.err
    weights = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    for name in weights:
        assert (tmp_path / "out" / name).read_bytes() == (tuned / "out" / name).read_bytes()


@pytest.mark.slow
def test_training_that_helps_nothing_is_left_out_and_said(place: Place, tmp_path: Path, monkeypatch) -> None:
    judgements = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(loop, "held_out_nll", lambda *_: next(judgements))
    recipe = SLOTS_ONLY.replace("steps: 3,", "steps: 3, lora: {rank: 2},")
    ended = run(place, recipe, tmp_path)
    assert ended.code == 0, ended.out + ended.err
    assert "what is written is untuned" in " ".join(ended.err.split())
    assert set(statuses(tmp_path / "out").values()) == {"added", "kept"}
    assert surgery_command("verify", tmp_path / "out", "--against", place.source).code == 0


def test_the_adapter_loads_onto_the_model_that_was_not_tuned(place: Place, tmp_path: Path) -> None:
    ended = run(place, SLOTS_ONLY, tmp_path / "tuned", "--adapter", tmp_path / "adapter")
    assert ended.code == 0, ended.out + ended.err
    tokens = tiny_text()
    wanted = load_converted(tmp_path / "tuned" / "out")(input_ids=tokens).logits
    plain = load_converted(place.converted)
    assert not torch.allclose(plain(input_ids=tokens).logits, wanted, atol=1e-4)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(adapted(input_ids=tokens).logits, wanted)


@pytest.mark.slow
def test_an_adapter_is_written_only_with_what_it_belongs_to(place: Place, tmp_path: Path) -> None:
    recipe = SLOTS_ONLY.replace("massive_activations: {max: 1000000}", "quantised: {w8a8_static: {max_ratio: 0.01}}")
    ended = run(place, recipe, tmp_path, "--adapter", tmp_path / "adapter")
    assert ended.code == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "v.json"]
    ended = run(place, recipe, tmp_path, "--adapter", tmp_path / "adapter", "--keep-failed", tmp_path / "kept")
    assert ended.code == 1 and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "kept" / "config.json").is_file()


@pytest.mark.slow
def test_a_run_on_other_calibration_is_another_run(place: Place, tmp_path: Path) -> None:
    recipe = OPERATIONS + TUNE.replace("steps: 6", "steps: 3") + VERIFY
    assert run(place, recipe, tmp_path, "--tuning", tmp_path / "state").code == 0
    shutil.rmtree(tmp_path / "out")
    ended = run(place, recipe, tmp_path, "--tuning", tmp_path / "state", "--chunks", 2)
    assert ended.code == 2 and "is of another run (its calibration chunks differs)" in ended.error


@pytest.mark.slow
def test_two_processes_of_accelerate_write_what_one_writes(place: Place, tmp_path: Path) -> None:
    recipe = SLOTS_ONLY.replace("tune: {steps: 3,", "  - smoothing: {}\n  - head_norm: {gate: 1}\ntune: {steps: 3,")
    recipe = recipe.replace("objectives: {lm: 1.0}", "objectives: {kl: 0.5, hidden: 1.0}, lora: {rank: 2}")
    ended = run(place, recipe, tmp_path / "one")
    assert ended.code == 0, ended.out + ended.err
    command = ["run", tmp_path / "one" / "recipe.yaml", place.source, tmp_path / "two", "--text", place.text, *MEASURED]
    command += ["--tuning", tmp_path / "state"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        2,
        "--num_machines",
        1,
    ]
    # What accelerate is told of precision does not count: the recipe says it.
    launch += ["--mixed_precision", "bf16", "--dynamo_backend", "no", "--main_process_port", port, "-m", "surgery"]
    done = subprocess.run(
        [str(word) for word in (*launch, *command)], capture_output=True, text=True, timeout=300,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Integrity") == 1  # one process speaks
    one, two = values(tmp_path / "one" / "out"), values(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_text_comes_from_a_dataset_too(place: Place, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    lines = [line for line in place.text.read_text().splitlines() if line]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"words": line, "ids": [1, 2]}) + "\n" for line in lines))

    def recipe(**settings) -> str:
        return SLOTS_ONLY.replace("tune: {", f"tune: {{dataset: {json.dumps({'name': str(folder), **settings})}, ")

    ended = run(place, recipe(column="words"), tmp_path / "good", "--adapter", tmp_path / "adapter")
    assert ended.code == 0, ended.out + ended.err
    for settings, said in (
        ({"column": "text"}, "has no column 'text'; it has ids, words"),
        ({"column": "ids"}, "holds list, not text"),
        ({"split": "other"}, "cannot be read"),
        ({"column": "words", "characters": 50}, "tune needs 128"),
    ):
        assert said in run(place, recipe(**settings), tmp_path / "bad").error
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'checkpoint-surgery[datasets]'" in run(place, recipe(column="words"), tmp_path / "bad").error


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        (SLOTS_ONLY.replace("tune:", "# tune:"), ("--tuning", "state"), "--tuning .* is for what 'tune'"),
        (OPERATIONS + TUNE.replace("q_proj", "qq_proj"), (), "tune.lora.targets: 'qq_proj' is no linear layer"),
        (OPERATIONS + TUNE.replace("held_out: 2", "held_out: 200"), (), "needs 6464 .200 held-out chunks"),
        (SLOTS_ONLY, ("--adapter", "."), "exists already"),
        (SLOTS_ONLY, ("--adapter", "out"), "would change .*out, which is not for results; .* for --adapter"),
        (SLOTS_ONLY, ("--tuning", "out"), "would change .*out, which is not for results; .* for --tuning"),
        (SLOTS_ONLY.replace("length: 32", "length: 9999"), (), "tune.length is 9999, and after 2 slots the model has"),
        (SLOTS_ONLY, ("--no-verify", "--no-text"), "tune trains on text: give --calibration"),
        (SLOTS_ONLY.replace("steps: 3", "steps: 0"), (), "tune.steps is 0; it must be at least 1"),
        (SLOTS_ONLY.replace("steps: 3, ", ""), (), "the key 'steps' is missing; add 'steps: 300'"),
        (SLOTS_ONLY.replace("lm: 1.0", "kl: 0.0"), (), "has no weight above 0, so there is nothing to lower"),
        ("surgery: 1\noperations: [smoothing: {}]\n", (), "has smoothing alone, which adds nothing"),
        (OPERATIONS.replace("smoothing: {}", "smoothing: {strength: 2}"), (), "smoothing.strength is 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(place: Place, tmp_path: Path, recipe: str, options, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    text = () if "--no-text" in options else ("--text", place.text)
    given = [
        tmp_path / option if option in ("state", "out", ".") else option for option in options if option != "--no-text"
    ]
    ended = surgery_command("run", path, place.source, tmp_path / "out", *text, *MEASURED, *given)
    assert ended.code == 2
    assert re.search(said, ended.error), ended.error
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]
