"""Copies by the kernel, by hand where it will not; hashes beside the work, and of several files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.checkpoint import copying
from surgery.checkpoint.copying import Hashing, copy_content, sha256_of, sha256_of_all


def copied(source: Path, target: Path) -> bytes:
    with source.open("rb") as a, target.open("xb") as b:
        copy_content(a, b)
    return target.read_bytes()


def refusing(number: int, after: int = 0):
    """A call that the kernel answers with this error, once it has been called so many times."""
    calls = []

    def refuse(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return os.sendfile(arguments[1], arguments[0], None, arguments[2])

    return refuse


@pytest.mark.parametrize("size", [0, 1, copying.CHUNK + 3])
@pytest.mark.parametrize("by", ["any way", "the kernel", "hand"])
def test_a_copy_is_the_same_bytes(size, by, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(content := os.urandom(size))
    monkeypatch.setattr(copying, "PART", copying.CHUNK // 2)
    if by != "any way":
        monkeypatch.setattr(fcntl, "ioctl", refusing(errno.EOPNOTSUPP))
    if by == "hand":
        monkeypatch.setattr(os, "copy_file_range", refusing(errno.EXDEV))
    assert copied(tmp_path / "a", tmp_path / "b") == content


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["ioctl", "copy_file_range"])
def test_an_error_of_the_disk_is_not_a_way_that_is_closed(number, call, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    if call == "copy_file_range":
        monkeypatch.setattr(fcntl, "ioctl", refusing(errno.EOPNOTSUPP))
    monkeypatch.setattr(fcntl if call == "ioctl" else os, call, refusing(number))
    with pytest.raises(OSError) as raised:
        copied(tmp_path / "a", tmp_path / "b")
    assert raised.value.errno == number


@given(st.lists(st.binary(max_size=100), max_size=12))
def test_a_hash_beside_the_work_is_the_hash(parts):
    with Hashing() as digest:
        for part in parts:
            digest.update(part)
        assert digest.hexdigest() == hashlib.sha256(b"".join(parts)).hexdigest()


def test_work_that_fails_leaves_no_thread_behind():
    with pytest.raises(ZeroDivisionError), Hashing() as digest:
        digest.update(b"abc")
        raise ZeroDivisionError
    assert not digest._thread.is_alive()


def test_several_files_are_hashed_in_their_order(tmp_path):
    paths = [tmp_path / str(i) for i in range(9)]
    for i, path in enumerate(paths):
        path.write_bytes(os.urandom(i * 1000))
    told = []
    named = {**{path.name: path for path in paths}, "again": paths[3]}
    found = sha256_of_all(named, lambda count, what: told.append((count, what)))
    assert list(found.items()) == [(name, sha256_of(path)) for name, path in named.items()]
    assert sum(count for count, _ in told) == sum(range(9)) * 1000 + 3000 and {what for _, what in told} <= {
        *"12345678"
    }
    assert sha256_of_all({}) == {}


def test_one_file_that_cannot_be_read_is_the_error_of_all(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(FileNotFoundError):
        sha256_of_all({name: tmp_path / name for name in ("a", "gone", "b")})
