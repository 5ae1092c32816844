"""The report's tables, as text cells that a template only has to place."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..checkpoint.disk import human
from ..table import Table
from ..words import (
    NONE,
    called,
    encoded,
    finite,
    interval,
    listing,
    number,
    percent,
    rounded,
    score,
    visible,
    visible_name,
    whole_of,
)
from .summary import best, early_sinks, effect, intervention_name, place, untouched

MOST = 12  # rows of a table of things that were found, the largest first


def overview(surveys: Sequence[dict], names: Sequence[str], told: bool = False) -> Table:
    """One column per survey, one row per figure; rows that no survey has are left out.

    `told`: perplexity and massive activations have been told of more text, and stand there alone.
    """
    counted = [
        ("perplexity", [score(_get(s, "perplexity", "ppl")) for s in surveys]),
        ("massive activations", [number(_get(s, "massive_activations", "count")) for s in surveys]),
        ("worst of them / median", [number(_worst(s)) for s in surveys]),
    ]
    lines = [
        ("parameters", [_parameters(s) for s in surveys]),
        ("weights on disk", [_files(s) for s in surveys]),
        ("tokens read in a second", [_speed(s) for s in surveys]),
        *([] if told else counted),
        ("massive activations in dimensions" if told else "in dimensions", [_dims(s) for s in surveys]),
        ("born in layer", [number(place(s, "born")) for s in surveys]),
        ("gone from layer", [number(place(s, "died")) for s in surveys]),
        ("highest sink rate", [_extreme(s, "sink_rate", max, percent) for s in surveys]),
        ("lowest entropy, bits", [_extreme(s, "entropy_bits", min, number) for s in surveys]),
        ("highest p1", [_extreme(s, "p1", max, percent) for s in surveys]),
        ("scalars to a tenfold perplexity", [number(_get(s, "audit", "scalars")) for s in surveys]),
        ("highest dominance of the first token", [_extreme(s, "dominance", max, number) for s in surveys]),
        ("variance of a head, first token", [number(head_variance(s, "first")) for s in surveys]),
        ("variance of a head, later tokens", [number(head_variance(s, "rest")) for s in surveys]),
        ("of a state's output due to its lead, near", [_extreme(s, "lead_near", max, percent) for s in surveys]),
        ("and at the end of a text", [_extreme(s, "lead_far", max, percent) for s in surveys]),
        ("bias slots per site", [number(s.get("n_slots")) for s in surveys]),
        ("sites with a head norm", [number(s.get("normed_sites")) for s in surveys]),
    ]
    kept = [(name, *cells) for name, cells in lines if any(cell != NONE for cell in cells)]
    note = ""
    if any(_speed(survey) != NONE for survey in surveys):
        note = "Speed is of one sequence in one pass, as this machine was just then; it is no benchmark."
    return Table("At a glance", ("", *names), kept, note)


def _parameters(survey: dict) -> str:
    count = _get(survey, "parameters")
    return NONE if count is None else rounded(count)


def _files(survey: dict) -> str:
    size, kind = _get(survey, "files", "bytes"), (survey.get("files") or {}).get("kind")
    return NONE if size is None else f"{human(int(size))}{' (quantised GGUF)' if kind == 'gguf' else ''}"


def _speed(survey: dict) -> str:
    tokens, seconds = _get(survey, "speed", "tokens"), _get(survey, "speed", "seconds")
    return number(tokens / seconds, 3) if tokens and seconds else NONE


def head_variance(survey: dict, of: str) -> float | None:
    """The median, over all heads of all layers, of the variance of a head's output; `of` is "first" or "rest"."""
    rows = [row.get(f"value_variance_{of}") or [] for row in survey["layers"]]
    heads = [value for row in rows for value in row if finite(value)]
    return statistics.median(heads) if heads else None


