"""How commands end when the machine, not the input, is at fault; and that nothing told is obeyed by a terminal."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.bench import Bench, refused
from helpers.killed import killed
from helpers.tiny_checkpoint import MEASURED, RECIPE, Place, surgery_command

from surgery.endings.signals import has_published
from surgery.errors import SourceError

FULL = os.strerror(errno.ENOSPC)
NASTY = "a\n\x1b[31mred\u202eslr\x9b"
SHOWN = r"a\n\x1b[31mred\u202eslr\x9b"


@pytest.fixture
def bench(place: Place, tmp_path: Path) -> Bench:
    return Bench(place, tmp_path)


@pytest.fixture
def publishing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list:
    """`surgery run` as if its work was done: OUT is published, and its results are still to be written."""

    def run(recipe: object, source: object, out: Path, *_: object) -> dict:
        shutil.copytree(bench.place.converted, out)
        has_published(out)
        return bench.place.verdict

    monkeypatch.setattr("surgery.verbs.run.run", run)
    return bench.run()


# ---- results that cannot be written


def test_a_full_standard_output_is_told_beside_what_is_done(bench: Bench, publishing: list) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        ended = surgery_command(*publishing, stdout=full)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for what it holds still, when it is closed
    assert ended.code == 2 and "standard output" in ended.error and FULL in ended.error
    assert f"{bench.out} had been written before, complete" in ended.error


def test_a_result_that_does_not_fit_is_told_beside_what_is_done(
    bench: Bench, publishing: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.checkpoint.results._is_written", lambda path: True)  # as a link into a full disk is
    ended = surgery_command(*publishing, "--json", "/dev/full")
    assert ended.code == 2 and "/dev/full cannot be written" in ended.error and str(bench.out) in ended.error


@pytest.mark.parametrize("name", ["found.json", "x" * 255])
def test_a_result_that_is_cut_off_leaves_nothing(
    bench: Bench, publishing: list, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size:
            raise OSError(errno.ENOSPC, FULL)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    ended = surgery_command(*publishing, "--json", bench.root / name)
    assert ended.code == 2 and FULL in ended.error and str(bench.out) in ended.error
    assert sorted(path.name for path in bench.root.iterdir()) == ["out", "recipe.yaml"]


def shell(command: str, *arguments: object) -> subprocess.CompletedProcess:
    script = f'"$0" -m surgery "$@" {command}'
    return subprocess.run(["sh", "-c", script, sys.executable, *map(str, arguments)], capture_output=True, cwd=ROOT)


def test_closed_streams_are_no_bug(tmp_path: Path) -> None:
    killed(tmp_path)
    ended = shell(">&-", "clean", tmp_path)
    assert ended.returncode == 2 and ended.stderr.count(b"\n") == 1 and b"standard output is closed" in ended.stderr
    assert shell("2>&-", "clean", tmp_path).returncode == 0
    assert shell("2>&- >&- <&-", "clean", tmp_path / "nowhere").returncode == 2
    assert shell(">/dev/full 2>/dev/full", "clean", tmp_path).returncode == 2


# ---- errors of the system


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/some/config.json"), 2, "/some/config.json: Permission"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 10_000), 2, "File name too long"),
        (OSError(errno.EIO, "Input/output error"), 2, "Input/output error"),
        (Exception("I/O error: No space left on device (os error 28)"), 2, "No space left on device"),
        (RuntimeError("Symlink loop from '/some/link'"), 2, "/some/link"),
        (OSError(errno.EBADF, "Bad file descriptor"), 70, "bug"),
        (OSError(errno.EINVAL, "Invalid argument", "/some/config.json"), 70, "bug"),
        (OSError("an error of transformers"), 70, "bug"),
    ],
)
def test_errors_of_the_system_are_sentences_and_bugs_stay_bugs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, word: str
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("surgery.verbs.plan.plan", failing)
    ended = surgery_command("plan", bench.place.recipe, bench.place.source)
    assert ended.code == code and word in ended.error and len(ended.error) < 700
    assert ("Traceback" in ended.err) == (code == 70)


def test_a_working_directory_that_is_gone_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> str:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr("surgery.cli.entry.os.getcwd", gone)
    ended = surgery_command("plan", bench.place.recipe, bench.place.source)
    assert ended.code == 2 and "working directory" in ended.error


def test_names_that_cannot_be_written_are_refused_at_once(bench: Bench) -> None:
    for name in ("x" * 256, "x" * 5000, "out\udcff"):
        bench_out = bench.run()
        bench_out[3] = bench.root / name
        refused(bench, bench_out, 2)
    refused(bench, bench.run(None, RECIPE, "--json", bench.root / ("x" * 256)), 2, "too long", "cannot be written")
    (bench.root / "loop").symlink_to("loop")
    refused(bench, bench.run(None, RECIPE, "--json", bench.root / "loop"), 2, "loop")


def test_a_name_in_the_source_that_is_not_utf8_is_refused(bench: Bench) -> None:
    source = bench.source()
    Path(source / "tokenizer\udcff.json").write_text("{}")
    ended = surgery_command("plan", bench.place.recipe, source)
    assert ended.code == 2 and r"tokenizer\udcff.json" in ended.error and "rename" in ended.error


@pytest.mark.parametrize("device", ["hpu", "privateuseone", "xla", "mkldnn", "cuda:99", "cpu:0:0", "x\x1b[31m"])
def test_a_device_that_is_not_here_is_refused(bench: Bench, device: str) -> None:
    ended = surgery_command(*bench.run(None, RECIPE, "--device", device))
    assert ended.code == 2 and "this machine has cpu" in ended.error and "\x1b" not in ended.err


def test_files_that_may_not_be_read_are_wrong_use(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, opened_by_system = Path.open, os.open

    def refuse(path: object) -> None:
        if str(path).endswith("tokenizer.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def forbidden(path: Path, *arguments: object, **options: object):
        refuse(path)
        return opened(path, *arguments, **options)

    def forbidden_by_system(path: object, *arguments: object, **options: object):
        refuse(path)
        return opened_by_system(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    monkeypatch.setattr(os, "open", forbidden_by_system)
    for command in (["verify", bench.place.converted], ["plan", bench.place.recipe, bench.place.source]):
        ended = surgery_command(*command)
        assert ended.code == 2 and "tokenizer.json" in ended.error and "Permission denied" in ended.error


@pytest.mark.parametrize("auto", ["AutoTokenizer", "AutoModelForCausalLM"])
def test_a_broken_temporary_directory_is_no_verdict(bench: Bench, monkeypatch: pytest.MonkeyPatch, auto: str) -> None:
    monkeypatch.setenv("TMPDIR", str(bench.root))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, FULL, str(bench.root / "surgery-0123456789abcdef" / "inside"))

    monkeypatch.setattr(f"transformers.{auto}.from_pretrained", full)
    ended = surgery_command("verify", bench.place.converted, "--text", bench.place.text, *MEASURED)
    assert ended.code == 2 and f"temporary directory {bench.root} is full" in ended.error


@pytest.mark.slow
@pytest.mark.parametrize("exists", [True, False])
def test_verify_leaves_no_temporary_file_and_names_its_place(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    """In a process of its own: model types are made once in each."""
    temporary = bench.root / "temporary"
    if exists:
        temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    ended = shell("", "verify", "-q", bench.place.converted)
    if exists:
        assert ended.returncode == 0 and list(temporary.glob("*surgery-*")) == [], ended.stderr
    else:
        assert ended.returncode == 2 and b"temporary (TMPDIR) is not a directory" in ended.stderr, ended.stderr


# ---- leftovers


def test_a_run_removes_what_a_killed_run_to_its_output_left(bench: Bench) -> None:
    mine, other = killed(bench.root, "out"), killed(bench.root, "other")
    ended = surgery_command(*bench.run(bench.root / "nowhere"))
    assert ended.code == 2 and not mine.exists() and other.is_dir()
    assert mine.name in ended.err.replace("\n", "") and "which a run that was killed had left" in ended.err


# ---- what a terminal would obey


def obeyed(text: str) -> set[str]:
    return {c for c in text if (ord(c) < 32 and c != "\n") or c in "\x9b\u202e"}


def test_nothing_that_a_terminal_obeys_is_shown(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    source = bench.source().rename(bench.root / NASTY)
    ended = surgery_command("plan", bench.place.recipe, source)
    assert ended.code == 0 and SHOWN in ended.out and not obeyed(ended.out + ended.err)
    ended = surgery_command("plan", bench.place.recipe, source, "--json", "-")
    assert ended.code == 0 and SHOWN in ended.err and not obeyed(ended.out + ended.err)
    ended = surgery_command("scan", source / "nowhere", "--text", bench.place.text)
    assert ended.code == 2 and SHOWN in ended.error and not obeyed(ended.err)  # and one line: see `error`
    for arguments in (["plan", f"--{NASTY}"], [NASTY], ["verify", bench.root / f"{NASTY}2"]):
        ended = surgery_command(*arguments)
        assert ended.code == 2 and not obeyed(ended.out + ended.err)

    def failing(*_: object, **__: object) -> None:
        raise ValueError(NASTY)

    monkeypatch.setattr("surgery.verbs.plan.plan", failing)
    ended = surgery_command("plan", bench.place.recipe, source)
    assert ended.code == 70 and not obeyed(ended.err)


def test_a_sentence_is_never_pages_long(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise SourceError(f"{'x' * 1_000_000}: give another")

    monkeypatch.setattr("surgery.verbs.plan.plan", failing)
    ended = surgery_command("plan", bench.place.recipe, bench.place.source)
    assert ended.code == 2 and len(ended.error) < 700 and ended.error.endswith("give another.")
