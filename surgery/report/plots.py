"""Figures with depth on the horizontal axis, and the interventions. None where the survey has no such data.

A plot takes the survey it shows and all surveys of the report, so that the same axis means the same in each of them.
Layer l = 0 is the embedding output, l = k the residual stream after block k; attention of block b stands at b + 1.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter

from ..survey.thresholds import MIN_MAGNITUDE, MIN_RATIO
from ..words import finite, number, shortened
from .curves import (
    depth_axis,
    depths,
    draw_line,
    heads,
    legend,
    linear_axis,
    log_axis,
    present,
    shade_phases,
    share_axis,
    values,
)  # fmt: skip
from .style import DASHES, LIGHT, SERIES, figure
from .summary import PHASES, intervention_name, phase_range, place, untouched

LENS_TOP = 1e9


def magnitude(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """Largest |x|, the next two, and the median of |x|, by layer, against Sun's threshold."""
    largest, median = values(survey, "max"), values(survey, "median")
    if not present(largest):
        return None
    drawn = figure(250)
    axes = drawn.subplots()
    draw_line(axes, survey, largest, "blue", "largest")
    top = [[*(row.get("top3") or []), None, None, None][1:3] for row in survey["layers"]]
    for rank, name in enumerate(("second", "third")):
        line = np.array([value[rank] for value in top], float)
        if present(line):
            draw_line(axes, survey, line, "blue", name, alpha=0.5 - 0.2 * rank, linewidth=1)
    draw_line(axes, survey, median, "orange", "median")
    draw_line(axes, survey, np.maximum(MIN_MAGNITUDE, MIN_RATIO * median), "muted", "massive from here", linestyle="--")
    for key, name, style in (("born", "born", ":"), ("died", "gone", "-.")):
        if (layer := place(survey, key)) is not None:
            axes.axvline(layer, color=LIGHT["green"], linestyle=style, linewidth=1, label=f"{name}: layer {layer}")
    axes.set_title("|activation|, mean over sequences")
    log_axis(axes, surveys, ("max", "median"))
    depth_axis(axes, survey)
    legend(drawn, *axes.get_legend_handles_labels())
    return drawn


