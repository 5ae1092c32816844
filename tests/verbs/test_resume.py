"""Runs that are cut off and resumed: finished steps are not done again, and the files are those of one undisturbed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers.measured import Notes
from helpers.memory import least
from helpers.tiny import one_thread
from helpers.tiny_checkpoint import save_model, save_tokenizer, sha256_of_files, surgery_command, write_text

import surgery
from surgery.checkpoint.stage import Stage
from surgery.errors import OutputError
from surgery.progress import Reporter
from surgery.steps import operate
from surgery.steps import resume as resuming

RECIPE = {
    "surgery": 1,
    "operations": [{"attention_bias": {"prefix": "auto", "max_slots": 2}}, {"head_norm": {}}],
    "verify": {
        "equivalence": {"max_delta_nll": 1e-3}, "perplexity": {"max_ratio": 9.0}, "massive_activations": {"max": 10**6},
        "quantised": {"kv4": {"max_ratio": 99.0}}, "agreement": {"min_share": 0.01},
    },
}  # fmt: skip
DATED = ("surgery.json", "README.md")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A source with a massive activation, texts, and a run that nobody disturbed."""
    root = tmp_path_factory.mktemp("ground")
    (root / "source").mkdir()
    write_text(root / "calibration.txt", 4000, 0)
    write_text(root / "evaluation.txt", 2000, 1)
    save_tokenizer(root / "source", root / "calibration.txt")
    save_model(root / "source", massive=0, shard_size="60KB")
    run(root, root / "undisturbed", None)
    return root


def run(ground: Path, out: Path, steps: Path | None, **given):
    return surgery.run(**{
        "recipe": RECIPE, "source": ground / "source", "out": out, "text": ground / "evaluation.txt", "surveys": True,
        "calibration": ground / "calibration.txt", "chunking": surgery.Chunking(8, 32), "resume": steps, **given,
    })  # fmt: skip


def same(out: Path, ground: Path) -> None:
    """All files are those of the run that nobody disturbed, and of the manifest all but when and where it was made."""
    ours, theirs = sha256_of_files(out), sha256_of_files(ground / "undisturbed")
    assert {name: one for name, one in ours.items() if name not in DATED} == {
        name: one for name, one in theirs.items() if name not in DATED
    }
    manifests = [json.loads((one / "surgery.json").read_text()) for one in (out, ground / "undisturbed")]
    for manifest in manifests:
        del manifest["provenance"]["date"], manifest["files"]["README.md"]
    assert manifests[0] == manifests[1]


class Cut(BaseException):
    pass


@pytest.mark.parametrize("step", [*resuming.STEPS, "publish"])
@pytest.mark.parametrize("memory", [None, pytest.param("least", marks=pytest.mark.slow)])
def test_a_run_that_is_cut_off_goes_on(step, memory, ground, tmp_path, monkeypatch):
    """After each step, and at the very end."""
    steps, out, done = tmp_path / "steps", tmp_path / "out", []
    given = {} if memory is None else {"memory": least(ground / "source")}

    def cut(self, name, work, once=resuming.KeptSteps.once):
        found = once(self, name, work)
        done.append(name)
        if name == step:
            raise Cut
        return found

    with monkeypatch.context() as patched:
        patched.setattr(resuming.KeptSteps, "once", cut)
        if step == "publish":
            patched.setattr(Stage, "publish", lambda stage: (_ for _ in ()).throw(Cut()))
        with pytest.raises(Cut):
            run(ground, out, steps, **given)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    taken = {"search": ["search"], "operated": ["operated"]}.get(step, ["operated", "original"])
    if "operated" in taken:
        monkeypatch.setattr(operate, "live_original", None)  # not reached
    verdict = run(ground, out, steps, reporter=(notes := Notes()), **given)
    assert [note for note in notes.seen if "is taken up" in note or "are taken up" in note] == [
        f"{resuming.STEPS[name]} is taken up from {steps}" for name in taken
    ]
    assert verdict["passed"]
    same(out, ground)


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("recipe", {"recipe": {**RECIPE, "operations": [{"attention_bias": {"prefix": [1, 5]}}]}}),
        pytest.param("evaluation text", {"chunking": surgery.Chunking(6, 32)}, marks=pytest.mark.slow),
        pytest.param("options", {"surveys": False}, marks=pytest.mark.slow),
        pytest.param("source", {}, marks=pytest.mark.slow),
    ],
)
def test_steps_of_another_run_are_not_taken_up(what, changed, ground, tmp_path):
    steps = tmp_path / "steps"
    run(ground, tmp_path / "first", steps)
    if what == "source":
        shutil.copytree(ground, tmp_path / "ground", ignore=shutil.ignore_patterns("undisturbed"))
        weights = sorted((tmp_path / "ground" / "source").glob("*.safetensors"))[-1]
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
        ground = tmp_path / "ground"
    notes = Notes()
    run(ground, tmp_path / "second", steps, reporter=notes, **changed)
    (note,) = [note for note in notes.seen if "steps of another run" in note]
    assert what in note and "which are not taken up, and go" in note
    assert not [note for note in notes.seen if "is taken up" in note]
    run(ground, tmp_path / "third", steps, reporter=(notes := Notes()), **changed)
    assert [note for note in notes.seen if "is taken up" in note], "and its own are, from then on"


