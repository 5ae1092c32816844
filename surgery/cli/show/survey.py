"""A survey, and what interventions found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...words import Called, called, count_of, encoded, factor, score, tokens_of, whole_of
from .tables import new_table


def show_survey(console: Console, survey: Mapping[str, Any]) -> None:
    console.print(f"[bold]Survey of {escape(survey['source'])}[/]", soft_wrap=True)
    console.print("")
    sizes = new_table("Activations", "layer", "max", "median", "ratio", "massive", "dims")
    shape = new_table("Norms, spectra, attention", "layer", "|x_0|", "|x_i|", "p1", "bits", "sink rate", "mixing")
    for row in survey["layers"]:
        layer, dims = str(row["layer"]), ", ".join(str(dim) for dim, _ in row["dims"][:4]) or "-"
        sizes.add_row(
            layer, f"{row['max']:,.1f}", f"{row['median']:.3f}", f"{row['ratio']:,.0f}", f"{row['count']:,}", dims
        )
        shape.add_row(
            layer, f"{row['first_norm']:,.1f}", f"{row['rest_norm']:,.1f}", _share(row.get("p1")),
            _share(row.get("entropy_bits")), _share(row.get("sink_rate")), _share(row.get("mixing")),
        )  # fmt: skip
    console.print(sizes, "")
    console.print(shape)
    if encoded(survey):
        console.print("")
        console.print(_kinds(survey["layers"], called(survey)))
    if mixed := [row for row in survey["layers"] if row.get("mixer")]:
        console.print("")
        console.print(_states(mixed))
    for line in _findings(survey):
        console.print(line, markup=False, highlight=False)
    if survey.get("interventions") and encoded(survey):
        console.print("")
        console.print(_fidelity(survey["interventions"], called(survey).parts))
    elif survey.get("interventions"):
        console.print("")
        _show_interventions(console, survey["interventions"])
        console.print(f"\n{_audit(survey['audit'])}", highlight=False)


def _kinds(rows: Sequence[Mapping[str, Any]], read: Called) -> Table:
    """What the tokens of an image, a recording or a text are in each layer: norms by kind, and where patches look."""
    columns: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("|CLS|", "cls_norm", _norm), (f"|{read.register}|", "register_norm", _norm),
        ("|special|", "special_norm", _norm), (f"|{read.part}|", "patch_norm", _norm),
        ("longest", "patch_norm_max", _norm), ("high norm", "high_norm", _percent), ("to CLS", "to_cls", _share),
        (f"to {read.registers}", "to_registers", _share), ("to high", "to_high", _share),
    ]  # fmt: skip
    kept = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    shown = new_table("Tokens", "layer", *(name for name, _, _ in kept))
    for row in rows:
        shown.add_row(str(row["layer"]), *(written(row.get(key)) for _, key, written in kept))
    return shown


def _states(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Layers that hand on a state: norms of what they give, and how much of it is due to what leads the text."""
    shown = new_table("States", "layer", "mixer", "|y_0|", "|y_i|", "lead, near", "lead, far", words=2)
    for row in rows:
        shown.add_row(
            str(row["layer"]), escape(row["mixer"]), _norm(row.get("state_first")), _norm(row.get("state_rest")),
            _percent(row.get("lead_near")), _percent(row.get("lead_far")),
        )  # fmt: skip
    return shown


