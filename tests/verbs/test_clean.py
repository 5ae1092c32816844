"""`surgery clean` removes what killed processes left, here and among temporary files, and lists it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.killed import killed
from helpers.tiny_checkpoint import surgery_command

from surgery.endings.owned import Owned


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Where outputs go, and where temporary files go."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return tmp_path / "outputs", tmp_path / "temporary"


def test_leftovers_go_and_what_lives_stays(places: tuple[Path, Path], tmp_path: Path) -> None:
    outputs, temporary = places
    dead = [killed(outputs, "out"), killed(temporary)]
    (outputs / ".mine").mkdir()
    result = tmp_path / "found.json"
    with Owned(outputs, "out") as live:
        ended = surgery_command("clean", outputs, "--dry-run", "--json", result)
        assert ended.code == 0 and "2 directories would be removed, 2.3 kB" in ended.out
        assert all(path.is_dir() for path in dead)
        ended = surgery_command("clean", outputs, "--json", result)
        assert ended.code == 0 and "2 directories removed, 2.3 kB" in ended.out and "works in it" in ended.out
        found = json.loads(result.read_text())
        assert [entry["path"] for entry in found["removed"]] == [str(path) for path in dead]
        assert [entry["path"] for entry in found["kept"]] == [str(live.path)]
        assert sorted(outputs.iterdir()) == [outputs / ".mine", live.path] and list(temporary.iterdir()) == []


def test_without_a_directory_it_is_for_temporary_files(places: tuple[Path, Path]) -> None:
    outputs, temporary = places
    left = killed(outputs, "out")
    killed(temporary)
    assert surgery_command("clean").code == 0
    assert left.is_dir() and list(temporary.iterdir()) == []


def test_a_directory_that_is_none_is_wrong_use(places: tuple[Path, Path]) -> None:
    ended = surgery_command("clean", places[0] / "nowhere")
    assert ended.code == 2 and "nowhere cannot be read" in ended.error