def tiles(survey: dict) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of one survey's main figures; what it lacks is left out."""
    found = survey.get("massive_activations") or {}
    sinks, narrow = best(survey, "sink_rate"), best(survey, "entropy_bits", min)
    worst = f"worst {number(_worst(survey))} × median" if found.get("count") else "none found"
    born, died = place(survey, "born"), place(survey, "died")
    until = f"gone from layer {died} on" if died is not None else "last to the end"
    candidates = [
        ("perplexity", score(_get(survey, "perplexity", "ppl")), _read(survey)),
        ("massive activations", number(_get(survey, "massive_activations", "count")), worst),
        ("born in layer", number(born), until),
        ("highest sink rate", percent(_value(sinks)), f"in layer {sinks[0]}" if sinks else ""),
        ("lowest entropy", number(_value(narrow), 3), f"bits, in layer {narrow[0]}" if narrow else ""),
    ]
    return [tile for tile in candidates if tile[1] != "–"]


def _read(survey: dict) -> str:
    tokens = _get(survey, "perplexity", "tokens")
    return f"of {tokens:,} tokens" if tokens is not None else ""


def changes(surveys: Sequence[dict], names: Sequence[str], told: bool = False) -> list[str]:
    """What differs between the first survey and each of the others, in words; `told` as in `overview`."""
    first = surveys[0]
    found = []
    for survey, name in zip(surveys[1:], names[1:], strict=True):
        pairs: list[tuple[Any, ...]] = [
            ("massive activations", *(_get(s, "massive_activations", "count") for s in (first, survey)), number),
            ("perplexity", *(_get(s, "perplexity", "ppl") for s in (first, survey)), score),
            ("highest sink rate", *(_value(best(s, "sink_rate")) for s in (first, survey)), percent),
            ("lowest entropy", *(_value(best(s, "entropy_bits", min)) for s in (first, survey)), number),
            ("highest dominance", *(_value(best(s, "dominance")) for s in (first, survey)), number),
            ("variance of a head at the first token", *(head_variance(s, "first") for s in (first, survey)), number),
            ("at later ones", *(head_variance(s, "rest") for s in (first, survey)), number),
        ]
        pairs = [pair for pair in pairs if not (told and pair[0] in ("massive activations", "perplexity"))]
        parts = [
            f"{what} {show(before)} → {show(after)}{' bits' if what == 'lowest entropy' else ''}"
            for what, before, after, show in pairs
            if before is not None and after is not None
        ]
        if parts:
            text = f"From {names[0]} to {name}: {', '.join(parts)}."
            tokens = [_get(s, "perplexity", "tokens") for s in (first, survey)]
            if not told and None not in tokens and tokens[0] != tokens[1]:
                text += f" The perplexities are of different text ({tokens[0]:,} and {tokens[1]:,} tokens)."
            found.append(text)
        if (why := early_sinks(first, survey)) is not None:
            found.append(why)
    return found


def fidelity(survey: dict) -> Table | None:
    """What interventions leave of an encoder's features."""
    rows, read = [], called(survey)
    for row in survey.get("interventions") or []:
        found = row.get("fidelity") or {}
        cells = [_cosine(found.get("last") or found.get("cls")), _cosine(found.get(read.parts))]
        rows.append((intervention_name(row), number(row.get("touched")), *cells))
    head = ("intervention", "touched", whole_of(survey.get("interventions") or []), read.parts)
    note = f"Cosine of features with those of the untouched encoder, mean over {read.many} and its 95% interval."
    return Table("Interventions", head, rows, note) if rows else None


def _cosine(found: dict | None) -> str:
    return (
        NONE if not found else f"{number(found['mean'], 4)} ({number(found['low'], 4)} to {number(found['high'], 4)})"
    )


def interventions(survey: dict) -> Table | None:
    if encoded(survey):
        return fidelity(survey)
    rows = []
    for row in survey.get("interventions") or []:
        delta = row.get("delta_nll") or {}
        rows.append(
            (
                intervention_name(row), effect(row), score(row.get("ppl")), "–" if untouched(row) else interval(delta),
                percent(row.get("sink_rate")), number(row.get("entropy_bits"), 3), number(row.get("massive")),
                number(row.get("touched")),
            )
        )  # fmt: skip
    head = ("intervention", "effect", "perplexity", "ΔNLL (95%)", "sinks", "entropy", "massive", "touched")
    note = " ".join(_aside(row) for row in survey.get("interventions") or [] if row.get("planted") or row.get("error"))
    note = f"Sinks and entropy are means over layers. {note}".strip()
    return Table("Interventions", head, rows, note) if rows else None


