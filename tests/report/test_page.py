"""The report: what is in it, that it fetches nothing, that no text can become markup, that gaps leave no hole."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import pytest
from helpers.page import Page
from helpers.surveys import make_provenance, make_survey

from surgery import words
from surgery.checkpoint.results import json_text
from surgery.errors import OutputError, SourceError
from surgery.report import html, maps, plots, summary, tables, write_plots, write_report
from surgery.report.style import DARK, LIGHT, drawing, inline_svg
from surgery.verification.verdict import plain_json

SECTIONS = [section.key for section in html.SECTIONS] + ["attention", "massive", "neurons", "layers"]


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
    assert alone.sections == ["samples", "summary", *SECTIONS, "provenance", "words"]
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
        "tiny: type llama, 4 blocks, 135 million parameters. Its perplexity on 8 chunks of 64 tokens is 20.00.",
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
    assert together.source.count("<h3>a/tiny</h3>") == together.source.count("<h3>b/tiny</h3>") == 2 + len(SECTIONS)
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


def test_the_page_says_when_on_what_and_with_what(alone):
    assert "2023-11-14 · wiki.txt · 8 chunks of 64 tokens · surgery 0.1.0" in alone.text
    made = alone.text.partition("Provenance")[2]
    for told in ("2023-11-14 22:13:20 UTC", f"wiki.txt, 1.2 kB, SHA-256 {'ab' * 32}", f"a.bin SHA-256 {'cd' * 32}",
                 "evaluation: 8 chunks of 64 tokens", "in float32 on cpu", "surgery scan tiny",
                 "python 3.11.7"):  # fmt: skip
        assert told in made


def test_size_speed_and_samples_stand_side_by_side(together):
    for told in ("parameters 135 million 135 million", "weights on disk 538.0 MB 538.0 MB",
                 "tokens read in a second 1,280 1,280", "it is no benchmark"):  # fmt: skip
        assert told in together.text
    assert "chosen in a/tiny, and the same ones are shown of each model" in together.text
    assert together.source.count('<p class="sample"><span class="what">The cat</span> sat\non it.</p>') == 2


def test_rising_sink_rates_are_explained_where_they_rise():
    before, after = make_survey("x"), make_survey("y", slots=2, spike=40.0)
    assert summary.early_sinks(before, after) is None  # they fall
    after["layers"][1]["sink_rate"], after["layers"][3]["sink_rate"] = 1 / 3, 0.7
    said = summary.early_sinks(before, after)
    assert said in tables.changes([before, after], ["x", "y"])
    assert said.startswith("Why sink rates rise in layer 1 (most in layer 1: 0% → 33.3%): slots are keys of the prefix")
    assert summary.early_sinks(after, after) is None and summary.early_sinks(before, before) is None


@pytest.mark.slow
def test_beside_a_verdict_there_is_one_set_of_figures(tmp_path):
    """The verdict is of 64 chunks, the surveys are of 8: perplexity and counts are the verdict's, and why is said."""
    surveys = [make_survey("m, original"), make_survey("m, converted", slots=2, spike=40.0)]
    act = make_provenance() | {"recipe": {"surgery": 1}}
    act["chunks"] = {"evaluation": {"count": 64, "length": 64}, "calibration": None}
    scores = {
        "bare": {"ppl": 19.5, "nll": 2.97, "tokens": 4032},
        "converted": {"ppl": 19.4, "nll": 2.96, "tokens": 4032},
    }
    verdict = {"passed": True, "gates": [], "perplexity": scores, "delta_nll": {}, "provenance": act}
    text = Page(write_report(surveys, tmp_path / "r.html", verdict).read_text(encoding="utf-8")).text
    assert "measured on all 64 chunks of the text. All that follows is a survey of the first 8" in text
    assert "19.4000" in text and "20.00" not in text and "4 activations are massive" not in text
    assert '{"surgery": 1}' in text and "tiny: original and converted" in text and "64 chunks of 64 tokens" in text
    assert "is of the same" in html._few(surveys[0], {"provenance": make_provenance()})


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
    survey["sample"] = {"prompt": HOSTILE[0], "written": "\n".join(HOSTILE[1:])}
    survey["provenance"] |= {"command": HOSTILE, "device": "<b>", "date": "<i>", "versions": {"<b>": "\x1b"}}
    survey["provenance"]["texts"]["evaluation"][0]["name"] = HOSTILE[1]
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
        plots.compare([survey, *surveys], summary.names_of([survey, *surveys]))
    drawn |= {key for key, _, table in tables.SECTIONS if table(survey) is not None}
    tables.interventions(survey)
    texts = [*summary.summary(survey, "m"), *(cell for tile in tables.tiles(survey) for cell in tile)]
    texts += [cell for row in tables.overview([survey], ["m"]).rows for cell in row]
    assert not [text for text in texts if re.search(r"\bnan\b|None|\binf\b", text)]
    return drawn


GONE = {
    "landscape": ["landscape"],
    "attention_maps": ["attention"],
    "super_neurons": ["neurons"],
    "interventions": ["interventions"],
    "norm_maps": ["norm_maps"],
    # No section stands on these alone.
    "source model_type chunks chunk_length n_slots normed_sites perplexity massive_activations across audit": [],
    "parameters files speed sample provenance": [],
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


@pytest.mark.slow
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
