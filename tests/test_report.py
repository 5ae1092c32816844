"""The report: what is in it, that it fetches nothing, that no text can become markup, that gaps leave no hole."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.checkpoint.results import json_text
from surgery.errors import OutputError, SourceError
from surgery.report import html, maps, plots, tables, words, write_plots, write_report
from surgery.report.style import DARK, LIGHT, drawing, inline_svg
from surgery.verification.verdict import plain_json

TOKENS = ["The", " cat", "\n", " sat", " on", "."]
SECTIONS = [section.key for section in html.SECTIONS] + ["attention", "massive", "neurons", "layers"]


def make_survey(source: str = "models/tiny", *, slots: int = 0, spike: float = 5000.0) -> dict:
    """A survey of 5 layers, 3 heads and 6 tokens; `spike` stands at layers 2 and 3 in dimension 7 of token 0."""
    layers = []
    for layer in range(5):
        massive = layer in (2, 3) and spike >= 1000
        top, p1 = (spike, 0.98) if massive else (4.0 + layer, 0.4)
        row = {
            "layer": layer, "count": 2 if massive else 0, "max": top, "median": 0.5, "ratio": 2 * top,
            "top3": [top, top / 2, top / 4], "first_norm": 1.1 * top, "rest_norm": 6.0, "p1": p1, "p1_bound": p1 - 0.01,
            "massive": [{"dim": 7, "position": 0, "token": "The", "value": -top}] if massive else [],
            "entropy_bits": 0.25 if massive else 3.5 + layer / 10, "entropy_normalised": 0.5, "dominance": top,
            "entropy_bound": 0.3 if massive else 4.0, "lens_ppl": 4000.0 / (layer + 1),
        }  # fmt: skip
        if layer:
            row |= {
                "sink_score": [0.1 * layer, 0.2 * layer, 0.05],
                "slot_score": [[0.3 / slots] * slots] * 3 if slots else [[]] * 3,
                "sink_rate": 2 / 3 if massive else 0.0, "mixing": 0.4, "attention_entropy": [1.0, 2.0, 3.0],
                "effective_tokens": [2.5, 7.5, 20.0], "value_variance_first": [0.01, 0.02, 0.03],
                "value_variance_rest": [0.1, 0.2, 0.3], "attended_share": [0.1, 0.2, 0.3], "separability": [0.5] * 3,
                "gradient_sensitivity": [0.01, 0.02, 0.02], "gradient_bound": 0.03,
                "attended_by_length": {"length": [2, 4, 6], "tokens": [1.5, 2.0, 2.5]},
            }  # fmt: skip
        layers.append(row)
    size = np.full((6, 4), 0.5)
    size[0, 2] = spike
    weights = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    weights = np.concatenate([np.full((6, slots), 0.2), weights * (1 - 0.2 * slots)], axis=1)
    delta = {"mean": math.log(50), "low": math.log(40), "high": math.log(60)}
    kept = {"mean": 0.001, "low": -0.002, "high": 0.004}
    planted = {"position": 5, "sink_rate": 0.5, "untouched": 0.125}
    names = ("name", "where", "touched", "ppl", "delta_nll", "sink_rate", "entropy_bits", "massive")
    rows = [
        ("untouched", "", 0, 10.0, dict.fromkeys(kept, 0.0), 0.6, 0.25, 4),
        ("MLP to zero", "layer 2", 4, 500.0, delta, 0.0, 3.0, 0),
        ("to their mean", "layer 2", 4, 10.0, kept, 0.6, 0.25, 4),
        ("none there", "layer 9", None, None, None, None, None, None),
    ]
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    rows[2]["planted"], rows[3]["error"] = planted, "it touched nothing."
    found = {"count": 4, "worst_ratio": 2 * spike, "dims": [7], "layers": [2, 3], "token_ids": [5]}
    nothing = {"count": 0, "worst_ratio": 0.0, "dims": [], "layers": [], "token_ids": []}
    big = spike >= 1000
    return {
        "source": source, "model_type": "llama", "chunks": 8, "chunk_length": 64, "n_slots": slots, "normed_sites": 0,
        "perplexity": {"ppl": 20.003, "nll": 2.996, "tokens": 504}, "massive_activations": found if big else nothing,
        "layers": layers,
        "across": {
            "born": 2 if big else None, "died": 4 if big else None, "dims": [7], "tokens": ["The"],
            "auto": {"born": 1, "died": 4, "spans": [[1, 3]]},
            "phases": {"mix": [0, 1], "compress": [2, 3], "refine": [4, 4]} if big else None,
            "correlations": {"first_norm_entropy": -0.914, "first_norm_sink_rate": None},
        },
        "super_neurons": [{"layer": 2, "unit": 31, "dim": 7, "share": 0.7, "activation": 2944.2, "column_norm": 5.95}],
        "landscape": {"layer": 2, "tokens": TOKENS, "dims": [0, 3, 7, 9], "values": size.tolist()},
        "attention_maps": [{"block": 2, "head": 1, "slots": slots, "tokens": TOKENS, "weights": weights.tolist()}],
        "interventions": rows if big else None,
        "audit": {"layer": 2, "scalars": 3, "of": 4096, "tried": {"0": 10.0, "3": 101.0}} if big else None,
    }  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes, all text, and the text of each section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source, self.tags, self.texts, self.cells = text, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def sections(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


def write(surveys: list[dict], folder: Path) -> Page:
    return Page(write_report(surveys, folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Page:
    return write([make_survey()], tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Page:
    before, after = make_survey("a/tiny"), make_survey("b/tiny", slots=2, spike=40.0)
    return write([before, after], tmp_path_factory.mktemp("together"))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_all_sections_and_their_figures_are_there(alone):
    assert alone.sections == ["summary", *SECTIONS, "words"]
    figures = [attrs["aria-label"] for tag, attrs in alone.tags if tag == "svg"]
    assert len(figures) == len(html.SECTIONS) + 1  # and one attention map
    assert all("tiny" in label for label in figures)
    assert "Block 2, head 1" in alone.text and "20.00" in alone.text
    assert alone.source.startswith("<!doctype html>") and alone.source.rstrip().endswith("</html>")


@pytest.mark.parametrize("which", ["alone", "together"])
def test_the_page_fetches_and_runs_nothing(which, request):
    page = request.getfixturevalue(which)
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "a",
        "img",
    }
    assert not re.search("https?:|@import|//fonts", page.source)
    references = [*page.attributes("src"), *page.attributes("href"), *page.attributes("xlink:href")]
    assert references and all(value.startswith(("#", "data:image/png;base64,")) for value in references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.source))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    policy = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1 and "default-src 'none'" in policy[0]


@pytest.mark.parametrize("which", ["alone", "together"])
def test_ids_are_unique_and_every_reference_has_its_target(which, request):
    page = request.getfixturevalue(which)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    local = re.findall(r'(?:url\(|href=")#([^")]*)', page.source)
    assert local and set(local) <= set(ids)


def test_colours_are_variables_that_both_themes_define(alone):
    in_figures = "".join(re.findall(r"<svg.*?</svg>", alone.source, flags=re.DOTALL))
    images = {theme: re.findall(rf'base64,([^"]*)" class="on-{theme}"', in_figures) for theme in ("light", "dark")}
    in_figures = re.sub(r"data:image[^\"]*", "", in_figures)
    assert not re.findall(r"#[0-9a-f]{6}\b(?=[;\"])", in_figures)  # no colour that a theme could not change
    used = set(re.findall(r"var\(--(\w+)\)", in_figures))
    assert {"ink", "muted", "blue", "mix", "compress", "refine"} <= used <= LIGHT.keys()
    assert LIGHT.keys() == DARK.keys() and len(set(LIGHT.values())) == len(LIGHT)
    assert len(images["light"]) == len(images["dark"]) >= 3
    assert all(light != dark for light, dark in zip(images["light"], images["dark"], strict=True))


def test_the_summary_says_what_the_survey_holds(alone):
    for sentence in (
        "tiny is a llama model with 4 blocks. Its perplexity on 8 chunks of 64 tokens is 20.00.",
        "4 activations are massive; the worst is 10,000 times the median of its layer. They stand in feature dimension "
        "7, on the tokens “The”. They are born in layer 2 and gone from layer 4 on.",
        "In layer 2, 66.7% of the heads are attention sinks",
        "narrowest in layer 2: its spectrum has an entropy of 0.25 bits, with 98% of the energy in one direction.",
        "Mix (layers 0–1), Compress (layers 2–3) and Refine (layer 4).",
        "correlates with that of the entropy by −0.91.",
        "collapses (ten times or more) under: MLP to zero (layer 2).",
        "Zeroing the 3 largest of the 4,096 scalars in layer 2 of each sequence multiplies perplexity by ten or more.",
        "changes by less than 1% under: to their mean (layer 2).",
    ):
        assert sentence in alone.text


def test_several_surveys_stand_side_by_side(together):
    assert {"overview", *SECTIONS} <= set(together.sections)
    # Two folders have the same name: they are called by their whole source.
    assert together.source.count("<h3>a/tiny</h3>") == together.source.count("<h3>b/tiny</h3>") == 1 + len(SECTIONS)
    assert "From a/tiny to b/tiny: massive activations 4 → 0, perplexity 20.00 → 20.00" in together.text
    assert "No activation is massive" in together.text and "No phases of depth are claimed." in together.text
    assert "2 explicit bias slots at each attention site" in together.text
    # What one of them lacks is said where the other shows it.
    depth, massive = (together.source.split(f'id="{key}"')[1].split("</section>")[0] for key in ("depth", "massive"))
    assert depth.count("<svg") == 2 and "Nothing was measured here" not in depth
    assert massive.count("<table") == 1 and massive.count("Nothing was measured here") == 1


def test_a_different_text_is_not_compared_in_silence():
    first, second = make_survey("x"), make_survey("y")
    second["perplexity"]["tokens"] = 252
    assert "different text (504 and 252 tokens)" in tables.changes([first, second], ["x", "y"])[0]
    assert "different text" not in tables.changes([first, first], ["x", "y"])[0]


HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</svg></style>", "$\\frac{1}{0}$", "a\x00\x1b[31m",
    "\ud800", f'id="{LIGHT["ink"]}', "url(#x)", "{{ 7 * 7 }}", "\u202eevil", "-->",
]  # fmt: skip


def test_no_text_becomes_markup(tmp_path):
    survey = make_survey("/models/<b>bold</b>\udcff")
    survey["layers"] = [{key: row[key] for key in ("layer", "massive", "max")} for row in survey["layers"]]
    survey["model_type"] = "<i>llama</i>\ud800"
    survey["landscape"] = {"layer": 2, "tokens": HOSTILE, "dims": [0, 1], "values": [[1.0, 2.0]] * len(HOSTILE)}
    survey["across"]["tokens"] = HOSTILE[:5]
    for at, token in enumerate(HOSTILE):
        survey["layers"][2]["massive"].append({"dim": at, "position": at, "token": token, "value": 1000.0 - at})
    survey["interventions"][1]["name"] = "<script>x</script>"
    survey["interventions"][1]["where"] = "<img src=x>"
    page = write([survey], tmp_path)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "b", "i"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    table = [words.visible(token) for token in HOSTILE[:10]]  # what the table of massive activations has room for
    assert all(token in page.text for token in table)
    in_figure = [words.visible(token, maps.LABEL) for token in HOSTILE]
    assert sum(text in page.texts for text in in_figure) >= 8  # of those that fit beside the map, as they are
    assert "49" not in page.text.split("What the words mean")[0].split("{{")[-1][:12]
    assert not set(page.source) & {"\x00", "\x1b", "\u202e"}


def test_an_svg_keeps_text_that_looks_like_markup_or_colour():
    with drawing():
        drawn = plots.figure(60)
        drawn.text(0.1, 0.5, f'<g id="x"> {LIGHT["ink"]} url(#p) $a$')
        text = Page(inline_svg(drawn, "p", 'a "label" <b>'))
    assert f'<g id="x"> {LIGHT["ink"]} url(#p) $a$' in text.texts
    assert text.tags[0][0] == "svg" and text.tags[0][1]["aria-label"] == 'a "label" <b>'


# --- gaps -------------------------------------------------------------------------------------------------------------


def everything(surveys: list[dict]) -> set[str]:
    """Draw and word all that a page would hold of the first survey; the keys of the sections that have something."""
    survey = surveys[0]
    with drawing():
        drawn = {section.key for section in html.SECTIONS if section.plot(survey, surveys) is not None}
        if maps.attention_maps(survey):
            drawn.add("attention")
        plots.compare([survey, *surveys], words.names_of([survey, *surveys]))
    drawn |= {key for key, _, _, _, table in tables.SECTIONS if table(survey) is not None}
    tables.interventions(survey)
    texts = [*words.summary(survey, "m"), *(cell for tile in tables.tiles(survey) for cell in tile)]
    texts += [cell for row in tables.overview([survey], ["m"]).rows for cell in row]
    assert not [text for text in texts if re.search(r"\bnan\b|None|\binf\b", text)]
    return drawn


GONE = {
    "landscape": ["landscape"],
    "attention_maps": ["attention"],
    "super_neurons": ["neurons"],
    "interventions": ["interventions"],
    # No section stands on these alone.
    "source model_type chunks chunk_length n_slots normed_sites perplexity massive_activations across audit": [],
}


@pytest.mark.parametrize("keys", GONE)
@pytest.mark.parametrize("how", ["missing", "null"])
def test_a_part_that_is_missing_or_null_leaves_its_section_out(keys, how):
    survey = make_survey()
    for key in keys.split():
        survey[key] = None
        if how == "missing":
            del survey[key]
    assert everything([survey]) == set(SECTIONS) - set(GONE[keys])


def test_those_are_all_parts_of_a_survey():
    assert {key for keys in GONE for key in keys.split()} == make_survey().keys() - {"layers"}


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
@pytest.mark.parametrize("half", [0, 1])
def test_figures_of_layers_may_be_missing(half, value):
    survey = make_survey()
    kinds = dict(survey["layers"][1])
    keys = sorted(kinds.keys() - {"layer"})[half::2]  # the other half is there: both halves of a figure
    for row in survey["layers"]:
        for key in keys:
            row[key] = None if isinstance(kinds[key], (list, dict)) else value
    everything([survey])
    survey = make_survey()
    for key in keys:
        survey["layers"][2].pop(key)
    assert everything([survey]) == set(SECTIONS)


def test_the_least_survey_and_odd_ones_make_a_page(tmp_path):
    page = write([{"layers": [{"layer": 0, "max": 3.0}]}], tmp_path)
    assert page.sections == ["summary", "magnitude", "layers", "words"]
    one_block = make_survey()
    one_block["layers"] = one_block["layers"][:2]
    assert "sinks" in everything([one_block])
    ragged = make_survey()
    ragged["layers"][3]["sink_score"] = [0.5]
    ragged["landscape"] = {"layer": 1, "tokens": ["a"], "dims": [0], "values": [[0.0]]}
    ragged["attention_maps"][0] |= {"tokens": ["a"], "weights": [[1.0]]}
    assert everything([ragged]) == set(SECTIONS)
    lost = make_survey()
    lost["interventions"][1] |= {"ppl": math.inf, "delta_nll": {"mean": math.inf, "low": None, "high": math.nan}}
    assert everything([lost, make_survey()]) == set(SECTIONS)
    assert tables.interventions(lost).rows[1][1:4] == ("collapse", "∞", "+∞")


def test_a_survey_from_json_makes_the_same_page(tmp_path):
    survey = copy.deepcopy(make_survey())
    survey["interventions"][1] |= {"ppl": math.inf, "delta_nll": {"mean": math.inf, "low": -math.inf, "high": math.nan}}
    survey["landscape"]["tokens"][0] = survey["layers"][3]["massive"][0]["token"] = "nan"
    read = json.loads(json_text(plain_json(survey)))
    pages = [write_report([found], tmp_path / "r.html").read_text(encoding="utf-8") for found in (survey, read)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("surveys", [[], [{}], [{"layers": []}], [{"layers": None}], ["x"], [{"layers": [{"max": 1}]}]])
def test_what_is_no_survey_is_refused_with_the_way_out(surveys, tmp_path):
    for verb, out in ((write_report, tmp_path / "r.html"), (write_plots, tmp_path / "plots")):
        with pytest.raises(SourceError, match="scan"):
            verb(surveys, out)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="directory"):
        write_report([make_survey()], tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        write_report([{"layers": [{"layer": 0}]}], tmp_path / "absent" / "r.html")
    with pytest.raises(OutputError, match="cannot hold plots"):
        write_plots([make_survey()], tmp_path / "file")


# --- the figures ------------------------------------------------------------------------------------------------------


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


def test_plots_are_written_as_png_and_svg_and_leave_no_trace_in_matplotlib(tmp_path):
    survey = make_survey()
    survey["layers"] = [{key: row.get(key) for key in ("layer", "max", "sink_score")} for row in survey["layers"]]
    survey["interventions"] = None
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


def test_the_template_is_part_of_the_package():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '[tool.setuptools.package-data]\n"surgery.report" = ["*.jinja"]\n' in project


# --- words ------------------------------------------------------------------------------------------------------------


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
    assert words.effect({"delta_nll": {"mean": mean, "low": low, "high": high}}) == said


def test_an_intervention_that_says_nothing_is_not_called_an_effect():
    rows = make_survey()["interventions"]
    assert [words.effect(row) for row in rows] == ["reference", "collapse, ×50", "less than 1%", "not possible"]
    rows[1]["delta_nll"]["low"] = -3.0
    assert words.effect(rows[1]) == "too few chunks to tell"
    survey = make_survey()
    survey["interventions"].append({**survey["interventions"][2], "where": "every layer"})
    said = "Perplexity changes by less than 1% under: to their mean (layer 2; every layer)."
    assert said in words.summary(survey, "m") and "untouched" not in " ".join(words.summary(survey, "m"))
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
    assert said in words.summary(survey, "m")


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
    assert words.names_of(surveys) == ["a/m", "b/m", "c/n (3)", "c/n (4)", "survey 5"]


def test_massive_table_groups_by_dimension_and_token():
    survey = make_survey()
    survey["layers"][3]["massive"].append({"dim": 9, "position": 4, "token": "\n", "value": 7000.0})
    assert tables.massive(survey).rows == [("9", "⏎", "3", "4", "7,000"), ("7", "The", "2–3", "0", "−5,000")]
    for dim in range(20):
        survey["layers"][2]["massive"].append({"dim": 100 + dim, "position": 1, "token": "x", "value": 10.0})
    table = tables.massive(survey)
    assert len(table.rows) == tables.MOST and table.note.startswith("10 smaller")
    assert tables.massive(copy.deepcopy(make_survey(spike=2.0))) is None
