"""Shards of the source with other values in them: what was to change changed, and not a byte else."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from surgery.checkpoint.header import BITS, TensorInfo
from surgery.checkpoint.layout import INDEX, SINGLE, read_layout
from surgery.checkpoint.manifest import Manifest, TensorEntry
from surgery.checkpoint.stage import Stage
from surgery.checkpoint.values import as_stored, dtype_code
from surgery.checkpoint.writing import plan_file
from surgery.errors import SourceError
from surgery.steps.recipe import Recipe
from surgery.verification.against import kept_tensors

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, bytes], dict[str, dict], dict[str, TensorInfo]]:
    """Files, index and tensors of a checkpoint in one to three shards, some of it in dtypes that nobody changes."""
    files, weight_map, infos = {}, {}, {}
    for number in range(draw(st.integers(1, 3))):
        shard = f"part-{number}.safetensors"
        dtypes = st.sampled_from([*FLOATS, "I64", "U8", "F8_E4M3"])
        tensors = draw(st.lists(st.tuples(dtypes, SHAPES), min_size=1, max_size=4))
        entries = [(f"t{number}.{i}", dtype, shape) for i, (dtype, shape) in enumerate(tensors)]
        header, found = plan_file(shard, entries, draw(st.sampled_from([None, {"format": "pt"}])))
        size = sum(info.nbytes for info in found.values())
        files[shard] = header + draw(st.binary(min_size=size, max_size=size))
        weight_map |= dict.fromkeys(found, shard)
        infos |= found
    return files, {"metadata": {}, "weight_map": weight_map}, infos


@settings(deadline=None, max_examples=60)
@given(checkpoints(), st.data())
def test_only_what_was_to_change_changes(tmp_path_factory: pytest.TempPathFactory, checkpoint, data) -> None:
    files, index, infos = checkpoint
    root = tmp_path_factory.mktemp("source")
    (root / INDEX).write_text(json.dumps(index))
    for shard, content in files.items():
        (root / shard).write_bytes(content)
    layout = read_layout(root)
    able = sorted(name for name, info in infos.items() if info.dtype in FLOATS)
    chosen = data.draw(st.sets(st.sampled_from(able))) if able else set()
    values = {}
    for name in chosen:
        dtype = data.draw(st.sampled_from([FLOATS[infos[name].dtype], torch.float32, torch.float64]))
        values[name] = torch.randn(infos[name].shape, dtype=dtype)
    with Stage(root / "out") as stage:
        for shard in files:
            inside = {name: value for name, value in values.items() if infos[name].shard == shard}
            stage.add_changed(layout, shard, f"new-{shard}", inside)
        hashes = stage.hashes()
        stage.publish()
    for shard, content in files.items():
        written = (root / "out" / f"new-{shard}").read_bytes()
        assert hashes[f"new-{shard}"] == {"sha256": hashlib.sha256(written).hexdigest(), "bytes": len(content)}
        expected = bytearray(content)
        for name, value in values.items():
            if infos[name].shard == shard:
                stored = value.to(FLOATS[infos[name].dtype]).reshape(-1).view(torch.uint8)
                expected[infos[name].start : infos[name].stop] = stored.numpy().tobytes()
        assert written == bytes(expected)
        assert (root / shard).read_bytes() == content, "the source is never written to"


def source(root: Path, tensors: dict[str, torch.Tensor]) -> Path:
    root.mkdir()
    save_file(tensors, root / SINGLE, {"format": "pt"})
    return root


def test_a_changed_shard_is_a_file_of_its_own(tmp_path: Path) -> None:
    root = source(tmp_path / "source", {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)})
    (root / SINGLE).chmod(0o600)
    with Stage(tmp_path / "out") as stage:
        stage.add_changed(
            read_layout(root), SINGLE, "new.safetensors", {"b": torch.nn.Parameter(torch.full((2,), 0.3))}
        )
        stage.publish()
    new = tmp_path / "out" / "new.safetensors"
    assert not os.path.samefile(new, root / SINGLE) and new.stat().st_mode & 0o044
    loaded = load_file(new)
    assert torch.equal(loaded["a"], torch.ones(3))
    assert torch.equal(loaded["b"], torch.full((2,), 0.3).bfloat16())
    assert load_file(root / SINGLE)["b"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("missing", torch.ones(3), ["missing", "no such tensor"]),
        ("half", torch.ones(4), ["half", "[4]", "[3]"]),
        ("half", torch.ones(1, 3), ["half", "[1, 3]"]),
        ("half", torch.tensor([1.0, 70000.0, 1.0]), ["half", "F16", "overflow"]),
        ("brain", torch.full((3,), 3.4e38), ["brain", "BF16", "overflow"]),
        ("whole", torch.ones(3), ["whole", "I64"]),
        ("half", torch.ones(3, dtype=torch.int64), ["half", "F16", "int64"]),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, name, value, words) -> None:
    tensors = {"half": torch.ones(3).half(), "brain": torch.ones(3).bfloat16(), "whole": torch.ones(3).long()}
    root = source(tmp_path / "source", tensors)
    good = {"half": torch.zeros(3)} if name != "half" else {"brain": torch.zeros(3)}
    with pytest.raises(SourceError) as caught, Stage(tmp_path / "out") as stage:
        stage.add_changed(read_layout(root), SINGLE, SINGLE, {**good, name: value})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and all(word in message for word in words), message


def test_another_shard_is_not_searched(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    for name in "ab":
        save_file({name: torch.ones(2)}, root / f"{name}.safetensors")
    (root / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    with Stage(tmp_path / "out") as stage, pytest.raises(SourceError, match="a.safetensors has no such tensor"):
        stage.add_changed(read_layout(root), "a.safetensors", "a.safetensors", {"b": torch.zeros(2)})


def test_values_that_were_not_finite_before_are_no_overflow() -> None:
    info = TensorInfo("x", "F16", (2,), SINGLE, 0, 4)
    assert as_stored(info, torch.tensor([float("inf"), 1.0])).tolist() == [float("inf"), 1.0]
    assert {dtype_code(dtype) for dtype in FLOATS.values()} == set(FLOATS) < set(BITS)


@pytest.mark.slow
def test_only_changed_tensors_are_in_memory(tmp_path: Path) -> None:
    """A sparse shard of 256 MiB passes through a process that may use little more than torch itself."""
    header, infos = plan_file(SINGLE, [("big", "F32", (1 << 26,)), ("small", "F32", (4,))])
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(header)
        file.truncate(infos["small"].stop)
    code = (
        "import resource, sys, torch\nfrom pathlib import Path\nfrom surgery.checkpoint.layout import read_layout\n"
        "from surgery.checkpoint.stage import Stage\nroot = Path(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with Stage(root / 'out') as stage:\n"
        "    stage.add_changed(read_layout(root), 'model.safetensors', 'm', {'small': torch.ones(4)})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert int(done.stdout) < 64 * 1024  # ru_maxrss is in KiB


# ---- integrity


def looked_at(tmp_path: Path, recipe: dict, new: dict[str, torch.Tensor], status: dict[str, str]) -> tuple[bool, str]:
    original = read_layout(source(tmp_path / "source", {"a": torch.ones(3), "b": torch.ones(2, 2)}))
    layout = read_layout(source(tmp_path / "new", {"a": torch.ones(3), "b": torch.ones(2, 2), **new}))
    entries = {name: TensorEntry.model_construct(status=became) for name, became in status.items()}
    changes = bool(recipe) and Recipe.model_validate(recipe).changes_weights
    changeable = set(original.tensors) if changes else set()
    return kept_tensors(layout, Manifest.model_construct(tensors=entries), original, False, changeable)


SMOOTHING = {"surgery": 1, "operations": [{"attention_bias": {}}, {"smoothing": {}}]}
OTHER = {"surgery": 1, "operations": [{"attention_bias": {}}]}
DIFFERENT = torch.full((2, 2), 2.0)


@pytest.mark.parametrize(
    ("recipe", "new", "status", "says"),
    [
        (SMOOTHING, {"b": DIFFERENT}, {"a": "kept", "b": "changed"}, None),
        (SMOOTHING, {}, {"a": "kept", "b": "kept"}, None),
        (SMOOTHING, {}, {"a": "kept", "b": "changed"}, "b is said to be changed"),
        (SMOOTHING, {"b": DIFFERENT}, {"a": "kept", "b": "kept"}, "b is not byte-identical"),
        (SMOOTHING, {"b": torch.ones(4)}, {"a": "kept", "b": "changed"}, "b is F32 of shape"),
        (SMOOTHING, {"b": DIFFERENT.half()}, {"a": "kept", "b": "changed"}, "b is F16 of shape"),
        (SMOOTHING, {"c": DIFFERENT}, {"a": "kept", "b": "kept", "c": "changed"}, "c is said to be of the source"),
        (OTHER, {"b": DIFFERENT}, {"a": "kept", "b": "changed"}, "b of the source is not kept"),
        ({}, {"b": DIFFERENT}, {"a": "kept", "b": "changed"}, "b of the source is not kept"),
    ],
)
def test_changed_means_changed_by_an_operation_in_place(tmp_path: Path, recipe, new, status, says) -> None:
    passed, detail = looked_at(tmp_path, recipe, new, status)
    assert passed is (says is None) and (says or "tensors byte-identical") in detail
    if passed and new:
        assert "1 changed" in detail
