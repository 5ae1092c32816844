"""Figures of a verdict: perplexity when quantised, original beside converted; how tuning went."""

from __future__ import annotations

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from .curves import legend
from .gain_words import factor, kept_state, schemes
from .style import LIGHT, figure
from .words import count_of, finite, number

FAR = 10  # times the original's perplexity: what is farther off stands at the edge, as an arrow
COLOURS = {"original": "orange", "converted": "blue"}


def quantised(verdict: dict) -> Figure | None:
    """Perplexity over the bare original's by scheme, with its 95% interval; on a logarithmic axis up to `FAR`."""
    rows = schemes(verdict)
    points = [
        (_points(entry["delta_nll"], which), which, at) for at, (_, entry) in enumerate(rows) for which in COLOURS
    ]
    points = [(found, which, at) for found, which, at in points if found[0] is not None]
    if not points:
        return None
    names = [textwrap.fill(name, 24) for name, _ in rows]
    rooms = np.array([max(name.count("\n"), 1) + 1.9 for name in names])  # of each row, in lines of text
    heights = np.cumsum(rooms) - rooms / 2
    drawn = figure(45 + 11 * rooms.sum())
    axes = drawn.subplots()
    low = min([1, *(max(end, 0.05) for found, _, _ in points for end in found)]) / 1.1
    high = max(1.2, 1.1 * min(FAR, max(end for found, _, _ in points for end in found)))
    for (mean, *ends), which, at in points:
        height = heights[at] + (0.35 if which == "converted" else -0.35)
        colour = LIGHT[COLOURS[which]]
        axes.plot(np.clip(ends, low, high), [height, height], color=colour, linewidth=2, solid_capstyle="butt")
        marker, size = (">", 6) if mean > high else ("o", 5)
        axes.plot(min(mean, high), height, marker, color=colour, markersize=size, clip_on=False)
    _factor_axis(axes, low, high)
    axes.set_yticks(heights, names)
    axes.set_ylim(rooms.sum(), 0)
    axes.set_title("Times the perplexity of the bare original")
    marks = [Line2D([], [], color=LIGHT[colour], marker="o", markersize=5) for colour in COLOURS.values()]
    far = any(found[0] > high for found, _, _ in points)
    labels = list(COLOURS)
    if far:
        marks.append(Line2D([], [], color=LIGHT["muted"], marker=">", markersize=6, linestyle=""))
        labels.append("farther off")
    legend(drawn, marks, labels)
    return drawn


def tuning(verdict: dict) -> Figure | None:
    """Loss and held-out perplexity by step, the state that was kept marked in both."""
    found = verdict.get("tuning")
    if not found:
        return None
    losses = [(entry["step"], entry["loss"]) for entry in found["losses"] if finite(entry["loss"])]
    judged = [(entry["step"], entry["ppl"]) for entry in found["held_out"] if finite(entry["ppl"])]
    panels = [("Loss", losses, "violet", None), ("Perplexity on held-out text", judged, "blue", "o")]
    panels = [panel for panel in panels if len(panel[1]) > 1]
    if not panels:
        return None
    drawn = figure(115 * len(panels) + 25)
    best = kept_state(found)
    for axes, (title, points, colour, marker) in zip(
        drawn.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        axes.plot(*zip(*points, strict=True), color=LIGHT[colour], marker=marker)
        values = np.array([value for _, value in points])
        top = 1.2 * np.quantile(values, 0.99)
        if 0 < 3 * top < values.max():  # a single step must not press all others flat
            axes.set_ylim(values.min() - 0.05 * (top - values.min()), top)
            title = f"{title} ({count_of(int((values > top).sum()), 'step')} beyond the frame)"
        kept = axes.axvline(best["step"], color=LIGHT["muted"], linewidth=0.9, linestyle="--", zorder=1.9)
        if marker and finite(best["ppl"]):
            axes.plot(best["step"], best["ppl"], "o", color=LIGHT["orange"], markersize=6)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("step")
    legend(drawn, [kept], [f"kept: step {best['step']:,}"])
    return drawn


def _points(deltas: dict, which: str) -> tuple[float | None, float, float]:
    """Factor and ends of its interval, which is a point where there is none; the bare original itself is 1."""
    delta = deltas[which]
    if delta is None:
        return (1.0, 1.0, 1.0) if which == "original" else (None, math.nan, math.nan)
    mean = factor(delta["mean"])
    if math.isnan(mean):
        return None, math.nan, math.nan
    ends = (factor(delta[end]) if finite(delta[end]) else mean for end in ("low", "high"))
    return (mean, *ends)


def _factor_axis(axes: Axes, low: float, high: float) -> None:
    axes.axvline(1, color=LIGHT["muted"], linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10) if high / low > 3 else (0.4, 0.6, 0.8, 1, 1.2, 1.5, 2)
    axes.xaxis.set_major_locator(FixedLocator([at for at in steps if low <= at <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
