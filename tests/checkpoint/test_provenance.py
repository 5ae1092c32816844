"""Provenance names no user and no directory, and can be dated from outside."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from surgery.checkpoint import provenance
from surgery.errors import SourceError


def test_the_date_is_that_of_source_date_epoch(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert provenance.moment() == "2023-11-14T22:13:20Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert provenance.moment() == "1970-01-01T00:00:00Z"


@pytest.mark.parametrize("given", ["", "-1", "1.5", "today", "9" * 5000, "999999999999", "١"])
def test_a_date_that_is_none_is_refused_in_a_sentence(given, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", given)
    with pytest.raises(SourceError, match="not a number of seconds since 1970") as caught:
        provenance.moment()
    assert len(str(caught.value)) < 200


def test_paths_on_the_command_line_become_names(tmp_path, monkeypatch):
    home = tmp_path / "somebody"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    given = [
        "surgery", "run", "recipes/eab.yaml", "owner/name", "other/name", "--text", f"{home}/private/wiki.txt",
        f"--report={home}/r.html", "~/out", ".", "../x/", str(home), "--chunks", "8", "owner/name@main",
        "hf_abcdefghijk",
    ]  # fmt: skip
    assert provenance.command_line(given, ["owner/name"]) == [
        "surgery", "run", "eab.yaml", "owner/name", "name", "--text", "wiki.txt", "--report=r.html", "out", "~", "x",
        "~", "--chunks", "8", "owner/name@main", "TOKEN",
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "a/../b/x", "./x/", "/x", "x\0/x", "loop/x"])
def test_the_last_part_of_any_path_is_its_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert provenance.name_of(path) == "x" and provenance.name_of("link") == "link"
    assert provenance.name_of("/") == "/" and provenance.name_of(".") == tmp_path.name


def test_a_working_directory_that_is_gone_stops_nothing(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert provenance.command_line(["surgery", ".", "a/b", "/c/d"]) == ["surgery", ".", "b", "d"]


def test_a_name_is_bounded_and_always_json():
    assert provenance.command_line(["/a/\udcff" + "x" * 5000])[0].startswith("\\udcffxxx")
    assert len(provenance.command_line(["/" + "x" * 5000])[0]) == 1000


def test_a_text_is_told_by_name_size_and_hash(tmp_path):
    text = tmp_path / "wiki.txt"
    text.write_bytes(b"\xef\xbb\xbfa b\r\n")
    (found,) = provenance.described([text])
    assert found.model_dump() == {
        "name": "wiki.txt",
        "bytes": 8,
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
    }
    text.unlink()
    with pytest.raises(SourceError, match=r"wiki\.txt: cannot be read"):
        provenance.described([text])


def test_paths_inside_texts_become_names():
    said = {"checks": [{"detail": "/home/a/model/x.json is bad; see /home/a/model", "n": 1}], "other": "b/c"}
    found = provenance.names_only(said, ["/home/a/model", Path("c")])
    assert found == {"checks": [{"detail": "model/x.json is bad; see model", "n": 1}], "other": "b/c"}


@pytest.mark.parametrize(
    "wrong",
    [{"date": "yesterday"}, {"device": "x" * 2000}, {"command": "surgery"},
     {"texts": {"evaluation": [{"name": "a", "bytes": -1, "sha256": "0"}]}},
     {"chunks": {"evaluation": {"count": 10**12, "length": 2}}}],
)  # fmt: skip
def test_what_a_stranger_wrote_is_held_to_bounds(wrong):
    right = {"date": "2023-11-14T22:13:20Z", "device": "cpu", "dtype": "float32", "versions": {}}
    provenance.Provenance.model_validate({**right, "of a later version": 1})
    with pytest.raises(ValidationError):
        provenance.Provenance.model_validate({**right, **wrong})
