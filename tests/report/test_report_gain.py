"""What was gained, in the report: only what was measured, in words and figures that say what the verdict says."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from helpers.page import Page

from surgery.checkpoint.results import json_text
from surgery.report import write_report
from surgery.report.beside import beside as figure_beside
from surgery.report.style import LIGHT, drawing
from surgery.report.verdict import card_tables, sentences, tables
from surgery.table import FAILED, PASSED, Table
from surgery.verification.gates.cache_edits import EDITS
from surgery.verification.gates.quantised import NAMES, Quantised
from surgery.verification.verdict import plain_json
from surgery.verification.verify import Verify
from surgery.words import times

SURVEYS = [{"source": name, "layers": [{"layer": 0, "max": 1.0}]} for name in ("original", "converted")]
# What `make_verdict` holds something of.
PARTS = [
    "perplexity", "massive_activations", "quantised", "streaming", "cache_edits", "tasks",
    "tuning", "gates", "integrity",
]  # fmt: skip


def delta(mean: float, half: float = 0.02) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def score(ratio: float) -> dict:
    """`ratio` times the bare original's perplexity of 20."""
    return {"ppl": 20 * ratio, "nll": math.log(20 * ratio), "tokens": 8176}


def beside(original: float, converted: float) -> dict:
    deltas = {"original": delta(math.log(original)), "converted": delta(math.log(converted))}
    return {"original": score(original), "converted": score(converted), "delta_nll": deltas}


def make_verdict() -> dict:
    """Of a run that measured everything: static 8 bit is where the converted model gains, and one gate failed."""
    edited = {"original": delta(0.8), "original_kept": delta(0.0), "converted": delta(0.0),
              "converted_vs_kept": delta(-0.0032, 0.005)}  # fmt: skip
    edits = {edit: {"delta_nll": edited} for edit in EDITS}
    static = beside(2.5, 1.05) | {"executed": beside(2.4, 1.07)}
    task = {"documents": 1200, "original": 0.61, "original_stderr": 0.01, "converted": 0.608, "converted_stderr": 0.01}
    return {
        "passed": False,
        "gates": [
            {"name": "perplexity", "passed": True, "value": 1.0049, "limit": 1.01},
            {"name": "quantised.w8a8_static", "passed": False, "value": 1.071, "limit": 1.05},
            {"name": "quantised.w8a8_static.executed", "passed": True, "value": 1.0499, "limit": 1.05},
            {"name": "cache_edits.delete_first", "passed": True, "value": 1.002, "limit": 1.05},
            {"name": "tasks.arc_easy.acc", "passed": True, "value": 0.007, "limit": 0.01},
            {"name": "massive_activations", "passed": True, "value": 0, "limit": 0},
        ],
        "integrity": {"passed": True, "checks": [{"name": "files", "passed": True, "detail": "14 files"}]},
        "prefix": {"ids": [216, 198], "tokens": [" ", "\n"]},
        "perplexity": {"bare": score(1), "bos": None, "control": score(0.99), "converted": score(0.95)},
        "delta_nll": {"vs_control": delta(math.log(0.95 / 0.99)), "vs_bare": delta(math.log(0.95))},
        "massive_activations": {
            "before": {"count": 1228, "worst_ratio": 14379.4, "dims": [507, 12], "layers": [3, 4, 5, 9],
                       "tokens": ["The", " "]},
            "after": {"count": 0, "worst_ratio": 0.0, "dims": [], "layers": [], "tokens": []},
        },
        "quantised": {"w8a8_static": static, "kv4": beside(1.10, 1.09), "kv2": beside(40, 41)},
        "streaming": {
            "original": score(1.52), "original_kept": {"tokens_kept": 4, **score(1.0)}, "converted": score(0.97),
            "delta_nll": {"original_vs_kept": delta(math.log(1.52)), "converted_vs_kept": delta(0.0, 0.004)},
        },
        "cache_edits": {"none": {"original": score(0.8), "converted": score(0.79)}, **edits},
        "tasks": {"arc_easy": {"acc": {**task, "drop": {"mean": 0.002, "low": -0.003, "high": 0.007}}}},
        "tuning": {
            "best_step": 20, "stopped": None,
            "losses": [{"step": step, "loss": 1 / step} for step in range(1, 31)],
            "held_out": [{"step": step, "nll": math.log(ppl), "ppl": ppl}
                         for step, ppl in ((0, 50.0), (10, 30.0), (20, 25.0), (30, 26.0))],
        },
    }  # fmt: skip


