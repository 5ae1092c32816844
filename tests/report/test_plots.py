"""The figures: what stands in which place, and that it is the survey's own."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
from helpers.surveys import make_survey

from surgery.report import maps, plots, write_plots
from surgery.report.style import LIGHT, drawing


@pytest.fixture
def style():
    with drawing():
        yield


def strength(axes) -> np.ndarray:
    """How dark each cell of a heat map is in the light theme, (rows, columns); NaN where it is transparent."""
    image = next(image for image in axes.images if image.get_gid() == "on-light")
    pixels = np.asarray(image.get_array(), float)
    return np.where(pixels[..., 3] > 0, 1 - pixels[..., :3].mean(axis=-1), np.nan)


def test_sink_map_has_heads_in_rows_and_layers_in_columns(style):
    survey = make_survey()
    survey["layers"][3]["sink_score"] = [0.0, 0.0, 1.0]
    axes = maps.sink_map(survey, [survey]).axes[0]
    dark = strength(axes)
    assert dark.shape == (3, 4)  # layer 0 has no heads
    assert np.unravel_index(dark.argmax(), dark.shape) == (2, 2)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3", "4"]


def test_slots_have_a_sink_map_of_their_own(style):
    survey = make_survey(slots=2)
    drawn = maps.sink_map(survey, [survey])
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    assert titles.index("Attention to the slots, all together") > titles.index("Attention to the first token")
    shown = strength(drawn.axes[titles.index("Attention to the slots, all together")])
    assert np.allclose(shown, shown[0, 0]) and shown[0, 0] > 0.2  # 0.15 + 0.15 everywhere


def test_attention_map_hides_the_future_and_names_slots(style):
    bare, converted = (maps.attention_maps(make_survey(slots=n))[0][2].axes[0] for n in (0, 2))
    assert np.array_equal(np.isnan(strength(bare)), np.triu(np.ones((6, 6), bool), 1))
    hidden = np.isnan(strength(converted))
    assert hidden.shape == (6, 8) and not hidden[:, :2].any()
    assert np.array_equal(hidden[:, 2:], np.triu(np.ones((6, 6), bool), 1))
    assert converted.get_xticklabels()[0].get_text() == "slots"
    assert [t.get_text() for t in bare.get_yticklabels()][:3] == ["The", "␣cat", "⏎"]


def test_landscape_labels_the_loudest_and_shares_its_scales(style):
    loud, quiet = make_survey(), make_survey(spike=1.0)
    axes = maps.landscape(quiet, [loud, quiet]).axes
    assert np.nanmax(strength(axes[0])) < 0.5  # beside 5,000, one is next to nothing
    assert np.array_equal(strength(maps.landscape(quiet, [quiet, loud]).axes[0]), strength(axes[0]))
    assert np.nanmax(strength(maps.landscape(quiet, [quiet]).axes[0])) > 0.2
    both = [maps.landscape(survey, [loud, quiet]) for survey in (loud, quiet)]
    assert both[0].axes[1].get_ylim() == both[1].axes[1].get_ylim() and both[0].axes[1].get_ylim()[1] > 5000
    dark = strength(both[0].axes[0])
    assert np.unravel_index(np.nanargmax(dark), dark.shape) == (0, 2)
    wide = make_survey()
    size = np.full((2, 300), 0.1)
    size[1, 123] = 900.0
    wide["landscape"] = {"layer": 1, "tokens": ["a", "b"], "dims": list(range(300)), "values": size.tolist()}
    labels = [tick.get_text() for tick in maps.landscape(wide, [wide]).axes[0].get_xticklabels()]
    assert "123" in labels and len(labels) < 25


def test_lines_are_the_surveys_own_figures(style):
    survey = make_survey()
    lines = {line.get_label(): line for line in plots.magnitude(survey, [survey]).axes[0].lines}
    assert lines["largest"].get_ydata().tolist() == [4.0, 5.0, 5000.0, 5000.0, 8.0]
    assert lines["second"].get_ydata().tolist() == [2.0, 2.5, 2500.0, 2500.0, 4.0]
    assert lines["massive from here"].get_ydata().tolist() == [500.0] * 5  # 1,000 times the median of 0.5
    assert list(lines["born: layer 2"].get_xdata()) == [2, 2] and list(lines["gone: layer 4"].get_xdata()) == [4, 4]
    drawn = plots.depth(survey, [survey])
    norm, entropy, sinks = drawn.axes
    assert [len(axes.patches) for axes in drawn.axes] == [3, 3, 3]  # phases, in every panel
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in norm.patches]
    assert edges == [(-0.5, 1.5), (1.5, 3.5), (3.5, 4.5)]
    assert {"Mix 0–1", "Compress 2–3", "Refine 4"} <= {text.get_text() for text in drawn.legends[0].texts}
    assert sinks.lines[0].get_ydata()[1:].tolist() == [0, 2 / 3, 2 / 3, 0] and math.isnan(sinks.lines[0].get_ydata()[0])
    assert entropy.lines[0].get_ydata()[2] == 0.25


def test_phases_are_shaded_only_where_they_are_claimed(style):
    survey = make_survey()
    survey["across"]["phases"] = {"mix": [0, 1], "compress": [2, 4], "refine": None}
    assert [len(axes.patches) for axes in plots.depth(survey, [survey]).axes] == [2, 2, 2]
    survey["across"]["phases"] = None
    assert [len(axes.patches) for axes in plots.depth(survey, [survey]).axes] == [0, 0, 0]


@pytest.mark.parametrize(
    "plot", [plots.magnitude, plots.depth, plots.spectrum, plots.attention_spread, plots.interventions]
)
def test_the_same_height_means_the_same_in_every_survey(plot, style):
    first, second = make_survey(), make_survey(spike=2000.0)
    second["layers"][3] |= {"effective_tokens": [1.0, 1.0, 300.0], "dominance": 9000.0}
    second["interventions"][1]["delta_nll"]["high"] = 9.0
    drawn = [plot(survey, [first, second]) for survey in (first, second)]
    for at in range(len(drawn[0].axes)):
        assert drawn[0].axes[at].get_ylim() == drawn[1].axes[at].get_ylim()
        assert drawn[0].axes[at].get_xlim() == drawn[1].axes[at].get_xlim()
    tops = [axes.get_ylim()[1] for axes in drawn[0].axes]
    assert {plots.spectrum: 9000, plots.attention_spread: 300}.get(plot, 0) <= max(tops)  # the second survey's own


def test_compare_puts_models_of_different_depth_on_one_axis(style):
    short = make_survey("short")
    short["layers"] = short["layers"][:3]
    axes = plots.compare([make_survey("long"), short], ["long", "short"]).axes
    assert [line.get_xdata().tolist() for line in axes[0].lines] == [[0, 0.25, 0.5, 0.75, 1], [0, 0.5, 1]]
    assert plots.compare([short], ["short"]) is None


@pytest.mark.slow
def test_plots_are_png_and_svg_and_leave_matplotlib_alone(tmp_path):
    """Plots are written as PNG and SVG, and leave no trace in matplotlib's settings."""
    survey = make_survey()
    survey["layers"] = [{key: row.get(key) for key in ("layer", "max", "sink_score")} for row in survey["layers"]]
    survey["interventions"] = survey["norm_maps"] = None
    with matplotlib.rc_context({"font.size": 17.0, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        files = write_plots([survey], tmp_path / "deep" / "plots")
        assert dict(matplotlib.rcParams) == before
    names = ["landscape", "magnitude", "sinks", "attention-block2-head1"]
    assert sorted(path.name for path in files) == sorted(f"{name}.{kind}" for name in names for kind in ("png", "svg"))
    assert sorted((tmp_path / "deep" / "plots").iterdir()) == sorted(files)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files if path.suffix == ".png")
    sinks = (tmp_path / "deep" / "plots" / "sinks.svg").read_text()
    assert "<svg" in sinks and "var(--" not in sinks and LIGHT["ink"] in sinks
    assert sinks.count("<image") == 2  # the map and its scale, in one theme
    small = [{"source": f"x/{name}", "layers": [{"layer": 0, "max": 1.0, "ratio": 2.0}]} for name in ("m", "m n")]
    assert [path.name for path in write_plots(small, tmp_path / "two") if path.suffix == ".png"] == [
        "compare.png", "1-m-magnitude.png", "2-m-n-magnitude.png",
    ]  # fmt: skip
