"""A temporary directory that cannot be used is named, and is no fault of what was given."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from helpers import ROOT

from surgery.endings import owned
from surgery.endings.temporary import of_temporary, temporary
from surgery.errors import NoTemporary


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_it_is_where_tmpdir_says_and_gone_afterwards(root: Path) -> None:
    with temporary(1) as place:
        assert root in place.parents and list(place.iterdir()) == []
        (place / "a").write_text("1")
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("name", ["missing", "file"])
def test_one_that_is_none_is_not_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (root / "file").touch()
    monkeypatch.setenv("TMPDIR", str(root / name))
    with pytest.raises(NoTemporary, match=rf"{name} \(TMPDIR\) is not a directory; set TMPDIR"), temporary():
        raise AssertionError("opened")


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "is full"), (errno.EROFS, "Read-only file system")])
def test_one_that_cannot_be_written_is_named(root: Path, monkeypatch, code: int, said: str) -> None:
    def broken(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(owned, "_owned", broken)
    with pytest.raises(NoTemporary, match=said) as caught, temporary():
        raise AssertionError("opened")
    assert str(root) in str(caught.value) and list(root.iterdir()) == []


def test_its_room_is_looked_at_first(root: Path) -> None:
    with pytest.raises(NoTemporary, match="needs 1000000.0 TB and has") as caught, temporary(10**18):
        raise AssertionError("opened")
    assert str(root) in str(caught.value) and list(root.iterdir()) == []


def test_errors_of_others_are_told_apart_by_their_file(root: Path) -> None:
    full, inside = os.strerror(errno.ENOSPC), root / "surgery-0123456789abcdef" / "inside" / "model.safetensors"
    told = of_temporary(OSError(errno.ENOSPC, full, str(inside)))
    assert told is not None and "is full" in str(told) and str(root) in str(told)
    chained = ValueError("cannot load")
    chained.__cause__ = OSError(errno.ENOSPC, full, str(root / "tmpab12cd34" / "x"))
    assert of_temporary(chained) is not None
    assert of_temporary(Exception("No space left on device (os error 28)"), where=inside) is not None
    assert of_temporary(FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")) is not None
    for other in (OSError(errno.ENOSPC, full, str(root / "out")), OSError(errno.ENOSPC, full), ValueError("x")):
        assert of_temporary(other) is None


def test_nothing_else_makes_temporary_directories() -> None:
    """One made in another way would be left behind by a signal, and nobody could tell whose it is."""
    files = [path for path in (ROOT / "surgery").rglob("*.py") if "tempfile" in path.read_text(encoding="utf-8")]
    assert [path.name for path in files] == ["temporary.py"]
