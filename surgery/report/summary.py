"""A survey in words: one-phrase names, and the sentences of the summary.

Every sentence states what the survey holds and nothing else; where a key is missing or null its sentence is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from ..words import (
    LITTLE_CHANGE,
    UNKNOWN,
    called,
    change,
    count_of,
    encoded,
    finite,
    listing,
    number,
    percent,
    quoted,
    ranges,
    rounded,
    score,
    tokens_of,
    visible_name,
    visible_text,
)

GROWN = 0.1  # of a layer's sink rate, from which on it is explained
PHASES = ("mix", "compress", "refine")


def names_of(surveys: Sequence[dict]) -> list[str]:
    """A short name for each survey: the last part of its source, the whole source where that is not unique."""
    sources = [str(survey.get("source") or f"survey {at}") for at, survey in enumerate(surveys, 1)]
    short = [PurePath(source).name or source for source in sources]
    names = [short[i] if short.count(short[i]) == 1 else sources[i] for i in range(len(short))]
    return [visible_name(name if names.count(name) == 1 else f"{name} ({at})") for at, name in enumerate(names, 1)]


def place(survey: dict, key: str) -> int | None:
    """`across.born` or `across.died`: a layer, the first one where there are several."""
    found = (survey.get("across") or {}).get(key)
    return (found[0] if found else None) if isinstance(found, list) else found


def phase_range(survey: dict, phase: str) -> str | None:
    """`3–27`, `3`, or None where no such phase is claimed."""
    span = ((survey.get("across") or {}).get("phases") or {}).get(phase)
    if not span or span[0] is None or span[1] is None or span[1] < span[0]:
        return None
    return f"{span[0]}" if span[0] == span[1] else f"{span[0]}–{span[1]}"


def intervention_name(row: dict) -> str:
    """What was done and where, as one phrase."""
    name = visible_name(str(row.get("name") or "unnamed")).replace("_", " ")
    return f"{name}, {visible_name(str(row['where']))}" if row.get("where") not in (None, "") else name


def untouched(row: dict) -> bool:
    """Whether the row is the model as it is, which the others are compared with."""
    return row.get("touched") == 0


def effect(row: dict) -> str:
    """What an intervention did to perplexity (see `words.change`)."""
    if row.get("error"):
        return "not possible"
    return "reference" if untouched(row) else change(row.get("delta_nll"))


def best(survey: dict, key: str, choose=max) -> tuple[int, float] | None:
    """The layer where `key` is largest (or, with `min`, smallest), and its value."""
    found = [(row[key], row["layer"]) for row in survey["layers"] if finite(row.get(key))]
    if not found:
        return None
    extreme = choose(value for value, _ in found)
    return next(layer for value, layer in found if value == extreme), extreme


def summary(survey: dict, name: str, told: bool = False) -> list[str]:
    """The survey of one model in plain words, a sentence or two on each of its findings.

    `told`: perplexity and massive activations have been told of more text, so here only where these are.
    """
    parts = (
        _model(survey, name, told), _massive(survey, told), _auto(survey), _sinks(survey), _geometry(survey),
        _phases(survey), _correlations(survey),
    )  # fmt: skip
    return [part for part in (*parts, *_interventions(survey), _audit(survey)) if part]


def _model(survey: dict, name: str, told: bool) -> str:
    rows = survey["layers"][1:]
    blocks, attending = count_of(len(rows), "block"), sum(bool(row.get("sink_score")) for row in rows)
    if 0 < attending < len(rows):
        blocks += f" ({attending} with attention)"
    kind = f"type {survey['model_type']}, {blocks}" if survey.get("model_type") else blocks
    if finite(survey.get("parameters")):
        kind += f", {rounded(survey['parameters'])} parameters"
    slots, normed = survey.get("n_slots"), survey.get("normed_sites")
    also = f", {count_of(slots, 'explicit bias slot')} at each attention site" if slots else ""
    text = f"{name}: {kind}{also}" + (f", heads normed at {count_of(normed, 'site')}." if normed else ".")
    if read := encoded(survey):
        given = count_of(survey.get("chunks") or 0, called(survey).one)
        text += (
            f" It was {'shown' if survey.get('images') else 'given'} {given}, each of which becomes {tokens_of(read)}."
        )
    ppl = (survey.get("perplexity") or {}).get("ppl")
    if survey.get("chunks") and ppl is not None and not told:
        of = f" of {survey['chunk_length']:,} tokens" if survey.get("chunk_length") else ""
        text += f" Its perplexity on {count_of(survey['chunks'], 'chunk')}{of} is {score(ppl)}."
    return text


def _massive(survey: dict, told: bool) -> str | None:
    found = survey.get("massive_activations")
    if not found:
        return None
    if not found.get("count"):
        loudest = best(survey, "ratio")
        also = f" The largest is {number(loudest[1])} times its layer's median." if loudest else ""
        return "No activation is massive (|x| at least 100 and at least 1,000 times the layer's median)." + also
    text = f"{count_of(found['count'], 'activation is' if found['count'] == 1 else 'activation')}"
    text = f"{text}{'' if found['count'] == 1 else ' are'} massive; the worst is {number(found.get('worst_ratio'))} "
    text = "Some activations are massive." if told else f"{text}times the median of its layer."
    if found.get("dims"):
        dims = "dimension" if len(found["dims"]) == 1 else "dimensions"
        text += f" They stand in feature {dims} {listing(found['dims'])}"
        tokens = (survey.get("across") or {}).get("tokens")
        text += f", on the tokens {quoted(tokens)}." if tokens else "."
    born, died = place(survey, "born"), place(survey, "died")
    if born is not None:
        text += f" They are born in layer {born}"
        text += f" and gone from layer {died} on." if died is not None else " and last to the end."
    return text


def _auto(survey: dict) -> str | None:
    spans = ((survey.get("across") or {}).get("auto") or {}).get("spans")
    if not spans:
        return None
    named = [f"{first}" if first == last else f"{first}–{last}" for first, last in spans]
    layers = "layer" if len(spans) == 1 and spans[0][0] == spans[0][1] else "layers"
    return f"By the scale-free criterion (ten times what an ordinary token's largest entry is), {layers} " + (
        f"{listing(named)} {'has' if layers == 'layer' else 'have'} them."
    )


def _sinks(survey: dict) -> str | None:
    rate = best(survey, "sink_rate")
    if rate is None:
        return None
    first = "CLS" if encoded(survey) and not survey.get("text") else "the first token"
    to = f"{first} or a slot" if survey.get("n_slots") else first
    if rate[1] == 0:
        return f"No head is an attention sink: none gives {to} 30% of its attention on average."
    return (
        f"In layer {rate[0]}, {percent(rate[1])} of the heads are attention sinks: "
        f"on average they give {to} at least 30% of their attention."
    )


def samples(surveys: Sequence[dict], names: Sequence[str]) -> list[tuple[str, str, str]]:
    """(name, beginning of the text, how the model goes on) of each survey that has a sample."""
    found = zip(names, (survey.get("sample") for survey in surveys), strict=True)
    return [(name, visible_text(sample["prompt"]), visible_text(sample["written"])) for name, sample in found if sample]


def early_sinks(before: dict, after: dict) -> str | None:
    """Why more heads of some layers have a sink than before, where slots were added and it is so."""
    if not after.get("n_slots") or before.get("n_slots"):
        return None
    rates = [{row["layer"]: row.get("sink_rate") for row in survey["layers"]} for survey in (before, after)]
    grown = {
        layer: (rates[0][layer], rate)
        for layer, rate in rates[1].items()
        if finite(rate) and finite(rates[0].get(layer)) and rate - rates[0][layer] >= GROWN
    }
    if not grown:
        return None
    most = max(grown, key=lambda layer: grown[layer][1] - grown[layer][0])
    was, now = grown[most]
    text = (
        f"Why sink rates rise in {'layers' if len(grown) > 1 else 'layer'} {ranges([*grown])} (most in layer {most}: "
    )
    text += f"{percent(was)} → {percent(now)}): "
    return text + (
        "slots are keys of the prefix from the first layer on, and heads that find nothing else to read rest on them, "
        "as the original's heads do when it reads that prefix. A head is counted by the largest of its scores: of the "
        "first token and of each slot."
    )


def _geometry(survey: dict) -> str | None:
    lowest = best(survey, "entropy_bits", min)
    if lowest is None:
        return None
    layer, bits = lowest
    text = f"The residual stream is narrowest in layer {layer}: its spectrum has an entropy of {number(bits, 3)} bits"
    share = next((row.get("p1") for row in survey["layers"] if row["layer"] == layer), None)
    if finite(share):
        text += f", with {percent(share)} of the energy in one direction"
    looked, of = max((row.get("spectra") or 0 for row in survey["layers"]), default=0), survey.get("chunks") or 0
    read = called(survey).many if encoded(survey) else "sequences"
    return f"{text} (spectra of {looked} of {of} {read})." if 0 < looked < of else f"{text}."


def _phases(survey: dict) -> str | None:
    across = survey.get("across")
    if not across or "phases" not in across:
        return None
    spans = [(phase, phase_range(survey, phase)) for phase in PHASES]
    named = [f"{phase.capitalize()} ({'layers' if '–' in span else 'layer'} {span})" for phase, span in spans if span]
    return f"Depth falls into phases: {listing(named)}." if named else "No phases of depth are claimed."


def _correlations(survey: dict) -> str | None:
    found = (survey.get("across") or {}).get("correlations") or {}
    named = [("entropy", found.get("first_norm_entropy")), ("sink rate", found.get("first_norm_sink_rate"))]
    parts = [f"with that of the {what} by {number(r, 2)}" for what, r in named if finite(r)]
    return f"Over depth, the change of the first token's norm correlates {listing(parts)}." if parts else None


def _interventions(survey: dict) -> list[str]:
    rows = [] if encoded(survey) else survey.get("interventions") or []
    kinds = [
        ("Perplexity collapses (ten times or more) under: ", "collapse"),
        ("Perplexity is measurably worse under: ", "worse, "),
        ("Perplexity is measurably better under: ", "better, "),
        ("Perplexity changes by less than 1% under: ", LITTLE_CHANGE),
        ("Too few chunks to tell what happens under: ", UNKNOWN),
    ]
    found = []
    for text, kind in kinds:
        places: dict[str, list[str]] = {}  # the same intervention in several places is named once
        for row in rows:
            if (said := effect(row)).startswith(kind):
                remark = said.removeprefix(kind) if kind.endswith(", ") else ""
                where = visible_name(str(row.get("where") or ""))
                places.setdefault(intervention_name({**row, "where": None}), []).append(
                    ": ".join(filter(None, (where, remark)))
                )
        named = [f"{name} ({'; '.join(filter(None, where))})" if any(where) else name for name, where in places.items()]
        if named:
            found.append(f"{text}{listing(named, len(named))}.")
    return found


def _audit(survey: dict) -> str | None:
    found = survey.get("audit")
    if not found or found.get("layer") is None:
        return None
    of = f" of the {found['of']:,} scalars" if found.get("of") else ""
    if found.get("scalars") is None:
        most = max(map(int, found.get("tried") or {}), default=0)
        return f"Zeroing the {most:,} largest{of} in layer {found['layer']} does not multiply perplexity by ten."
    few = f"{found['scalars']:,} largest" if found["scalars"] > 1 else "largest"
    return f"Zeroing the {few}{of} in layer {found['layer']} of each sequence multiplies perplexity by ten or more."
