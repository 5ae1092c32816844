"""A sample of the campaigns of hostile inputs, and proof that they notice what they look for."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from campaigns import fuzz
from campaigns.isolated import watched
from campaigns.mutations import HOSTILE, Raw, json_edit, written
from helpers import ROOT
from helpers.tiny_checkpoint import Ended

HUNGRY = 64 << 20


def attempt(one: str) -> str | None:
    """What a watched try may do."""
    if one == "hangs":
        time.sleep(60)
    if one == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    if one == "eats":
        # Mapped anew and written to: what malloc gives may be a hole that an earlier test left in the heap.
        mmap.mmap(-1, HUNGRY * 2).write(b"x" * (HUNGRY * 2))
    return "said so" if one == "fails" else None


def test_a_try_that_hangs_crashes_or_eats_is_noticed() -> None:
    tries = ["holds", "fails", "crashes", "holds", "hangs", "eats", "holds"]
    found = list(watched(tries, attempt, seconds=1, memory=HUNGRY))
    assert [one for one, _ in found] == tries
    faults = [fault for _, fault in found]
    assert [faults[i] for i in (0, 1, 3, 4, 6)] == [None, "said so", None, "hung", None]
    assert "SIGKILL" in faults[2] and faults[5].startswith("took ")


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (Ended(70, "", "error a bug.\n"), "exit 70"),
        (Ended(2, "", "Traceback (most recent call last):\nerror x.\n"), "traceback"),
        (Ended(2, "", "error one.\nerror two.\n"), "not one sentence"),
        (Ended(3, "", "nothing\n"), "not one sentence"),
        (Ended(2, "", f"error {'a' * 5000}.\n"), "5,00"),
        (Ended(0, "a \x1b[31m name", ""), "terminal"),
        (Ended(2, "", "error memory ran out; give less.\n"), "memory"),
    ],
)
def test_an_end_that_is_not_one_short_sentence_is_a_fault(ended: Ended, words: str) -> None:
    assert words in (fuzz.complaint(ended) or "")
    assert fuzz.complaint(Ended(2, "a table", "a note\nerror config.json: no.\n")) is None


def test_changed_json_is_what_was_asked_for() -> None:
    """Raw parts stand unquoted, all else is as JSON has it, and no change touches the original."""
    assert written({"a": Raw("1e999"), "b": [Raw("["), "x"]}) == '{"a": 1e999, "b": [[, "x"]}'
    original = {"a": [1, {"b": "c"}], "d": 2.5}
    kept, known, rng = json.dumps(original), repr(HOSTILE), random.Random(0)
    edits = [json_edit(rng, original) for _ in range(3000)]
    assert json.dumps(original) == kept and repr(HOSTILE) == known
    assert len({written(edit) for edit in edits}) > 200
    assert all(written(value) is not None for value in HOSTILE)


@pytest.mark.slow
def test_changed_files_end_in_one_sentence_each() -> None:
    """A sample; `bin/campaign fuzz` runs 30,000."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "campaigns.fuzz", "--count", "200", "--seed", "1"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.splitlines()[-1].split() == ["all", "200", "200"]
