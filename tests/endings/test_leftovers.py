"""Directories say whose they are: what a killed process left is found and removed, and nothing else is touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.killed import killed

from surgery.endings import leftovers as module
from surgery.endings import owned
from surgery.endings.leftovers import clear, clear_for, leftovers
from surgery.endings.owned import OWNER, Owned, host

HEX = "0123456789abcdef"
OWN = {"surgery": owned.MARK, "process": 1, "host": "here", "boot": "now", "for": None}


def test_what_a_killed_process_left_is_told_and_removed(tmp_path: Path) -> None:
    left = killed(tmp_path, "out")
    (found,) = leftovers(tmp_path)
    owner = json.loads((left / OWNER).read_text())
    assert (found.path, found.state, found.process) == (left, "dead", owner["process"])
    assert found.bytes == 1000 + (left / OWNER).stat().st_size
    assert clear(found) and list(tmp_path.iterdir()) == []


def test_what_a_process_works_in_is_never_removed(tmp_path: Path) -> None:
    with Owned(tmp_path, "out") as live:
        live.inside.mkdir()
        (found,) = leftovers(tmp_path)
        assert found.state == "alive" and not clear(found) and live.inside.is_dir()
        assert clear_for(tmp_path / "out") == [] and live.inside.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_to_become_an_output_goes_before_it(tmp_path: Path) -> None:
    mine, other = killed(tmp_path, "out"), killed(tmp_path, "out2")
    assert [left.path for left in clear_for(tmp_path / "out")] == [mine]
    assert list(tmp_path.iterdir()) == [other]


def test_what_was_killed_before_it_had_an_owner_goes_too(tmp_path: Path) -> None:
    (tmp_path / f"surgery-{HEX}").mkdir()
    begun = tmp_path / f".out.surgery-{HEX}"
    begun.mkdir()
    (begun / f"{OWNER}.new").touch()
    assert [left.state for left in leftovers(tmp_path)] == ["dead", "dead"]
    assert all([clear(left) for left in leftovers(tmp_path)]) and list(tmp_path.iterdir()) == []


def _link(path: Path) -> None:
    target = path.parent / "precious"
    target.mkdir()
    (target / OWNER).write_text(json.dumps(OWN | host()))
    path.symlink_to(target)


def _owner_link(path: Path) -> None:
    path.mkdir()
    (path.parent / "elsewhere").write_text(json.dumps(OWN | host()))
    (path / OWNER).symlink_to(path.parent / "elsewhere")


def _fifo(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / OWNER)


def _unmarked(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").touch()


def _written(content: str):
    def write(path: Path) -> None:
        path.mkdir()
        (path / OWNER).write_text(content)

    return write


NOT_OURS = {
    "a link to a directory": _link,
    "a link for an owner": _owner_link,
    "a pipe for an owner": _fifo,
    "no owner": _unmarked,
    "a file": lambda path: path.write_text("mine"),
    "no JSON": _written("surgery"),
    "deep JSON": _written("[" * 5000),
    "other JSON": _written("[]"),
    "another mark": _written(json.dumps(OWN | {"surgery": "other"})),
    "a process that is no number": _written(json.dumps(OWN | {"process": "1"})),
}


@pytest.mark.parametrize("make", NOT_OURS.values(), ids=NOT_OURS)
def test_what_surgery_did_not_make_is_not_its_own(tmp_path: Path, make) -> None:
    make(tmp_path / f".out.surgery-{HEX}")
    before = sorted(tmp_path.rglob("*"))
    assert leftovers(tmp_path) == [] and clear_for(tmp_path / "out") == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_of_another_user_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = killed(tmp_path)
    monkeypatch.setattr(module.os, "geteuid", lambda: os.getuid() + 1)
    assert leftovers(tmp_path) == [] and left.is_dir()


@pytest.mark.parametrize(
    ("owner", "state"),
    [({"boot": "before"}, "dead"), ({"host": "other"}, "dead"), ({"host": "other", "boot": "other"}, "elsewhere")],
)
def test_locks_of_other_machines_are_not_trusted(tmp_path: Path, owner: dict[str, str], state: str) -> None:
    left = killed(tmp_path)
    (left / OWNER).write_text(json.dumps(json.loads((left / OWNER).read_text()) | owner))
    (found,) = leftovers(tmp_path)
    assert found.state == state and clear(found) is (state == "dead")


def test_one_that_is_cleared_while_it_is_made_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = owned._owned, []

    def unlucky(path: Path, name: str | None) -> int:
        made.append(path)
        if len(made) == 1:
            path.rmdir()
        return make(path, name)

    monkeypatch.setattr(owned, "_owned", unlucky)
    with Owned(tmp_path) as kept:
        assert made == [made[0], kept.path] and made[0] != kept.path
    assert list(tmp_path.iterdir()) == []


def test_a_name_as_long_as_a_file_system_takes_has_room(tmp_path: Path) -> None:
    name = "ü" * 127
    with Owned(tmp_path, name) as long:
        long.inside.write_text("x")
        os.replace(long.inside, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
