"""Whether a file is still what it was: by what the file system says, and by its hash."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from surgery.checkpoint.witness import state_of, states_in


def rewrite(path: Path) -> None:
    """Other content of one length, and the old time of change put back."""
    before = path.stat()
    path.write_bytes(b"other")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    """Another file of the same content."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def link(path: Path) -> None:
    os.link(path, path.with_name("link"))


def read(path: Path) -> None:
    path.read_bytes()


@pytest.mark.parametrize(("act", "same"), [(rewrite, False), (replace, False), (link, True), (read, True)])
def test_what_was_written_to_shows(tmp_path: Path, act: Callable[[Path], None], same: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"first")
    os.utime(path, ns=(1, 1))  # long ago, so that the clock has moved on by the next change
    before = state_of(path)
    while state_of(path).changed == before.changed and act is rewrite:
        rewrite(path)
    act(path)
    assert before.still(state_of(path)) is same


def test_a_directory_that_cannot_be_listed_has_no_states(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_text("x")
    assert set(states_in(tmp_path)) == {"a"} and set(states_in(tmp_path / "a")) == {"a"}
    assert states_in(tmp_path / "nowhere") == {}