def _aside(row: dict) -> str:
    """What an intervention has to say beside its figures: why it was not possible, or where a sink came up."""
    if row.get("error"):
        return f"“{intervention_name(row)}” is not possible: {visible_name(str(row['error'])).rstrip('.')}."
    sink = row["planted"]
    return (
        f"Sink rate of position {sink['position']} under “{intervention_name(row)}”: "
        f"{percent(sink.get('untouched'))} → {percent(sink.get('sink_rate'))}."
    )


def massive(survey: dict) -> Table | None:
    """The massive activations that were listed, by dimension and token, the largest first."""
    groups: dict[tuple[int, str], list[tuple[int, int, float]]] = {}
    for row in survey["layers"]:
        for found in row.get("massive") or []:
            entry = (row["layer"], found["position"], found["value"])
            groups.setdefault((found["dim"], str(found["token"])), []).append(entry)
    ordered = sorted(groups.items(), key=lambda group: -max(abs(value) for _, _, value in group[1]))
    rows = []
    for (dim, token), found in ordered[:MOST]:
        layers, positions = {layer for layer, _, _ in found}, {position for _, position, _ in found}
        largest = max((value for _, _, value in found), key=abs)
        rows.append((f"{dim}", visible(token), _span(layers), listing(sorted(positions), 3), number(largest)))
    note = f"{len(ordered) - MOST:,} smaller pairs of dimension and token are not shown." if len(ordered) > MOST else ""
    head = ("dimension", "token", "layers", "positions", "largest")
    text = "Where they stand. A dimension and a token are listed with the layers in which they meet."
    return Table("Massive activations", head, rows, note, text) if rows else None


def super_neurons(survey: dict) -> Table | None:
    found = survey.get("super_neurons") or []  # those of the most massive activations first
    rows = [
        (
            f"{unit['layer']} / {unit['unit']}", number(unit.get("dim")), percent(unit.get("share")),
            number(unit.get("activation")), number(unit.get("column_norm")), number(unit.get("sparsity"), 3),
        )
        for unit in found[:MOST]
    ]  # fmt: skip
    note = f"{len(found) - MOST:,} more are not shown." if len(found) > MOST else ""
    head = ("layer / unit", "dimension", "share", "activation", "column norm", "sparsity")
    text = (
        "Units of an MLP whose activation times the norm of their output column dominates what is written to a massive "
        "activation. Share is the unit's part of what the MLP writes there."
    )
    return Table("Super neurons", head, rows, note, text) if rows else None


def layers(survey: dict) -> Table:
    rows = [
        (
            f"{row['layer']}", number(row.get("ratio"), 3), number(row.get("first_norm"), 3),
            number(row.get("entropy_bits"), 3), percent(row.get("sink_rate")), number(row.get("count")),
        )
        for row in survey["layers"]
    ]  # fmt: skip
    head = ("layer", "max / median", "first norm", "entropy", "sink rate", "massive")
    text = (
        "Means over sequences (of p1 and entropy: over those whose spectrum was taken); – where nothing was measured."
    )
    return Table("All layers in figures", head, rows, text=text)


# key, how it is shown (a card like a figure's, a wide one, folded), table
SECTIONS = (("massive", "figure", massive), ("neurons", "table", super_neurons), ("layers", "folded", layers))


def _dims(survey: dict) -> str:
    dims = (survey.get("massive_activations") or {}).get("dims")
    return listing(dims, 4) if dims else "–"


def _worst(survey: dict) -> float | None:
    found = survey.get("massive_activations") or {}
    return found.get("worst_ratio") if found.get("count") else None


def _extreme(survey: dict, key: str, choose, show) -> str:
    found = best(survey, key, choose)
    return f"{show(found[1])} (layer {found[0]})" if found else "–"


def _get(survey: dict, *keys: str) -> float | None:
    found: Any = survey
    for key in keys:
        found = (found or {}).get(key)
    return found if finite(found) else None


def _value(found: tuple[int, float] | None) -> float | None:
    return found[1] if found else None


def _span(layers: set[int]) -> str:
    """3–27, or 3, 7 and 9 where there are gaps."""
    low, high = min(layers), max(layers)
    if low == high:
        return f"{low}"
    return f"{low}–{high}" if len(layers) == high - low + 1 else listing(sorted(layers), 4)
