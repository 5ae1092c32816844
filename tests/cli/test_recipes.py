"""`surgery recipes`, and recipes by name in the other commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.tiny_checkpoint import Place, surgery_command

EAB = ROOT / "recipes" / "eab.yaml"


def test_they_are_listed_with_what_they_do(tmp_path: Path) -> None:
    ended = surgery_command("recipes", "--json", tmp_path / "r.json")
    assert ended.code == 0 and not ended.err
    found = json.loads((tmp_path / "r.json").read_text())["recipes"]
    assert [recipe["name"] for recipe in found] == sorted(path.stem for path in EAB.parent.glob("*.yaml"))
    for recipe in found:
        assert recipe["name"] in ended.out and recipe["summary"] in ended.out
        assert recipe["text"] == (EAB.parent / f"{recipe['name']}.yaml").read_text()


def test_one_is_printed_as_it_is_to_start_from() -> None:
    ended = surgery_command("recipes", "eab")
    assert ended.code == 0 and ended.out == EAB.read_text()
    said = surgery_command("recipes", "eba").error
    assert said.startswith("no recipe of surgery's is called eba; known are clip-text, eab, ")


@pytest.mark.filterwarnings("always:eab is the recipe")
def test_commands_take_names(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned = {}
    for recipe in ("eab", EAB):
        assert surgery_command("plan", recipe, place.source, "--json", "p.json").code == 0
        planned[recipe] = json.loads(Path("p.json").read_text()) | {"disk": None, "memory": None}
    assert planned["eab"] == planned[EAB]
    assert surgery_command("plan", "./eab", place.source).error.startswith("eab: no such file; ")
    assert surgery_command("pretrain", "eab", "out", "--text", place.text).code == 2
    Path("eab").write_text("surgery: 1\n")
    ended = surgery_command("plan", "eab", place.source)
    assert ended.code == 0 and ended.err.count("the file is ./eab") == 1
    assert not surgery_command("plan", "eab", place.source, "-q").err