def write(verdict: dict, folder: Path) -> Page:
    return Page(write_report(SURVEYS, folder / "r.html", verdict).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    return write(make_verdict(), tmp_path_factory.mktemp("gain"))


def shown(page: Page) -> list[str]:
    return [key.removeprefix("gain-") for key in page.attributes("id") if key.removeprefix("gain-") in PARTS]


def rows(table) -> dict[str, tuple[str, ...]]:
    return {row[0]: tuple(cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row[1:]) for row in table.rows}


# ---- the page


def test_it_stands_above_the_surveys_with_every_part(page):
    assert page.sections[:3] == ["gain", "summary", "overview"]
    assert sorted(shown(page)) == sorted(PARTS)
    section = page.source.split('id="gain"')[1].split("</section>")[0]
    labels = [attrs.get("aria-label") for tag, attrs in Page(section).tags if tag == "svg"]
    assert labels == ["Quantised", "Tuning"]
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert section.count('class="bad"') == 1 and section.count('class="good"') == 6  # five gates, one check


def test_without_a_verdict_there_is_no_such_section(tmp_path):
    page = Page(write_report(SURVEYS, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "gain" not in page.sections and not shown(page)


@pytest.mark.parametrize("how", ["missing", "null"])
@pytest.mark.parametrize("key", [*PARTS, "delta_nll", "prefix"])
def test_what_was_not_measured_is_not_shown(key, how, tmp_path):
    verdict = make_verdict()
    verdict[key] = None
    if how == "missing":
        del verdict[key]
    page = write(verdict, tmp_path)
    assert sorted(shown(page)) == sorted(set(PARTS) - {key})
    assert not re.search(r"\bnan\b|None|\binf\b", page.text)


def test_a_verdict_from_json_makes_the_same_page(tmp_path):
    verdict = make_verdict()
    verdict["quantised"]["kv2"]["delta_nll"]["original"] = {"mean": 3.6, "low": -math.inf, "high": math.inf}
    verdict["gates"][0] |= {"value": math.nan, "passed": False}
    read = json.loads(json_text(plain_json(verdict)))
    assert write(verdict, tmp_path).source == write(read, tmp_path).source


def test_no_name_becomes_markup(tmp_path):
    verdict, name = make_verdict(), '<img src=x onerror="y">\x1b'
    verdict["tasks"][name] = verdict["tasks"].pop("arc_easy")
    verdict["quantised"][name] = beside(2, 1)
    verdict["gates"][0]["name"] = verdict["prefix"]["tokens"][0] = verdict["tuning"]["stopped"] = name
    verdict["integrity"]["checks"][0] |= {"passed": False, "detail": name}
    page = write(verdict, tmp_path)
    assert "img" not in {tag for tag, _ in page.tags} and "\x1b" not in page.source and "<img src=x" in page.text


# ---- words and tables


def test_the_sentences_say_what_the_verdict_holds():
    assert sentences(make_verdict()) == [
        "Failed: quantised, 8 bit, static scales, times the bare original's: 1.071, and asked for was at most 1.05.",
        "Folded into the slots: the tokens “␣” and “⏎” (ids 216 and 198).",
        "Perplexity of the converted model, against the bare original: better, −5%.",
        "Massive activations: 1,228 before, 0 after.",
        "The converted model, quantised, against the original, quantised alike: better with 8 bit, static scales; 8 "
        "bit, static scales, run in int8 – no clear difference with cache only, 4 bit; cache only, 2 bit.",
        "Streaming with nothing kept, against the original that keeps its first 4 tokens: the original is worse, +52%, "
        "the converted model less than 1% away.",
        "Tuning: kept is the state after step 20, where perplexity on held-out text had gone from 50.0000 to 25.0000.",
    ]


def test_what_passed_is_counted_and_what_is_damaged_is_named():
    verdict = make_verdict()
    verdict["gates"] = verdict["gates"][:1]
    assert sentences(verdict)[0] == "Passed: 1 gate and 1 check of the files."
    verdict["integrity"]["checks"].append({"name": "slots", "passed": False, "detail": "model.x is all zeros."})
    assert sentences(verdict)[0] == "Failed: slots: model.x is all zeros."
    found = rows(tables(verdict)["integrity"])
    assert found == {"files": ("14 files", PASSED), "slots": ("model.x is all zeros.", FAILED)}


def test_a_gate_that_just_failed_does_not_look_as_if_it_held():
    verdict = make_verdict()
    verdict["gates"] = [{"name": "perplexity", "passed": False, "value": 1.01004, "limit": 1.01}]
    said = "perplexity, times the bare original's"
    assert rows(tables(verdict)["gates"])[said] == ("1.01004", "at most 1.01", FAILED)
    assert sentences(verdict)[0] == f"Failed: {said}: 1.01004, and asked for was at most 1.01."


def test_what_has_to_be_reached_reads_otherwise():
    verdict = make_verdict()
    verdict["gates"] = [{"name": "unheard_of", "passed": False, "value": 0.975, "limit": 0.98, "minimum": True}]
    assert rows(tables(verdict)["gates"])["unheard_of"] == ("0.975", "at least 0.98", FAILED)
    assert sentences(verdict)[0] == "Failed: unheard_of: 0.975, and asked for was at least 0.98."


def test_a_worse_model_is_called_worse():
    verdict = make_verdict()
    verdict["quantised"] = {"w4": beside(1.5, 1.7)}
    said = " ".join(sentences(verdict))
    assert "quantised alike: worse with weights only, 4 bit." in said and "better with" not in said
    verdict["tuning"]["best_step"] = 0
    assert "what was written is untuned" in sentences(verdict)[-1]


def test_original_and_converted_stand_side_by_side():
    shown = tables(make_verdict())
    found = rows(shown["quantised"])
    assert found["not quantised"] == ("20.0000", "1", "19.0000", "0.950 (0.931 to 0.969)")
    assert found["8 bit, static scales"] == ("50.0000", "2.500 (2.450 to 2.551)", "21.0000", "1.050 (1.029 to 1.071)")
    assert found["8 bit, static scales, run in int8"][0] == "48.0000"
    perplexity = shown["perplexity"]
    assert list(rows(perplexity)) == ["original, bare", "original + the same prefix", "converted"]
    assert rows(perplexity)["converted"] == ("8,176", "19.0000", "2.9444390", "0.950 (0.931 to 0.969)")
    edited = rows(shown["cache_edits"])["first tokens deleted"]
    assert edited == ("× 2.226", "× 1.000", "× 1.000", "0.9968 (0.9918 to 1.0018)")
    assert rows(shown["streaming"])["original, keeping none"] == ("30.4000", "1.520 (1.490 to 1.551)")
    assert rows(shown["tasks"])["arc_easy, acc"] == (
        "1,200", "0.610 ± 0.010", "0.608 ± 0.010", "+0.0020 (−0.0030 to +0.0070)",
    )  # fmt: skip
    assert rows(shown["tuning"])["kept"] == ("20", "25.0000", "0.500")
    assert rows(shown["massive_activations"]) == {
        "original, bare": ("1,228", "14,379", "3–5, 9", "507 and 12", "“The” and “␣”"),
        "converted": ("0", "–", "–", "–", "–"),
    }


def test_every_table_is_the_same_in_a_model_card():
    card = card_tables(make_verdict(), Verify())
    for table in tables(make_verdict()).values():
        assert f"### {table.title}\n" in card
        for row in table.rows:
            assert f"| {' | '.join(row)} |".replace("\N{NO-BREAK SPACE}", " ") in card


def test_a_token_that_looks_like_markup_is_shown_as_it_is():
    text = Table("T", ("", "a|b"), [("“<s>”", "`x` *y* [z]")], note="<b>").markdown()
    assert text == "### T\n\n|  | a\\|b |\n|---|---:|\n| “\\<s>” | \\`x\\` \\*y\\* \\[z] |\n\n\\<b>"


def test_an_interval_that_bounds_nothing_is_left_out():
    assert times({"mean": 0.0, "low": -math.inf, "high": math.inf}) == "1"
    assert times({"mean": 800.0, "low": 700.0, "high": 900.0}) == "∞"
    assert times(None) == "–"


def test_every_scheme_has_a_name_in_words():
    assert {*NAMES, "calibrations"} == set(Quantised.model_fields)


# ---- figures


def test_points_are_factors_and_what_is_far_off_is_an_arrow():
    verdict = make_verdict()
    with drawing():
        axes = figure_beside(tables(verdict)["quantised"].figure).axes[0]
    points = {(line.get_color(), line.get_marker()): [] for line in axes.lines}
    for line in axes.lines:
        points[line.get_color(), line.get_marker()].append(line.get_xdata()[0])
    assert points[LIGHT["blue"], "o"] == pytest.approx([1, 2.5, 2.4, 1.1])
    assert points[LIGHT["orange"], "o"] == pytest.approx([0.95, 1.05, 1.07, 1.09])
    edge = axes.get_xlim()[1]
    assert points[LIGHT["orange"], ">"] == points[LIGHT["blue"], ">"] == [edge] and 10 <= edge < 12
    assert len(axes.get_yticks()) == 5


def test_the_kept_state_is_marked():
    verdict = make_verdict()
    with drawing():
        drawn = figure_beside(tables(verdict)["tuning"].figure)
    loss, held_out = drawn.axes
    assert list(loss.lines[0].get_ydata()[:2]) == [1, 0.5] and list(held_out.lines[0].get_ydata()) == [50, 30, 25, 26]
    assert [list(axes.lines[1].get_xdata()) for axes in drawn.axes] == [[20, 20]] * 2
    assert (*held_out.lines[2].get_xdata(), *held_out.lines[2].get_ydata()) == (20, 25)
    assert loss.get_title("left") == "Loss"
    verdict["tuning"]["losses"] = [{"step": step, "loss": 20.0 if step == 50 else 1.0} for step in range(1, 201)]
    with drawing():
        loss = figure_beside(tables(verdict)["tuning"].figure).axes[0]
    assert loss.get_title("left") == "Loss (1 step beyond the frame)"
    assert 0.9 < loss.get_ylim()[0] < 1 < loss.get_ylim()[1] < 2
    verdict["tuning"] |= {"losses": [], "held_out": verdict["tuning"]["held_out"][:1], "best_step": 0}
    assert figure_beside(tables(verdict)["tuning"].figure) is None and tables(verdict)["tuning"].rows
