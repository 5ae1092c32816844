"""A source that changes while it is converted is found before anything is published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.bench import DAMAGED, IDS, Bench
from helpers.tiny_checkpoint import Ended, edit_json, surgery_command

from surgery.steps import reading
from surgery.verbs import run as verb

WEIGHTS = "model.safetensors"


def keeping_its_time(path: Path, change: Callable[[], object]) -> None:
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def last_byte(path: Path) -> None:
    def change() -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte ^ 1]))

    keeping_its_time(path, change)


def converted_while(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, when: str, change: Callable, *options: object
) -> Ended:
    """Run, with `change` called as soon as the step `when` of the run is about to begin."""
    where = reading if when == "begin_reading" else verb
    step, source = getattr(where, when), bench.source()

    def and_then(*arguments: object, **named: object) -> object:
        change(source)
        return step(*arguments, **named)

    monkeypatch.setattr(where, when, and_then)
    return surgery_command(*bench.run(source, IDS, *options, text=None if "--text" in options else False))


def back_and_forth(source: Path) -> None:
    """Changed and put back, byte and time: only the inode knows."""
    for _ in range(2):
        last_byte(source / WEIGHTS)


def other_norm(source: Path) -> None:
    edit_json(source / "config.json", rms_norm_eps=1e-3)


CHANGES = {
    "config.json": ("operate", other_norm),
    "config.json before the hashes": ("begin_reading", other_norm),
    "tokenizer.json": ("emit", lambda source: edit_json(source / "tokenizer.json", decoder=None)),
    "tokenizer.json broken": ("emit", lambda source: last_byte(source / "tokenizer.json")),
    "generation_config.json": ("emit", lambda source: edit_json(source / "generation_config.json", eos_token_id=5)),
    WEIGHTS: ("operate", lambda source: last_byte(source / WEIGHTS)),
    f"{WEIGHTS} after the copy": ("_measure", lambda source: last_byte(source / WEIGHTS)),
    f"{WEIGHTS} back and forth": ("operate", back_and_forth),
    "tokenizer.json gone": ("emit", lambda source: (source / "tokenizer.json").unlink()),
    "tokenizer_config.json gone": ("_measure", lambda source: (source / "tokenizer_config.json").unlink()),
}  # fmt: skip


QUICK = ("config.json", "tokenizer.json broken", f"{WEIGHTS} back and forth")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CHANGES]
)
def test_a_change_of_the_source_stops_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    when, change = CHANGES[case]
    ended = converted_while(bench, monkeypatch, when, change, "--no-verify")
    assert ended.code == DAMAGED, ended.out + ended.err
    assert case.split()[0] in ended.error and not bench.out.exists()


@pytest.mark.slow
def test_a_change_of_a_linked_source_stops_the_run_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    change = CHANGES[WEIGHTS][1]
    ended = converted_while(bench, monkeypatch, "operate", change, "--no-verify", "--link")
    assert ended.code == DAMAGED and WEIGHTS in ended.error and not bench.out.exists()


def test_a_link_made_by_others_meanwhile_is_no_change(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path) -> None:
        os.link(source / WEIGHTS, bench.root / "link")

    ended = converted_while(bench, monkeypatch, "operate", link, "--no-verify", "--link")
    assert ended.code == 0, ended.err
    hashes = json.loads((bench.out / "surgery.json").read_text())["source"]["sha256"]
    assert set(hashes) == {WEIGHTS, "config.json"}
    shutil.rmtree(bench.out)
