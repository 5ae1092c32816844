"""Only plain files are opened, and JSON is read no further than is sane."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from surgery.checkpoint import regular
from surgery.checkpoint.regular import open_regular, parse_object, read_json
from surgery.errors import DamagedCheckpoint, SourceError


def test_pipes_devices_and_directories_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="regular file|directory"):
            open_regular(path)
        with pytest.raises(SourceError, match="cannot be read"):
            read_json(path)


def test_a_file_is_read_no_further_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(10**12)  # sparse: a terabyte that takes no room
    with pytest.raises(DamagedCheckpoint, match="larger than"):
        read_json(path, 1000)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "deep"),
        (b'{"' + b"k" * 10**6 + b'": 1, "' + b"k" * 10**6 + b'": 2}', "twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"a": "\\ud800"}', "JSON"),
        (b"[" * 10**6, "JSON"),
    ],
)
def test_hostile_json_is_one_short_sentence(raw: bytes, word: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=word) as caught:
        parse_object(raw, "x.json")
    assert len(str(caught.value)) < 250


def test_more_objects_than_memory_holds_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular.json, "loads", lambda *_, **__: pytest.fail("was parsed"))
    with pytest.raises(DamagedCheckpoint, match="objects and lists"):
        parse_object(b'{"a": [' + b"[]," * (regular.MAX_PARTS + 1) + b"[]]}", "x.json")
