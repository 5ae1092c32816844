"""Recipes that come with surgery, by name; and recipes that are given from Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ROOT
from ruamel.yaml import YAML

from surgery.errors import RecipeError
from surgery.recipe.builtin import builtin, recipe_file, summary
from surgery.recipe.file import read
from surgery.steps.recipe import Recipe, load_recipe
from surgery.tuning.scratch.settings import FromScratch

FILES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_every_recipe_of_the_repository_has_a_name() -> None:
    assert builtin() == {path.stem: path for path in FILES}
    assert len(FILES) == 12


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_first_line_says_what_it_does(file: Path) -> None:
    """A sentence for `surgery recipes`, beside the name, within 80 columns; and it can be read by its name."""
    said = summary(file.read_text())
    assert said.endswith(".") and len(said) <= 61
    schema = FromScratch if file.stem.endswith("-scratch") else Recipe
    assert read(file.stem, schema) == read(file, schema)


def test_a_bare_word_is_a_name_and_a_path_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_file("eab") == ROOT / "recipes" / "eab.yaml"
    for path in ("./eab", "eab.yaml", "eab.yml", "recipes/eab", Path("eab")):
        assert recipe_file(path) == Path(path)
    Path("mine").touch()
    assert recipe_file("mine") == Path("mine")
    Path("streaming").mkdir()  # such as an output of an earlier run
    assert recipe_file("streaming") == ROOT / "recipes" / "streaming.yaml"
    Path("eab").touch()
    with pytest.warns(UserWarning, match=r"eab is the recipe of that name; the file is \./eab"):
        assert recipe_file("eab") == ROOT / "recipes" / "eab.yaml"


def test_a_word_that_is_neither_names_what_is_known() -> None:
    with pytest.raises(RecipeError, match="^eba: no such file, and no recipe of that name; known are clip-text, eab, "):
        load_recipe("eba")
    with pytest.raises(RecipeError) as refused:
        load_recipe("x" * 100_000)
    assert len(str(refused.value)) <= 270


@pytest.mark.parametrize(
    "file", [file for file in FILES if not file.stem.endswith("-scratch")], ids=lambda file: file.stem
)
def test_a_dict_is_the_recipe_that_its_file_is(file: Path) -> None:
    written = YAML(typ="safe").load(file)
    recipe = load_recipe(file)
    assert load_recipe(written) == load_recipe(recipe) == recipe
    assert load_recipe(recipe.to_dict()).to_dict() == recipe.to_dict()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "the recipe: the key 'surgery' is missing; add 'surgery: 1' (and 1 further error)."),
        ({"surgery": 1, "operations": [{"smothing": {}}]}, "the recipe: operations[0] names the unknown operation 's"),
        ({"surgery": 1, "operations": "eab"}, "the recipe: operations is 'eab'; it must be a list."),
        ({"surgery": 1, "operations": {1, 2}}, "the recipe holds what no YAML can (TypeError: "),
        ({"surgery": float("nan")}, "the recipe: "),
        (7, "a recipe is a name, a path or a dict, and not of type int; give such a one."),
    ],
)  # fmt: skip
def test_a_wrong_dict_is_refused_by_key(given: object, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(given)  # type: ignore[arg-type]
    assert str(refused.value).startswith(said) and len(str(refused.value)) <= 250
