"""Work in a child with limits: what comes back, and in which words each way to die is told."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Callable

import pytest

import surgery.bounded
from surgery.bounded import GIB, Unbounded, bounded


def forever() -> None:
    for _ in itertools.count():
        pass


def panic() -> None:
    raise BaseException("as the libraries written in Rust do")


def test_the_result_comes_back_and_nothing_else_changes() -> None:
    """Arguments are handed over as they are, also those that JSON does not know; what the child does stays there."""
    seen: list[int] = []
    descriptors, environment = os.listdir("/proc/self/fd"), dict(os.environ)
    assert bounded(lambda add: [add(1), len(seen)], seen.append, seconds=10, memory=GIB) == [None, 1]
    assert seen == []
    assert (os.listdir("/proc/self/fd"), dict(os.environ)) == (descriptors, environment)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (forever, "does not end within 1 s"),
        (lambda: bytearray(2 * GIB), "more than 1 GiB of memory"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "crashes (SIGSEGV)"),
        (lambda: os.abort(), "crashes"),
        (lambda: os._exit(0), "without a word"),
        (lambda: int("x"), "ValueError: invalid literal"),
        (panic, "BaseException: as the libraries"),
        (lambda: {1, 2}, "TypeError"),
    ],
)
def test_every_way_to_die_is_a_clause(work: Callable[[], object], words: str) -> None:
    with pytest.raises(Unbounded, match=re.escape(words)):
        bounded(work, seconds=1, memory=GIB)


def test_a_child_that_waits_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery.bounded, "PATIENCE", 0.1)
    monkeypatch.setattr(surgery.bounded, "SHARE", 0)
    with pytest.raises(Unbounded, match="waits for something"):
        bounded(time.sleep, 1000, seconds=1, memory=GIB)


def test_a_parent_that_is_interrupted_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bounded(time.sleep, 1000, seconds=1000, memory=GIB)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_parent_that_is_killed_leaves_no_child() -> None:
    """It would hold what its parent had locked, as if that were still at work."""
    reader, writer = os.pipe()
    if not (parent := os.fork()):
        bounded(time.sleep, 1000, seconds=1000, memory=GIB)
        os._exit(0)
    os.close(writer)
    time.sleep(0.2)  # for its child to be there
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b""  # which ends when the last process that could write to it has
