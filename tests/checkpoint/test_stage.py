"""An output is complete or absent, whatever happens on the way; and its manifest can be trusted to be well-formed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from surgery.checkpoint import stage as stage_module
from surgery.checkpoint.disk import free_space, human, require_space, require_target
from surgery.checkpoint.layout import read_layout
from surgery.checkpoint.manifest import MANIFEST, Manifest, build_manifest, read_manifest
from surgery.checkpoint.stage import Stage
from surgery.errors import DamagedCheckpoint, NoSpace, OutputError, SourceError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def one_sentence(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    for word in words:
        assert word in message


def test_what_is_published_is_what_was_added(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"abc" * 100)
    out = tmp_path / "out"
    with Stage(out) as stage:
        assert stage.path.parent.parent == tmp_path and stage.path.parent.name.startswith(".out.surgery-")
        stage.add_file(tmp_path / "weights", "copied")
        stage.add_file(tmp_path / "weights", "linked", link=True)
        stage.add_text("README.md", "ünï\n")
        stage.add_json("config.json", {"b": 1, "a": "ü"})
        (stage.path / "extra").mkdir()
        (stage.path / "extra" / "by_hand.txt").write_bytes(b"x")
        hashes = stage.hashes()
        assert not out.exists()
        assert stage.publish() == out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "weights"]
    contents = {name: (out / name).read_bytes() for name in hashes}
    assert hashes == {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in contents.items()}
    assert set(hashes) == {"README.md", "config.json", "copied", "linked", "extra/by_hand.txt"}
    assert contents["copied"] == contents["linked"] == b"abc" * 100
    assert json.loads(contents["config.json"]) == {"a": "ü", "b": 1}
    assert os.path.samefile(out / "linked", tmp_path / "weights")
    assert not os.path.samefile(out / "copied", tmp_path / "weights")


def test_tensors_keep_names_values_dtypes_and_order(tmp_path: Path) -> None:
    tensors = {
        "z": torch.randn(3, 4).T,
        "half": torch.randn(5).to(torch.bfloat16),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(2, 2, dtype=torch.float16)),
    }
    with Stage(tmp_path / "out") as stage:
        stage.add_tensors("model.safetensors", tensors)
        stage.publish()
    path = tmp_path / "out" / "model.safetensors"
    loaded = load_file(path)
    assert list(read_layout(tmp_path / "out").tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor.detach())


def test_a_file_edited_after_it_was_added_is_hashed_again(tmp_path: Path) -> None:
    with Stage(tmp_path / "out") as stage:
        stage.add_text("config.json", "old")
        (stage.path / "config.json").write_text("newer")
        assert stage.hashes()["config.json"] == {"sha256": sha256(b"newer"), "bytes": 5}


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o600)
    before = os.umask(0o027)
    try:
        with Stage(tmp_path / "out") as stage:
            stage.add_file(tmp_path / "secret", "copied")
            stage.add_tensors("model.safetensors", {"x": torch.zeros(2)})
            stage.publish()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {"copied": 0o640, "model.safetensors": 0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), rename(a, b)))
    with Stage(tmp_path / "out") as stage:
        stage.add_text("a", "1")
        hidden = str(stage.path)
        stage.publish()
    at = calls.index("rename")
    assert set(calls[:at]) == {hidden, f"{hidden}/a"} and calls[at + 1 :] == [str(tmp_path)]


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), SystemExit(1)])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), Stage(tmp_path / "out") as stage:
        stage.add_text("a", "1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_nobody_published(tmp_path: Path) -> None:
    with Stage(tmp_path / "out") as stage:
        stage.add_text("a", "1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_clean_up(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import signal, sys, time\nfrom pathlib import Path\nfrom surgery.checkpoint.stage import Stage\n"
        # Whoever started the tests in the background has them ignored, for children too.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "with Stage(Path(sys.argv[1])) as stage:\n    stage.add_text('a', 'x' * 1000)\n"
        "    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    assert len(list(tmp_path.iterdir())) == 1
    child.send_signal(number)
    child.stdout.close()
    assert child.wait(timeout=30) != 0
    assert list(tmp_path.iterdir()) == []


def test_signal_handlers_are_given_back_and_other_threads_work(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stage(tmp_path / "one"):
        pass
    assert signal.getsignal(signal.SIGTERM) is before
    done: list[Path] = []

    def work() -> None:
        with Stage(tmp_path / "two") as stage:
            done.append(stage.publish())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [tmp_path / "two"]


def test_existing_targets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("directory", "file", "dangling"):
        with pytest.raises(OutputError) as caught, Stage(tmp_path / name):
            raise AssertionError("opened")
        one_sentence(caught, name, "exists already")


def test_targets_without_a_home_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for parent in ("missing", "file"):
        with pytest.raises(OutputError) as caught, Stage(tmp_path / parent / "out"):
            raise AssertionError("opened")
        one_sentence(caught, parent, "not a directory")


def test_a_read_only_parent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError) as caught, Stage(tmp_path / "out"):
        raise AssertionError("opened")
    one_sentence(caught, str(tmp_path), "not writable")
    monkeypatch.setattr(os, "access", lambda *_: True)  # what root is told of a read-only filesystem's directory

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(OutputError) as caught, Stage(tmp_path / "out"):
        raise AssertionError("opened")
    one_sentence(caught, "out", "Read-only file system")
    monkeypatch.undo()
    with pytest.raises(OutputError) as caught, Stage(Path("/proc/out")):  # nobody may write there, root included
        raise AssertionError("opened")
    one_sentence(caught, "/proc")


def test_a_target_inside_the_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source" / "deep").mkdir(parents=True)
    for target in ("source/out", "source/deep/out"):
        with pytest.raises(OutputError) as caught:
            require_target(tmp_path / target, tmp_path / "source")
        one_sentence(caught, "inside the source")
    require_target(tmp_path / "source-eab", tmp_path / "source")


@pytest.mark.parametrize("appeared", ["directory", "empty", "file"])
def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path, appeared: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError) as caught, Stage(out) as stage:
        stage.add_text("a", "1")
        if appeared == "file":
            out.write_text("theirs")
        else:
            out.mkdir()
            if appeared == "directory":
                (out / "theirs").write_text("")
        stage.publish()
    one_sentence(caught, str(out), "appeared")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert out.is_file() or not (out / "a").exists()


def test_names_are_plain_and_written_once(tmp_path: Path) -> None:
    with Stage(tmp_path / "out") as stage:
        for name in ("../x", "/etc/x", "a/b", "", "..", "a\nb"):
            with pytest.raises(OutputError) as caught:
                stage.add_text(name, "")
            one_sentence(caught, "not a plain file name")
        stage.add_text("config.json", "{}")
        with pytest.raises(OutputError) as caught:
            stage.add_json("config.json", {})
        one_sentence(caught, "config.json", "twice")
        with pytest.raises(SourceError) as caught:
            stage.add_file(tmp_path / "gone", "gone")
        one_sentence(caught, "gone", "cannot be read")


def test_hard_links_across_filesystems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")

    def cross(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", cross)
    with pytest.raises(OutputError) as caught, Stage(tmp_path / "out") as stage:
        stage.add_file(tmp_path / "a", "a", link=True)
    one_sentence(caught, "hard-linked", "one filesystem", "without hard links")


def test_links_into_the_hub_cache_link_the_blob(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("x")
    (tmp_path / "shard").symlink_to("blob")
    with Stage(tmp_path / "out") as stage:
        stage.add_file(tmp_path / "shard", "shard", link=True)
        stage.publish()
    assert not (tmp_path / "out" / "shard").is_symlink()
    assert os.path.samefile(tmp_path / "out" / "shard", tmp_path / "blob")


@pytest.mark.parametrize("what", ["file", "tensors", "text"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    (tmp_path / "big").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(stage_module, "_create", lambda path: (path.touch(), open("/dev/full", "wb"))[1])
    with pytest.raises(NoSpace) as caught, Stage(tmp_path / "out") as stage:
        if what == "file":
            stage.add_file(tmp_path / "big", "big")
        elif what == "tensors":
            stage.add_tensors("t.safetensors", {"x": torch.zeros(1 << 18)})
        else:
            stage.add_text("t", "x" * (1 << 20))
    one_sentence(caught, "out", "disk filled up", "free")
    assert [entry.name for entry in tmp_path.iterdir()] == ["big"]


def test_a_disk_that_others_fill_up_is_no_space_too(tmp_path: Path) -> None:
    """A disk that fills up under other writers raises NoSpace too."""
    with pytest.raises(NoSpace) as caught, Stage(tmp_path / "out"), open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    one_sentence(caught, "disk filled up")
    assert list(tmp_path.iterdir()) == []


def test_space_is_asked_for_in_human_units(tmp_path: Path) -> None:
    free = free_space(tmp_path / "not" / "there" / "yet")
    assert free > 0
    require_space(tmp_path, 1)
    with pytest.raises(NoSpace) as caught:
        require_space(tmp_path / "out", 10**18)
    one_sentence(caught, "out", "1000000.0 TB", "free")
    assert [human(n) for n in (0, 999, 1500, 2_500_000, 538_090_408, 3 * 10**12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "538.1 MB",
        "3.0 TB",
    ]


@pytest.mark.parametrize("across", [False, True])
def test_what_failed_is_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, across: bool) -> None:
    rename = os.rename

    def other_disk(a: Path, b: Path) -> None:
        if Path(b).name == "failed":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(a, b)

    if across:
        monkeypatch.setattr(os, "rename", other_disk)
    with Stage(tmp_path / "out") as stage:
        stage.add_text("a", "1")
        assert stage.keep(tmp_path / "failed") == tmp_path / "failed"
    assert [entry.name for entry in tmp_path.iterdir()] == ["failed"]
    assert (tmp_path / "failed" / "a").read_text() == "1"
    with pytest.raises(OutputError) as caught, Stage(tmp_path / "out") as stage:
        stage.keep(tmp_path / "failed")
    one_sentence(caught, "failed", "exists already")


def test_copying_is_a_stream(tmp_path: Path) -> None:
    """A sparse 256 MiB file passes through a process that may use little more than Python itself."""
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 28)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom surgery.checkpoint.stage import Stage\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with Stage(Path(sys.argv[1]) / 'out') as stage:\n    stage.add_file(Path(sys.argv[1]) / 'big', 'big')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert int(done.stdout) < 64 * 1024  # ru_maxrss is in KiB


FILE = {"sha256": "0" * 64, "bytes": 3}
TENSOR = {"status": "kept", "shard": "model.safetensors", "dtype": "F32", "shape": [2]}


def manifest(**changes: object) -> Manifest:
    parts = {
        "source": {"id": "x"},
        "recipe": {},
        "versions": {"torch": "2"},
        "tensors": {"a": TENSOR},
        "files": {"model.safetensors": FILE},
        "verdict": {"passed": True},
    }
    return build_manifest(**{**parts, **changes})


def test_a_manifest_is_read_back(tmp_path: Path) -> None:
    built = manifest(files={"b": FILE, MANIFEST: FILE, "a/c": FILE}, tensors={"a": {**TENSOR, "shape": (2, 3)}})
    assert list(built.files) == ["a/c", "b"] and built.format == 1
    (tmp_path / MANIFEST).write_text(json.dumps(built.to_dict()))
    assert read_manifest(tmp_path) == built


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        (None, "unverified"),
        ({"passed": False}, "unverified"),
        ({}, "unverified"),
        ({"passed": 1}, "unverified"),
        ({"passed": True}, "verified"),
    ],
)
def test_only_a_verdict_that_passed_verifies(verdict: dict | None, status: str) -> None:
    assert manifest(verdict=verdict).status == status == manifest().concluded(verdict).status


def test_wrong_entries_are_a_bug_of_the_caller() -> None:
    for changes in (
        {"tensors": {"a": {**TENSOR, "status": "moved"}}},
        {"files": {"../x": FILE}},
        {"files": {"x": {"sha256": "0", "bytes": 1}}},
        {"files": {"/x": FILE}},
    ):
        with pytest.raises(ValueError):
            manifest(**changes)


def test_a_missing_manifest_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint) as caught:
        read_manifest(tmp_path)
    one_sentence(caught, MANIFEST, "missing")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": True},
        {"status": "proved"},
        {"files": []},
        {"tensors": None},
        {"verdict": "passed"},
        {"files": {"../../etc/passwd": FILE}},
        {"files": {"x": {"bytes": 1}}},
        {"files": {MANIFEST: FILE}},
        {"files": {"x": {**FILE, "bytes": -1}}},
        {"tensors": {"a": {}}},
        {"source": None},
        {"recipe": 1},
        {"versions": []},
    ],
)
def test_an_invalid_manifest_is_damage(tmp_path: Path, changes: dict) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest().to_dict(), **changes}))
    with pytest.raises(DamagedCheckpoint) as caught:
        read_manifest(tmp_path)
    one_sentence(caught, MANIFEST, "manifest")


@given(
    text=st.text(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).map(json.dumps)
)
def test_no_manifest_text_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    root = tmp_path_factory.mktemp("manifest")
    (root / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DamagedCheckpoint):
        read_manifest(root)
