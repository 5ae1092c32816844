"""Numbers, effects and names as the report writes them."""

from __future__ import annotations

import copy
import math
import re

import pytest
from helpers.surveys import make_survey
from hypothesis import given
from hypothesis import strategies as st

from surgery import words
from surgery.report import plots, summary, tables
from surgery.report.style import drawing


@pytest.mark.parametrize(
    ("value", "text"),
    [(25439.2, "25,439"), (21.2644, "21.26"), (0, "0"), (3, "3"), (-0.5, "−0.5"), (1.3e7, "1.3×10⁷"), (2e-5, "2×10⁻⁵"),
     (1e9, "10⁹"), (None, "–"), (math.nan, "–"), (math.inf, "∞"), (-math.inf, "−∞"), (9999999.0, "9,999,999")],
)  # fmt: skip
def test_numbers(value, text):
    assert words.number(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300))
def test_numbers_read_back_to_four_digits(value):
    back = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-", ",")
    text = re.sub(
        r"(^|×|−)10(?=[⁻⁰-⁹¹²³])", lambda m: {"×": "e"}.get(m[1], f"{m[1]}1e"), words.number(value)
    ).translate(back)
    assert float(text) == pytest.approx(value, rel=6e-4, abs=1e-300)


def test_shares_short_of_all_are_never_called_all():
    assert [words.percent(x) for x in (0.993, 1.0, 0.99999, 0.9996, 0.0, None)] == [
        "99.3%", "100%", "99.999%", "99.960%", "0%", "–",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mean", "low", "high", "said"),
    [
        (math.log(10), 2.0, 2.5, "collapse, ×10"), (math.log(9.9), 2.0, 2.5, "worse, +890%"),
        (0.0, -0.009, 0.009, "less than 1%"), (0.0, -0.009, 0.0101, "too few chunks to tell"),
        (0.0, -0.0101, 0.009, "too few chunks to tell"), (-0.0001, -0.0002, -0.0001, "less than 1%"),
        (1.0, -0.5, 2.5, "too few chunks to tell"), (8.0, -0.5, 20.0, "too few chunks to tell"),
        (0.02, 0.005, 0.035, "worse, +2.02%"), (-0.02, -0.03, -0.01, "better, −1.98%"),
        (0.1, None, None, "too few chunks to tell"), (None, None, None, "–"), (math.inf, None, None, "collapse"),
    ],
)  # fmt: skip
def test_effects_are_judged_on_the_interval(mean, low, high, said):
    assert summary.effect({"delta_nll": {"mean": mean, "low": low, "high": high}}) == said


def test_an_intervention_without_effect_is_not_called_one():
    rows = make_survey()["interventions"]
    assert [summary.effect(row) for row in rows] == ["reference", "collapse, ×50", "less than 1%", "not possible"]
    rows[1]["delta_nll"]["low"] = -3.0
    assert summary.effect(rows[1]) == "too few chunks to tell"
    survey = make_survey()
    survey["interventions"].append({**survey["interventions"][2], "where": "every layer"})
    said = "Perplexity changes by less than 1% under: to their mean (layer 2; every layer)."
    assert said in summary.summary(survey, "m") and "untouched" not in " ".join(summary.summary(survey, "m"))
    table = tables.interventions(make_survey())
    assert "Sink rate of position 5 under “to their mean, layer 2”: 12.5% → 50%." in table.note
    assert "“none there, layer 9” is not possible: it touched nothing." in table.note and len(table.rows) == 4
    with drawing():
        labels = plots.interventions(make_survey(), [make_survey()]).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["MLP to zero, layer 2", "to their mean, layer 2"]


def test_the_audit_says_when_nothing_suffices():
    survey = make_survey()
    survey["audit"] = {"layer": 2, "scalars": None, "of": 4096, "tried": {"0": 10.0, "64": 11.0, "1024": 12.0}}
    said = "Zeroing the 1,024 largest of the 4,096 scalars in layer 2 does not multiply perplexity by ten."
    assert said in summary.summary(survey, "m")


def test_an_interval_has_the_decimals_that_it_is_wide():
    assert words.interval({"mean": 8.1, "low": 7.8, "high": 8.4}).replace("\xa0", " ") == "+8.10 (+7.80 to +8.40)"
    found = words.interval({"mean": -1e-5, "low": -9e-4, "high": 1.1e-3}).replace("\xa0", " ")
    assert found == "+0.0000 (−0.0009 to +0.0011)"


def test_tokens_show_what_has_no_shape():
    assert [words.visible(t) for t in ("\n", " the", "\t", "", "\x00", "x" * 30)] == [
        "⏎", "␣the", "⇥", "∅", "\\u0000", "x" * 23 + "…",
    ]  # fmt: skip


def test_names_tell_surveys_apart():
    surveys = [{"source": source} for source in ("a/m", "b/m", "c/n", "c/n", None)]
    assert summary.names_of(surveys) == ["a/m", "b/m", "c/n (3)", "c/n (4)", "survey 5"]


def test_massive_table_groups_by_dimension_and_token():
    survey = make_survey()
    survey["layers"][3]["massive"].append({"dim": 9, "position": 4, "token": "\n", "value": 7000.0})
    assert tables.massive(survey).rows == [("9", "⏎", "3", "4", "7,000"), ("7", "The", "2–3", "0", "−5,000")]
    for dim in range(20):
        survey["layers"][2]["massive"].append({"dim": 100 + dim, "position": 1, "token": "x", "value": 10.0})
    table = tables.massive(survey)
    assert len(table.rows) == tables.MOST and table.note.startswith("10 smaller")
    assert tables.massive(copy.deepcopy(make_survey(spike=2.0))) is None
