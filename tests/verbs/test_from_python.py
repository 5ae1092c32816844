"""The verbs as functions: what they take, what they give back, and what is said of a slip."""

from __future__ import annotations

import typing
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.tiny_checkpoint import Place
from helpers.user_script import convert, refusal
from ruamel.yaml import YAML

import surgery
from surgery import results
from surgery.live.text import files
from surgery.steps.options import ExportKeywords, RunKeywords, VerifyKeywords

VERBS = ("export", "plan", "pretrain", "run", "scan", "verify")


def test_the_package_shows_what_is_for_callers() -> None:
    assert set(VERBS) < set(dir(surgery))
    assert {"Chunking", "Recipe", "RunOptions", "SurgeryError", "VerifyOptions"} < set(dir(surgery))
    assert all(getattr(surgery, name) is not None for name in dir(surgery))
    with pytest.raises(AttributeError, match="no attribute 'convert'"):
        surgery.convert  # noqa: B018


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_types_that_resolve_and_a_docstring(verb: str) -> None:
    function = getattr(surgery, verb)
    hints = typing.get_type_hints(function)
    named = {"export": "Export", "plan": "Plan", "pretrain": "Pretrained", "scan": "Survey"}.get(verb, "Verdict")
    assert getattr(surgery, named) in (hints["return"], *typing.get_args(hints["return"]))
    assert function.__doc__ and getattr(surgery, named).__doc__


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        (surgery.RunOptions, RunKeywords),
        (surgery.VerifyOptions, VerifyKeywords),
        (surgery.ExportOptions, ExportKeywords),
    ],
)
def test_keywords_are_the_fields_of_the_options(options: type, keywords: type) -> None:
    assert [field.name for field in fields(options)] == list(keywords.__annotations__)
    assert all(field.name in options.__doc__ for field in fields(options))


def test_a_text_is_a_file_or_several(tmp_path: Path) -> None:
    one = tmp_path / "a.txt"
    for given in (one, str(one), [one], (str(one),), iter([one])):
        assert surgery.RunOptions(text=given).text == (one,)
    assert surgery.RunOptions().text == () == files(None)
    assert surgery.VerifyOptions(text="a", calibration=["b", "c"]).calibration == (Path("b"), Path("c"))
    assert surgery.RunOptions(keep_failed="kept", tasks=tmp_path).keep_failed == Path("kept")
    assert surgery.VerifyOptions(tasks="t").tasks == Path("t") and surgery.VerifyOptions().tasks is None
    with pytest.raises(TypeError):
        surgery.RunOptions(text=3)


def test_an_option_that_is_not_there_is_named(place: Place, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^run\(\) has no option 'txt'; did you mean 'text'\? it takes text, "):
        surgery.run(place.recipe, place.source, tmp_path / "out", txt="ev.txt")
    with pytest.raises(TypeError, match=r"^verify\(\) has no option 'quickly'; it takes against, text, "):
        surgery.verify(place.converted, quickly=True)
    with pytest.raises(TypeError, match=r"^run\(\) takes its options by keyword, and was given str in their place"):
        surgery.run(place.recipe, place.source, tmp_path / "out", "ev.txt")
    assert not (tmp_path / "out").exists()


def test_no_chunks_are_refused_in_a_sentence(place: Place) -> None:
    with pytest.raises(surgery.SurgeryError, match=r"^--text: 0 chunks hold no text; read 1 or more\.$"):
        surgery.scan(place.source, text=place.text, chunking=surgery.Chunking(0, 16))


@pytest.mark.parametrize(("prefix", "slots"), [([0], "1 slot"), ([0, 5], "2 slots"), ("auto", "up to 4 slots")])
def test_a_plan_counts_slots_in_words(place: Place, prefix: object, slots: str) -> None:
    recipe = {"surgery": 1, "operations": [{"attention_bias": {"prefix": prefix}}]}
    assert f"{slots} in each of 2 attention sites" in str(surgery.plan(recipe, place.source).to_dict()["adds"])


def _documents(documented: type, found: dict) -> bool:
    return documented.__required_keys__ <= set(found) <= set(documented.__annotations__)


def test_the_keys_of_a_verdict_are_documented(place: Place) -> None:
    verdict = place.verdict
    assert _documents(results.Verdict, verdict)
    assert _documents(results.Integrity, verdict["integrity"])
    assert all(_documents(results.Gate, gate) for gate in verdict["gates"])
    assert all(_documents(results.Check, check) for check in verdict["integrity"]["checks"])
    assert all(_documents(results.Score, score) for score in verdict["perplexity"].values())
    assert all(_documents(results.Delta, delta) for delta in verdict["delta_nll"].values())
    assert all(_documents(results.Massive, massive) for massive in verdict["massive_activations"].values())
    assert _documents(results.Verdict, surgery.verify(place.converted))


@pytest.mark.slow
def test_a_script_runs_with_everything_given_lightly(place: Place, tmp_path: Path) -> None:
    """A dict for the recipe, text for paths, single files; and what a survey holds is documented too."""
    recipe = YAML(typ="safe").load(place.recipe)
    verdict, survey = convert(recipe, str(place.source), tmp_path / "out", str(place.text))
    assert verdict["passed"] is True and (tmp_path / "out.html").is_file()
    assert _documents(results.Survey, survey) and _documents(results.Score, survey["perplexity"])
    assert all(_documents(results.Layer, row) for row in survey["layers"])
    assert all(_documents(results.Survey, whose) for whose in verdict.get("surveys", ()))
    assert refusal(str(place.source), str(tmp_path / "no")).startswith("missing.txt: cannot be read")
