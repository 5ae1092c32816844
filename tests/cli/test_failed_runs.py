"""Runs that fail half-way, or at a gate: what the exit code says, and what is left on the disk."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.bench import GATED, IDS, INPUT, Bench, refused, snapshot
from helpers.tiny_checkpoint import RECIPE, surgery_command

from surgery.checkpoint import stage
from surgery.checkpoint.layout import read_layout
from surgery.operations import attention_bias
from surgery.steps import operate

# ---- the machine


def test_no_disk_space_is_found_before_weights_are_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(operate, "live_original", None)  # not reached
    refused(bench, bench.run(), INPUT, "1.0 MB free", "out")


def test_a_read_only_target_is_found_before_weights_are_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.os, "access", lambda path, mode: Path(path) != bench.root)
    monkeypatch.setattr(operate, "live_original", None)  # not reached
    refused(bench, bench.run(), INPUT, "not writable")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("nth", [1, 3])
def test_a_disk_that_fails_in_the_middle_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, nth: int, code: int
) -> None:
    create, created = stage._create, []

    def failing(path: Path):
        created.append(path)
        if len(created) == nth:
            create(path).close()
            raise OSError(code, "no luck", str(path))
        return create(path)

    monkeypatch.setattr(stage, "_create", failing)
    words = ("filled up", "free some space") if code == errno.ENOSPC else ("cannot be written", "out")
    refused(bench, bench.run(bench.source("sharded")), INPUT, *words)
    assert len(created) == nth


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("a bug"), 70), (KeyboardInterrupt(), 130), (SystemExit(143), 143)]
)
def test_an_operation_that_fails_half_way_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fold(*arguments):
        raise error

    monkeypatch.setattr(attention_bias, "fold", fold)
    before = snapshot(bench.place.root)
    ended = surgery_command(*bench.run())
    assert ended.code == code  # none of those that a CI job takes for a verdict: 0, 1, 2, 3
    assert ("Traceback" in ended.err) == (code == 70)
    assert [path.name for path in bench.root.iterdir()] == ["recipe.yaml"]
    assert snapshot(bench.place.root) == before


@pytest.mark.parametrize("options", [(), ("--no-verify",)])
def test_a_fold_that_is_not_exact_is_never_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    fold = attention_bias.fold

    def wrong(*arguments):
        found = fold(*arguments)
        moved = {name: part + 0.5 * name.endswith(".key") for name, part in found.tensors.items()}
        return replace(found, tensors=moved)

    monkeypatch.setattr(attention_bias, "fold", wrong)
    refused(bench, bench.run(None, RECIPE, *options), INPUT, "random token ids", "not exact")


# ---- gates


def test_a_failed_gate_exits_1_and_publishes_nothing(bench: Bench) -> None:
    result = bench.root / "verdict.json"
    ended = surgery_command(*bench.run(None, GATED, "--json", result))
    assert ended.code == 1
    assert "gate perplexity" in ended.error and "0.01" in ended.error
    assert sorted(path.name for path in bench.root.iterdir()) == ["recipe.yaml", "verdict.json"]
    verdict = json.loads(result.read_text())
    assert verdict["passed"] is False and verdict["integrity"]["passed"] is True
    assert {gate["name"]: gate["passed"] for gate in verdict["gates"]} == {
        "equivalence": True, "perplexity": False, "massive_activations": True,
    }  # fmt: skip


def test_what_failed_is_kept_where_asked_for_and_marked(bench: Bench) -> None:
    kept = bench.root / "failed"
    ended = surgery_command(*bench.run(None, GATED, "--keep-failed", kept))
    assert ended.code == 1 and str(kept) in ended.error
    assert sorted(path.name for path in bench.root.iterdir()) == ["failed", "recipe.yaml"]
    manifest = json.loads((kept / "surgery.json").read_text())
    assert manifest["status"] == "unverified" and manifest["verdict"]["passed"] is False
    assert read_layout(kept).tensors


def test_without_proof_the_manifest_says_so(bench: Bench) -> None:
    source = bench.source()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    result = bench.root / "verdict.json"
    ended = surgery_command(*bench.run(source, IDS, "--no-verify", "--json", result, text=False))
    assert ended.code == 0, ended.err
    manifest = json.loads((bench.out / "surgery.json").read_text())
    assert manifest["status"] == "unverified" and manifest["verdict"]["passed"] is None
    assert json.loads(result.read_text())["passed"] is None
    assert surgery_command("verify", bench.out, "--against", source).code == 0


def test_an_older_result_never_passes_for_this_one(bench: Bench) -> None:
    result = bench.file("verdict.json", '{"passed": true}')
    assert surgery_command(*bench.run(bench.root / "nowhere", RECIPE, "--json", result)).code == INPUT
    assert not result.exists()