def scanned(survey: Mapping[str, Any]) -> str:
    """The survey in one line."""
    massive = count_of(survey["massive_activations"]["count"], "massive activation")
    read = f"{count_of(survey['chunks'], called(survey).one)}"
    if "perplexity" in survey:
        read = f"perplexity {score(survey['perplexity']['ppl'])}"
    return f"scanned {survey['source']}: {massive} in {len(survey['layers'])} layers, {read}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _norm(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _findings(survey: Mapping[str, Any]) -> list[str]:
    """What the table comes to, line by line."""
    total, across = survey["massive_activations"], survey["across"]
    ppl = f"; perplexity {survey['perplexity']['ppl']:.4f}" if "perplexity" in survey else ""
    lines = [
        "",
        f"{total['count']:,} massive activations in {survey['chunks']} x {survey['chunk_length']} tokens{ppl}",
    ]
    if read_as := encoded(survey):
        became, words = tokens_of(read_as, times="x"), called(survey)
        lines.append(f"Each {words.one} is {became}; high norm: three times as long as the median {words.part}")
        if spans := (across["auto"] or {}).get("spans"):
            layers = ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in spans)
            lines.append(f"Massive by the scale-free criterion (ten times an ordinary token's peak): layer {layers}")
    if total["count"]:
        tokens = " ".join(repr(token) for token in across["tokens"][:4])
        end = "last to the end" if across["died"] is None else f"gone from layer {across['died']} on"
        lines.append(
            f"Born in layer {across['born']}, {end}; dims {', '.join(map(str, total['dims'][:6]))}, on {tokens}"
        )
    if any(row.get("lead_far") is not None for row in survey["layers"]):
        lines.append(
            "lead: how much of what such a layer gives is due to the prefix, or without one to the first token, at the "
            "next 8 tokens and at the last 8 of a sequence (in one batch of four, where there are many)"
        )
    if looked := max((row.get("spectra") or 0 for row in survey["layers"]), default=0):
        read = f"{looked} of the {survey['chunks']} {called(survey).many if encoded(survey) else 'sequences'}"
        lines.append(f"p1, bits (of entropy) and phases are those of {read}")
    for unit in survey["super_neurons"][:3]:
        lines.append(
            f"Super neuron: layer {unit['layer']}, unit {unit['unit']}, {unit['share']:.0%} of what is written to dim "
            f"{unit['dim']}"
        )
    if phases := across["phases"]:
        named = ", ".join(f"{name} {span[0]}-{span[1]}" for name, span in phases.items() if span)
        lines.append(f"Phases by layer: {named}")
    return lines


def _show_interventions(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    scores = new_table("Interventions", "", "where", "perplexity", "of untouched", "95% interval", words=2)
    effects = new_table("What else they change", "", "touched", "sink rate", "bits", "massive")
    done = [row for row in rows if not row.get("error")]
    for row in done:
        change = row["delta_nll"]
        scores.add_row(
            row["name"], escape(str(row["where"])), f"{row['ppl']:,.4g}", f"{factor(change['mean']):.4g}",
            f"{factor(change['low']):.4g} to {factor(change['high']):.4g}",
        )  # fmt: skip
        effects.add_row(
            row["name"], f"{row['touched']:,}", _share(row["sink_rate"]), _share(row["entropy_bits"]),
            f"{row['massive']:,}",
        )  # fmt: skip
    console.print(scores, "")
    console.print(effects)
    for row in rows:
        if row not in done:
            console.print(f"Not possible: {row['name']}, {row['where']}: {row['error']}", markup=False)


def _fidelity(rows: Sequence[Mapping[str, Any]], parts: str) -> Table:
    """How alike features are to the untouched encoder's: cosines."""
    shown = new_table(
        "Interventions: cosine with the untouched features", "", "where", "touched", whole_of(rows), parts, words=2
    )
    for row in rows:
        found = row["fidelity"] or {}
        cells = [_cosine(found.get("last") or found.get("cls")), _cosine(found.get(parts))]
        shown.add_row(row["name"], escape(row["where"]), str(row["touched"] or 0), *cells)
    return shown


def _cosine(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['mean']:.4f} ({found['low']:.4f} to {found['high']:.4f})"


def _audit(found: dict) -> str:
    enough = found["scalars"] is not None
    count = found["scalars"] if enough else max(found["tried"])
    few = "largest" if count == 1 else f"{count:,} largest"
    multiplies = "multiplies perplexity by ten or more" if enough else "does not multiply perplexity by ten"
    where = f"of the {found['of']:,} scalars of each sequence at layer {found['layer']}"
    return f"Audit: setting the {few} {where} to zero {multiplies}"
