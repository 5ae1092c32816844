"""What was gained, in the report: only what was measured, in words and figures that say what the verdict says."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from test_report import Page

from surgery.checkpoint.results import json_text
from surgery.recipe import Quantised
from surgery.report import gain, gain_plots, gain_words, write_report
from surgery.report.style import LIGHT, drawing
from surgery.verification.gates.cache_edits import EDITS
from surgery.verification.verdict import plain_json

SURVEYS = [{"source": name, "layers": [{"layer": 0, "max": 1.0}]} for name in ("original", "converted")]
PARTS = [part.key for part in gain.PARTS]


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
    assert section.count('class="bad"') == 1 and section.count('class="good"') == 6


def test_without_a_verdict_there_is_no_such_section(tmp_path):
    page = Page(write_report(SURVEYS, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "gain" not in page.sections and not shown(page)


@pytest.mark.parametrize("how", ["missing", "null"])
@pytest.mark.parametrize(
    ("key", "part"),
    [("perplexity", "perplexity"), ("quantised", "quantised"), ("streaming", "streaming"), ("cache_edits", "edits"),
     ("tasks", "tasks"), ("tuning", "tuning"), ("delta_nll", None), ("prefix", None)],
)  # fmt: skip
def test_what_was_not_measured_is_not_shown(key, part, how, tmp_path):
    verdict = make_verdict()
    verdict[key] = None
    if how == "missing":
        del verdict[key]
    page = write(verdict, tmp_path)
    assert sorted(shown(page)) == sorted(set(PARTS) - {part})
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
    assert gain_words.sentences(make_verdict()) == [
        "Failed: quantised, 8 bit, static scales, times the bare original's: 1.071, and asked for was at most 1.05.",
        "Folded into the slots: the tokens “␣” and “⏎”.",
        "Perplexity of the converted model, against the bare original: better, −5%.",
        "The converted model, quantised, against the original, quantised alike: better with 8 bit, static scales; 8 "
        "bit, static scales, run in int8 – no clear difference with cache only, 4 bit; cache only, 2 bit.",
        "Streaming with nothing kept, against the original that keeps its first 4 tokens: the original is worse, +52%, "
        "the converted model less than 1% away.",
        "Tuning: kept is the state after step 20, where perplexity on held-out text had gone from 50.00 to 25.00.",
    ]


def test_what_passed_is_counted_and_what_is_damaged_is_named():
    verdict = make_verdict()
    verdict["gates"] = verdict["gates"][:1]
    assert gain_words.sentences(verdict)[0] == "Passed: 1 gate and 1 check of the files."
    verdict["integrity"]["checks"].append({"name": "slots", "passed": False, "detail": "model.x is all zeros."})
    assert gain_words.sentences(verdict)[0] == "Failed: slots: model.x is all zeros."
    assert rows(gain.gates(verdict))["checks of the files that hold"] == ("1", "all 2", gain.FAILED)


def test_a_gate_that_just_failed_does_not_look_as_if_it_held():
    verdict = make_verdict()
    verdict["gates"] = [{"name": "perplexity", "passed": False, "value": 1.01004, "limit": 1.01}]
    assert rows(gain.gates(verdict))["perplexity, times the bare original's"] == ("1.01004", "1.01", gain.FAILED)


def test_a_worse_model_is_called_worse():
    verdict = make_verdict()
    verdict["quantised"] = {"w4": beside(1.5, 1.7)}
    said = " ".join(gain_words.sentences(verdict))
    assert "quantised alike: worse with weights only, 4 bit." in said and "better with" not in said
    verdict["tuning"]["best_step"] = 0
    assert "what was written is untuned" in gain_words.sentences(verdict)[-1]


def test_original_and_converted_stand_side_by_side():
    found = rows(gain.quantised(make_verdict()))
    assert found["not quantised"] == ("20.00", "1", "19.00", "0.950 (0.931 to 0.969)")
    assert found["8 bit, static scales"] == ("50.00", "2.500 (2.450 to 2.551)", "21.00", "1.050 (1.029 to 1.071)")
    assert found["8 bit, static scales, run in int8"][0] == "48.00"
    perplexity = gain.perplexity(make_verdict())
    assert list(rows(perplexity)) == ["original, bare", "original + the same prefix", "converted"]
    assert rows(perplexity)["converted"] == ("19.00", "0.950 (0.931 to 0.969)") and "8,176" in perplexity.note
    edited = rows(gain.cache_edits(make_verdict()))["first tokens deleted"]
    assert edited == ("× 2.226", "× 1", "× 1", "0.9968 (0.9918 to 1.0018)")
    assert rows(gain.tuning(make_verdict()))["kept"] == ("20", "25.00", "0.500")


def test_an_interval_that_bounds_nothing_is_left_out():
    assert gain_words.times({"mean": 0.0, "low": -math.inf, "high": math.inf}) == "1"
    assert gain_words.times({"mean": 800.0, "low": 700.0, "high": 900.0}) == "∞"
    assert gain_words.times(None) == "–"


def test_every_scheme_and_edit_has_a_name_in_words():
    assert set(gain_words.SCHEMES) == set(Quantised.model_fields) and set(gain_words.EDITS) == set(EDITS)


# ---- figures


def test_points_are_factors_and_what_is_far_off_is_an_arrow():
    verdict = make_verdict()
    with drawing():
        axes = gain_plots.quantised(verdict).axes[0]
    points = {(line.get_color(), line.get_marker()): [] for line in axes.lines}
    for line in axes.lines:
        points[line.get_color(), line.get_marker()].append(line.get_xdata()[0])
    assert points[LIGHT["orange"], "o"] == pytest.approx([1, 2.5, 2.4, 1.1])
    assert points[LIGHT["blue"], "o"] == pytest.approx([0.95, 1.05, 1.07, 1.09])
    edge = axes.get_xlim()[1]
    assert points[LIGHT["orange"], ">"] == points[LIGHT["blue"], ">"] == [edge] and 10 <= edge < 12
    assert len(axes.get_yticks()) == 5


def test_the_kept_state_is_marked():
    verdict = make_verdict()
    with drawing():
        drawn = gain_plots.tuning(verdict)
    loss, held_out = drawn.axes
    assert list(loss.lines[0].get_ydata()[:2]) == [1, 0.5] and list(held_out.lines[0].get_ydata()) == [50, 30, 25, 26]
    assert [list(axes.lines[1].get_xdata()) for axes in drawn.axes] == [[20, 20]] * 2
    assert (*held_out.lines[2].get_xdata(), *held_out.lines[2].get_ydata()) == (20, 25)
    assert loss.get_title("left") == "Loss"
    verdict["tuning"]["losses"] = [{"step": step, "loss": 20.0 if step == 50 else 1.0} for step in range(1, 201)]
    with drawing():
        loss = gain_plots.tuning(verdict).axes[0]
    assert loss.get_title("left") == "Loss (1 step beyond the frame)"
    assert 0.9 < loss.get_ylim()[0] < 1 < loss.get_ylim()[1] < 2
    verdict["tuning"] |= {"losses": [], "held_out": verdict["tuning"]["held_out"][:1], "best_step": 0}
    assert gain_plots.tuning(verdict) is None and gain.tuning(verdict).rows