def depth(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """First token's norm, entropy and sink rate on one depth axis, phases shaded."""
    shown = [key for key in ("first_norm", "entropy_bits", "sink_rate") if present(values(survey, key))]
    if not shown:
        return None
    drawn = figure(125 * len(shown) + 25)
    panels = dict(zip(shown, drawn.subplots(len(shown), sharex=True, squeeze=False)[:, 0], strict=True))
    if (axes := panels.get("first_norm")) is not None:
        draw_line(axes, survey, values(survey, "first_norm"), "blue", "first token")
        draw_line(axes, survey, values(survey, "rest_norm"), "orange", "other tokens", linestyle="--")
        log_axis(axes, surveys, ("first_norm", "rest_norm"))
        axes.set_title("Norm")
    if (axes := panels.get("entropy_bits")) is not None:
        draw_line(axes, survey, values(survey, "entropy_bits"), "violet", "entropy")
        draw_line(axes, survey, values(survey, "entropy_bound"), "muted", "its upper bound", linestyle=":")
        linear_axis(axes, surveys, ("entropy_bits",), floor=0.0)
        axes.set_title("Entropy of the stream's spectrum, bits")
    if (axes := panels.get("sink_rate")) is not None:
        draw_line(axes, survey, values(survey, "sink_rate"), "green", "sink rate")
        share_axis(axes)
        axes.set_title("Sink rate: share of heads that have a sink")
    for axes in panels.values():
        shade_phases(axes, survey)
    depth_axis([*panels.values()][-1], survey)
    pairs = [pair for axes in panels.values() for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles, names = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for phase in PHASES:
        if span := phase_range(survey, phase):
            handles.append(Patch(color=LIGHT[phase], alpha=0.25, linewidth=0))
            names.append(f"{phase.capitalize()} {span}")
    legend(drawn, handles, names)
    return drawn


def spectrum(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """p1 with its lower bound, and the dominance ratio of the first token."""
    panels = [
        ("p1", "p1_bound", "Share of the energy in one direction, p1", "blue", "p1", "its lower bound"),
        ("dominance", None, "Dominance: max / mean |x| of the first token", "orange", None, None),
    ]
    return _stack(survey, surveys, panels, unit={"p1"}, log={"dominance"})


def attention_spread(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """How widely heads attend: effective tokens, mixing, and the variance of what they write, by layer."""
    panels = [
        ("effective_tokens", "band", "Effective number of attended tokens", "green", "median head", "all heads"),
        ("mixing", None, "Mixing score: row entropy / log of its length", "violet", None, None),
        ("value_variance_first", "value_variance_rest", "Variance of a head's output (median head)", "blue",
         "first position", "the others"),
    ]  # fmt: skip
    return _stack(survey, surveys, panels, unit={"mixing"}, log={"effective_tokens", "value_variance_first"})


def selection(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """What heads select, after arXiv 2508.17821: how few places, how far apart, how sensitive; by layer."""
    panels = [
        ("attended_share", "band", "Share of the places that hold 90% of the weight", "green", "median head",
         "all heads"),
        ("separability", None, "Separability of the selected values (median head)", "violet", None, None),
        ("gradient_sensitivity", "gradient_bound", "Sensitivity of a weight to its logit (median head)", "pink",
         "sensitivity", "its upper bound"),
    ]  # fmt: skip
    return _stack(survey, surveys, panels, unit={"attended_share", "separability"})


def states(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """What layers that hand on a state give, and how much of that is due to what leads the text, by layer."""
    panels = [
        ("lead_near", "lead_far", "Share of the output that is due to what leads the text", "blue", "next 8 tokens",
         "last 8 tokens"),
        ("state_rest", None, "Norm of the output, mean over all tokens but the first", "orange", None, None),
    ]  # fmt: skip
    return _stack(survey, surveys, panels, log={"state_rest"})


def selected_by_length(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """How many places a row selects against how many it sees: the median layer, and all layers as a band."""
    counted = [row.get("attended_by_length") or {} for row in survey["layers"]]
    counted = [found for found in counted if found.get("length") and found.get("tokens")]
    if not counted:
        return None
    lengths = sorted({length for found in counted for length in found["length"]})
    if len(lengths) < 2:  # of an encoder each row sees all
        return None
    table = np.array([np.interp(lengths, found["length"], found["tokens"]) for found in counted])  # (layers, lengths)
    drawn = figure(190)
    axes = drawn.subplots()
    axes.fill_between(lengths, table.min(0), table.max(0), color=LIGHT["green"], alpha=0.2, linewidth=0,
                      label="all layers")  # fmt: skip
    axes.plot(lengths, np.median(table, axis=0), color=LIGHT["green"], label="median layer", marker="o")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_title("Places that hold 90% of a row's weight")
    axes.set_xlabel("places that the row sees")
    legend(drawn, *axes.get_legend_handles_labels())
    return drawn


def lens(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """Perplexity of each layer read through the final norm and the output layer, up to `LENS_TOP`."""
    panels = [("lens_ppl", None, "Perplexity through the logit lens", "pink", None, None)]
    drawn = _stack(survey, surveys, panels, log={"lens_ppl"})
    if drawn is not None:  # far from the output it may be 1e50, and such an axis shows nothing of the rest
        bottom, top = drawn.axes[0].get_ylim()
        drawn.axes[0].set_ylim(bottom, max(min(top, LENS_TOP), 2 * bottom))
    return drawn


def interventions(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """Paired difference in NLL of each intervention, with its 95% interval."""
    rows = [row for row in survey.get("interventions") or [] if not untouched(row)]
    rows = [row for row in rows if finite((row.get("delta_nll") or {}).get("mean"))]
    if not rows:
        return None
    names = [textwrap.fill(intervention_name(row), 24, max_lines=3, placeholder="…") for row in rows]
    rooms = np.array([name.count("\n") + 1.8 for name in names])  # of each row, in lines of text
    drawn = figure(70 + 11 * rooms.sum())
    axes = drawn.subplots()
    heights = np.cumsum(rooms) - rooms / 2
    low, high = _delta_limits(surveys)
    for height, row in zip(heights, rows, strict=True):
        delta = row["delta_nll"]
        ends = [delta[end] if finite(delta.get(end)) else delta["mean"] for end in ("low", "high")]
        colour = LIGHT["muted"] if ends[0] <= 0 <= ends[1] else LIGHT["orange"] if delta["mean"] > 0 else LIGHT["green"]
        axes.plot(ends, [height, height], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(delta["mean"], height, "o", color=colour, markersize=5)
    axes.axvline(0, color=LIGHT["muted"], linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.01, linscale=0.6)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([at for at in (-10, -1, -0.1, 0, 0.1, 1, 10) if low <= at <= high]))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.set_yticks(heights, names)
    axes.set_ylim(rooms.sum(), 0)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.set_title("NLL against the untouched model, nats per token")
    return drawn


def _delta_limits(surveys: Sequence[dict]) -> tuple[float, float]:
    """Ends of the axis of NLL differences: every interval of every survey, and at least 0.05 to both sides."""
    deltas = [row.get("delta_nll") or {} for survey in surveys for row in survey.get("interventions") or []]
    found = [delta[end] for delta in deltas for end in ("mean", "low", "high") if finite(delta.get(end))]
    return min(-0.05, 1.3 * min(found)), max(0.05, 1.3 * max(found))


def compare(surveys: Sequence[dict], names: Sequence[str]) -> Figure | None:
    """All surveys in the same axes: loudest ratio, first token's norm, entropy, sink rate; depth is relative."""
    keys = [
        ("ratio", "Largest |x| / median", True),
        ("first_norm", "Norm of the first token", True),
        ("entropy_bits", "Entropy, bits", False),
        ("sink_rate", "Sink rate", False),
    ]
    keys = [entry for entry in keys if any(present(values(survey, entry[0])) for survey in surveys)]
    if len(surveys) < 2 or not keys:
        return None
    same_depth = len({len(survey["layers"]) for survey in surveys}) == 1
    drawn = figure(120 * len(keys) + 25)
    handles = []
    panels = drawn.subplots(len(keys), sharex=True, squeeze=False)[:, 0]
    for axes, (key, title, is_log) in zip(panels, keys, strict=True):
        for at, survey in enumerate(surveys):
            across = depths(survey) if same_depth else np.linspace(0, 1, len(survey["layers"]))
            style: dict[str, Any] = {
                "color": LIGHT[SERIES[at % len(SERIES)]],
                "linestyle": DASHES[at // len(SERIES) % len(DASHES)],
            }
            axes.plot(across, values(survey, key), marker="o" if len(across) < 4 else None, **style)
            if axes is panels[0]:
                handles.append(Line2D([], [], **style))
        (log_axis if is_log else linear_axis)(axes, surveys, (key,))
        if key == "sink_rate":
            share_axis(axes)
        axes.set_title(title)
    if same_depth:
        depth_axis(panels[-1], surveys[0])
    else:
        panels[-1].set_xlabel("depth, as a share of the layers")
    legend(drawn, handles, [shortened(name, 56) for name in names], columns=1)
    return drawn


def _stack(survey, surveys, panels, unit=frozenset(), log=frozenset()) -> Figure | None:
    """Panels (key, second key or "band" or None, title, colour, name, second name) under each other, by layer."""
    panels = [panel for panel in panels if present(values(survey, panel[0]))]
    if not panels:
        return None
    drawn = figure(115 * len(panels) + 25)
    pairs: list[tuple[Any, str]] = []
    drawn_axes = drawn.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (key, second, title, colour, name, second_name) in zip(drawn_axes, panels, strict=True):
        keys = [key]
        if second == "band":
            table = np.ma.masked_invalid(heads(survey, key))
            low, high = (edge(axis=1).filled(np.nan) for edge in (table.min, table.max))
            axes.fill_between(depths(survey), low, high, color=LIGHT[colour], alpha=0.2, linewidth=0, label=second_name)
        draw_line(axes, survey, values(survey, key), colour, name)
        if second != "band" and second and present(values(survey, second)):
            keys.append(second)
            draw_line(axes, survey, values(survey, second), "muted", second_name, linestyle="--", zorder=1.9)
        (log_axis if key in log else linear_axis)(axes, surveys, keys, every_head=second == "band")
        if key in unit:
            share_axis(axes)
        axes.set_title(title)
        pairs += zip(*axes.get_legend_handles_labels(), strict=True)
    depth_axis(drawn_axes[-1], survey)
    if pairs:
        legend(drawn, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return drawn
