"""`write_report`: surveys as one self-contained HTML file; `write_plots`: its figures as PNG and SVG files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from ..checkpoint.results import write_result
from ..errors import OutputError, SourceError
from ..table import Table
from ..words import count_of, visible_name
from . import maps, plots, provenance, tables, tokens
from .beside import beside
from .style import DARK, LIGHT, drawing, inline_svg, write_figure
from .summary import names_of, samples, summary

Plot = Callable[[dict, Sequence[dict]], Figure | None]


@dataclass(frozen=True)
class Section:
    """One figure of each survey under a heading; `key` also names its files."""

    key: str
    title: str
    text: str
    plot: Plot


SECTIONS = (
    Section(
        "landscape", "Activation landscape",
        "|activation| of the first tokens, in the layer where it peaks. Colour is logarithmic; the bars "
        "show the same on a linear scale. Some dimensions are left out, the loudest never.",
        maps.landscape,
    ),
    Section(
        "norm_maps", "Norms over the image",
        "How long each patch is, where it lies in the image: light is 0, dark the longest of the layer. Patches "
        "that stand out may hold what concerns the whole image, and not what can be seen there.",
        tokens.norm_maps,
    ),
    Section(
        "kinds", "CLS, registers, patches, frames or tokens",
        "What the tokens of an image, a recording or a text are in each layer, and where most of them look. A high "
        "norm is three times that of the median one of the same.",
        tokens.kinds,
    ),
    Section(
        "depth", "Norm, entropy and sinks by depth",
        "One depth axis: how large the first token grows, how few directions the residual stream then needs, and how "
        "many heads attend to a sink. The phases are shaded where the survey claims any.",
        plots.depth,
    ),
    Section(
        "magnitude", "Largest and median activation",
        "An activation is massive where it is above the dashed line: at least 100, and 1,000 times the median.",
        plots.magnitude,
    ),
    Section(
        "sinks", "Sinks by head",
        "Average attention of each head. From 0.3 on, a head counts as a sink.",
        maps.sink_map,
    ),
    Section(
        "spread", "How widely heads attend",
        "Effective tokens are the exponential of the entropy of a head's attention. Where heads sink, they read few.",
        plots.attention_spread,
    ),
    Section(
        "selection", "What heads select",
        "Of a row of attention, the fewest places that hold 90% of its weight count as selected.",
        plots.selection,
    ),
    Section(
        "states", "What a state remembers",
        "Layers that hand a state from token to token (state space, linear attention, convolution): how much of what "
        "they give would be another without what leads the text. That is the prefix, or without one the first token. "
        "Attention can look back at it from anywhere; a state forgets.",
        plots.states,
    ),
    Section(
        "spectrum", "Energy of the stream",
        "Share of the stream's energy in its strongest direction, with the lower bound that the first token's norm "
        "alone sets, and how far the first token's largest entry towers over its mean.",
        plots.spectrum,
    ),
    Section(
        "lens", "Perplexity by depth",
        "What each layer would predict, read through the final norm and the output layer (logit lens); "
        "only up to 10⁹ is shown.",
        plots.lens,
    ),
    Section(
        "length", "Selected places by length",
        "Whether heads select more where there is more to select from: sampled rows, mean over heads.",
        plots.selected_by_length,
    ),
    Section(
        "interventions", "Interventions",
        "What happens to likelihood (bars are paired 95% intervals; grey ones contain zero), or to an encoder's "
        "features, when the live model is changed.",
        plots.interventions,
    ),
)  # fmt: skip


@dataclass
class Card:
    """What the page shows of one survey in one section; without figures and table, that it was not measured."""

    name: str
    figures: list[tuple[str, Markup]] = field(default_factory=list)  # title, svg
    table: Table | None = None


def write_report(
    surveys: Sequence[Mapping[str, Any]], out: Path | str, verdict: Mapping[str, Any] | None = None
) -> Path:  # fmt: skip
    """Write `surveys` (of `scan`, or read from its JSON) side by side to `out`, one HTML file that fetches nothing.

    `verdict`: of the run that they are from (or from its JSON), for what was gained or lost. Parts that neither has are
    left out. Raises SourceError for what is no survey, OutputError where `out` cannot be written.
    """
    out = Path(out)
    surveys = _checked(surveys)
    if out.is_dir():
        raise OutputError(f"{out} is a directory; give a file for the report.")
    names, told = names_of(surveys), bool(verdict and verdict.get("perplexity"))
    made = [survey.get("provenance") for survey in surveys] if verdict is None else [verdict.get("provenance")]
    with drawing():
        page = _template().render(
            names=names,
            title=_title(names, verdict),
            lead=provenance.line(next((one for one in made if one), None)),
            several=len(surveys) > 1,
            summaries=[summary(survey, name, told) for survey, name in zip(surveys, names, strict=True)],
            changes=tables.changes(surveys, names, told),
            few=_few(surveys[0], verdict) if told else None,
            tiles=tables.tiles(surveys[0]),
            overview=tables.overview(surveys, names, told),
            comparison=_comparison(surveys, names),
            gained=None if verdict is None else _gained(verdict),
            samples=samples(surveys, names),
            made=[table for table in map(provenance.table, made) if table],
            sections=list(_sections(surveys, names)),
            light=LIGHT,
            dark=DARK,
        )
    # A source's path may hold bytes that are no UTF-8; they must not keep the report from being written.
    write_result(out, "the report", page.encode("utf-8", "backslashreplace").decode())
    return out


def _title(names: Sequence[str], verdict: Mapping[str, Any] | None) -> str:
    source = (((verdict or {}).get("provenance") or {}).get("source") or {}).get("spec")
    return " · ".join(names) if source is None else f"{visible_name(str(source))}: original and converted"


def _few(survey: Mapping[str, Any], verdict: Mapping[str, Any] | None) -> str | None:
    """Why figures of the survey are of less text than those of the verdict, where they are."""
    read = ((((verdict or {}).get("provenance") or {}).get("chunks") or {}).get("evaluation") or {}).get("count")
    if not read or not survey.get("chunks"):
        return None
    if survey["chunks"] >= read:
        return f"All of this page is of the same {count_of(read, 'chunk')} of text."
    return (
        f"What was gained or lost is measured on all {read} chunks of the text. All that follows is a survey of the "
        f"first {survey['chunks']}: it looks into every layer, which is slow, and few chunks show what stands where."
    )


def write_plots(surveys: Sequence[Mapping[str, Any]], folder: Path | str) -> list[Path]:
    """Write every figure of the report into `folder` as PNG (300 dpi) and SVG on white; return the files.

    Of several surveys, file names begin with the survey's number. Raises SourceError and OutputError as above.
    """
    folder = Path(folder)
    surveys = _checked(surveys)
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with drawing():
            for stem, drawn in _figures(surveys):
                files += write_figure(drawn, folder / stem)
    except OSError as error:
        raise OutputError(f"{folder} cannot hold plots ({error.strerror}); give another folder.") from error
    return files


def _checked(surveys: Sequence[Mapping[str, Any]]) -> list[dict]:
    if not surveys:
        raise SourceError("a report needs at least one survey; scan a checkpoint first.")
    for at, survey in enumerate(surveys, 1):
        layers = survey.get("layers") if isinstance(survey, dict) else None
        if not isinstance(layers, list) or not layers or not all("layer" in row for row in layers):
            raise SourceError(f"survey {at} of {len(surveys)} has no layers; give what `surgery scan --json` wrote.")
    return [_numbers(survey) for survey in surveys]


def _numbers(value, key: str = ""):
    """`value` with numbers where JSON, which has no NaN or infinity, has them as text; a token may be such a word."""
    if isinstance(value, dict):
        return {name: _numbers(item, name) for name, item in value.items()}
    if isinstance(value, list) and key != "tokens":
        return [_numbers(item) for item in value]
    return float(value) if key != "token" and value in ("nan", "inf", "-inf") else value


def _figures(surveys: Sequence[dict]) -> Iterator[tuple[str, Figure]]:
    """(file name without ending, figure) of everything that the report draws."""
    if (together := plots.compare(surveys, names_of(surveys))) is not None:
        yield "compare", together
    for at, (survey, name) in enumerate(zip(surveys, names_of(surveys), strict=True), 1):
        start = f"{at}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[-60:].strip('.-')}-" if len(surveys) > 1 else ""
        for section in SECTIONS:
            if (drawn := section.plot(survey, surveys)) is not None:
                yield f"{start}{section.key}", drawn
        for stem, _, drawn in maps.attention_maps(survey):
            yield f"{start}{stem}", drawn


def _gained(verdict: Mapping[str, Any]) -> dict:
    """Sentences on a verdict, and its tables by key with their figures (or None), those with a figure apart."""
    from . import verdict as told  # its gates import torch, which surveys alone do not need

    verdict = _numbers({key: value for key, value in verdict.items() if key != "surveys"})
    found: dict[str, list] = {"said": told.sentences(verdict), "tables": [], "figures": []}
    for key, table in told.tables(verdict).items():
        drawn = beside(table.figure)
        svg = None if drawn is None else Markup(inline_svg(drawn, f"gain-{key}", table.title))
        found["figures" if svg else "tables"].append({"key": key, "table": table, "figure": svg})
    return found


def _comparison(surveys: Sequence[dict], names: Sequence[str]) -> Markup | None:
    drawn = plots.compare(surveys, names)
    return None if drawn is None else Markup(inline_svg(drawn, "compare", "All models by depth"))


def _sections(surveys: Sequence[dict], names: Sequence[str]) -> Iterator[dict]:
    """Sections that some survey has something for: `key`, `title`, `text`, `cards` (one per survey), `kind`."""
    for section in SECTIONS:
        cards = [Card(name) for name in names]
        for at, (card, survey) in enumerate(zip(cards, surveys, strict=True)):
            if (drawn := section.plot(survey, surveys)) is not None:
                svg = inline_svg(drawn, f"{section.key}{at}", f"{section.title}: {card.name}")
                card.figures.append(("", Markup(svg)))
            if section.key == "interventions":
                card.table = tables.interventions(survey)
        kind = "table" if _tabled(cards) else "wide" if section.key == "norm_maps" else "figure"
        yield from _shown(section.key, section.title, section.text, cards, kind)
    cards = [Card(name) for name in names]
    for at, (card, survey) in enumerate(zip(cards, surveys, strict=True)):
        for stem, title, drawn in maps.attention_maps(survey):
            svg = inline_svg(drawn, f"{stem}-{at}", f"{title}: {card.name}")
            card.figures.append((title, Markup(svg)))
    text = "Who reads whom, for heads from the strongest sink to the weakest: a row is a query, a column a key."
    if len(surveys) > 1 and len({tuple(title for title, _ in card.figures) for card in cards}) == 1:
        text += f" The heads are chosen in {names[0]}, and the same ones are shown of each model."
    yield from _shown("attention", "Attention maps", text, cards, "many")
    for key, kind, table in tables.SECTIONS:
        cards = [Card(name, table=table(survey)) for name, survey in zip(names, surveys, strict=True)]
        if found := next((card.table for card in cards if card.table), None):
            yield from _shown(key, found.title, found.text, cards, kind)


def _shown(key: str, title: str, text: str, cards: list[Card], kind: str) -> Iterator[dict]:
    if any(card.figures or card.table for card in cards):
        yield {"key": key, "title": title, "text": text, "cards": cards, "kind": kind}


def _tabled(cards: Sequence[Card]) -> bool:
    return any(card.table for card in cards)


def _template():
    source = resources.files(__package__).joinpath("template.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)