def test_a_step_that_is_damaged_is_done_again(ground, tmp_path):
    steps = tmp_path / "steps"
    run(ground, tmp_path / "first", steps)
    for step in steps.glob("*.step"):
        step.write_bytes(step.read_bytes()[:-40])
    run(ground, tmp_path / "second", steps, reporter=(notes := Notes()))
    assert sum("cannot be taken up" in note and "done again" in note for note in notes.seen) == 3
    same(tmp_path / "second", ground)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_step_of_a_stranger_runs_nothing(ground, tmp_path):
    steps = tmp_path / "steps"
    run(ground, tmp_path / "first", steps)
    torch.save(Hostile(tmp_path / "touched"), steps / "search.step")
    (steps / "operated.step").write_bytes(pickle.dumps(Hostile(tmp_path / "touched")))
    torch.save({"module": Stage}, steps / "original.step")
    run(ground, tmp_path / "second", steps, reporter=(notes := Notes()))
    assert not (tmp_path / "touched").exists()
    assert sum("cannot be taken up" in note for note in notes.seen) == 3
    same(tmp_path / "second", ground)


def test_two_runs_cannot_share_a_directory(ground, tmp_path):
    with resuming.keeping(tmp_path / "steps", Reporter()):
        with pytest.raises(OutputError, match=r"another run is at work in .*steps \(--resume\); wait for it"):
            run(ground, tmp_path / "out", tmp_path / "steps")
    run(ground, tmp_path / "out", tmp_path / "steps")


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_cannot_be_kept_is_said_and_the_run_goes_on(number, ground, tmp_path, monkeypatch):
    steps, out, save = tmp_path / "steps", tmp_path / "out", torch.save

    def full(value, path):
        if not isinstance(value, tuple):  # what operations made
            path.write_bytes(b"some")
            raise OSError(number, os.strerror(number), str(path))
        save(value, path)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        run(ground, out, steps, reporter=(notes := Notes()))
    assert [note for note in notes.seen if note.startswith("what the operations made is not kept for --resume: ")]
    assert {path.name for path in steps.iterdir()} == {"steps.json", "lock", "search.step", "original.step"}
    same(out, ground)


def test_a_directory_with_other_things_is_left_alone(ground, tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "part.step").write_text("of a machine")
    with pytest.raises(OutputError, match="holds other files and no steps.json; give an empty directory"):
        run(ground, tmp_path / "out", tmp_path / "steps")
    assert (tmp_path / "steps" / "part.step").read_text() == "of a machine"
    (tmp_path / "all").mkdir()
    (tmp_path / "all").chmod(0o777)
    with pytest.raises(OutputError, match="can be written by all; give one of your own"):
        run(ground, tmp_path / "out", tmp_path / "all")


@pytest.mark.slow
def test_a_pipe_in_the_place_of_a_step_does_not_hang(ground, tmp_path):
    steps = tmp_path / "steps"
    run(ground, tmp_path / "first", steps)
    (steps / "search.step").unlink()
    (steps / "operated.step").unlink()
    os.mkfifo(steps / "operated.step")
    run(ground, tmp_path / "second", steps, reporter=(notes := Notes()))
    assert sum("cannot be taken up" in note for note in notes.seen) == 1
    same(tmp_path / "second", ground)


def test_where_it_may_be(ground, tmp_path):
    options = ("--text", ground / "evaluation.txt", "--chunks", 8, "--chunk-length", 32)
    for steps in (ground / "source" / "steps", tmp_path / "out"):
        ended = surgery_command("run", "eab", ground / "source", tmp_path / "out", *options, "--resume", steps)
        assert ended.code == 2 and "--resume" in ended.error
    assert not (ground / "source" / "steps").exists()
