"""What is in a checkpoint and not in its model: kept, named, and never a reason to compute something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.bench import IDS, Bench
from helpers.tiny_checkpoint import edit_json, surgery_command
from safetensors.torch import load_file, save_file

from surgery.checkpoint.layout import SINGLE

FOREIGN = "mtp.fc.weight"
KEYS = {"_attn_implementation": "owner/repo", "experts_implementation": "owner/repo"}
FLOAT = {"__float__": "Infinity"}


@pytest.fixture
def converted(bench: Bench) -> tuple[Path, Path]:
    """A llama with a foreign tensor, kernels asked for, a special float and embeddings tied but different; and OUT."""
    root = bench.source()
    tensors = load_file(root / SINGLE) | {FOREIGN: torch.arange(6.0).view(2, 3)}
    save_file(tensors, root / SINGLE, {"format": "pt"})
    edit_json(root / "config.json", **KEYS, tie_word_embeddings=True, time_step_limit=[0.0, FLOAT])
    ended = surgery_command(*bench.run(root, IDS, "--no-verify", text=False))
    assert ended.code == 0, ended.err
    notes = [line for line in ended.err.splitlines() if line.strip().startswith("note")]
    assert FOREIGN in notes[0] and "lm_head.weight counts as it is stored" in notes[1]
    return root, bench.out


def test_foreign_tensors_are_kept_and_named(converted: tuple[Path, Path], bench: Bench) -> None:
    root, out = converted
    manifest = json.loads((out / "surgery.json").read_text())
    assert manifest["source"]["not_of_the_model"] == [FOREIGN]
    entry = manifest["tensors"][FOREIGN]
    assert entry["status"] == "kept"
    assert torch.equal(load_file(out / entry["shard"])[FOREIGN], load_file(root / SINGLE)[FOREIGN])
    assert surgery_command("verify", out, "--against", root).code == 0
    shown = surgery_command("plan", bench.root / "recipe.yaml", root, "--json", bench.root / "plan.json")
    assert shown.code == 0 and FOREIGN in shown.out
    planned = json.loads((bench.root / "plan.json").read_text())
    assert planned["not_of_the_model"] == [FOREIGN] and planned["tensors"][FOREIGN]["status"] == "kept"


def test_kernels_stay_behind_and_special_floats_as_they_came(converted: tuple[Path, Path]) -> None:
    root, out = converted
    before, after = (json.loads((at / "config.json").read_text()) for at in (root, out))
    assert not set(KEYS) & set(after) and set(KEYS) <= set(before)
    assert after["time_step_limit"] == [0.0, FLOAT]
