"""Figures beside tables of a verdict: factors with their intervals, original beside converted; curves over steps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ..table import Curves, Factors
from ..words import count_of, factor, finite, number
from .curves import legend
from .style import LIGHT, figure

FAR = 10  # times the original's perplexity: what is farther off stands at the edge, as an arrow
COLOURS = {"original": "blue", "converted": "orange"}  # as in figures of two surveys
PANELS = ("violet", "blue", "green", "ochre")


def beside(found: Factors | Curves | None) -> Figure | None:
    """The figure of a table; None where it has none, or too little for one."""
    if isinstance(found, Factors):
        return _factors(found)
    return None if found is None else _curves(found)


def _factors(found: Factors) -> Figure | None:
    """Each row's factors with their 95% intervals, on a logarithmic axis up to `FAR`."""
    rows = found.rows
    found_points = ((_points(deltas, which), which, at) for at, (_, deltas) in enumerate(rows) for which in COLOURS)
    points = [(point, which, at) for point, which, at in found_points if point is not None]
    if not points:
        return None
    names = [textwrap.fill(name, 24) for name, _ in rows]
    rooms = np.array([max(name.count("\n"), 1) + 1.9 for name in names])  # of each row, in lines of text
    heights = np.cumsum(rooms) - rooms / 2
    drawn = figure(45 + 11 * rooms.sum())
    axes = drawn.subplots()
    low = min([1, *(max(end, 0.05) for point, _, _ in points for end in point)]) / 1.1
    high = max(1.2, 1.1 * min(FAR, max(end for point, _, _ in points for end in point)))
    for (mean, *ends), which, at in points:
        height = heights[at] + (0.35 if which == "converted" else -0.35)
        colour = LIGHT[COLOURS[which]]
        axes.plot(np.clip(ends, low, high), [height, height], color=colour, linewidth=2, solid_capstyle="butt")
        marker, size = (">", 6) if mean > high else ("o", 5)
        axes.plot(min(mean, high), height, marker, color=colour, markersize=size, clip_on=False)
    _factor_axis(axes, low, high)
    axes.set_yticks(heights, names)
    axes.set_ylim(rooms.sum(), 0)
    axes.set_title(found.title)
    marks = [Line2D([], [], color=LIGHT[colour], marker="o", markersize=5) for colour in COLOURS.values()]
    far = any(point[0] > high for point, _, _ in points)
    labels = list(COLOURS)
    if far:
        marks.append(Line2D([], [], color=LIGHT["muted"], marker=">", markersize=6, linestyle=""))
        labels.append("farther off")
    legend(drawn, marks, labels)
    return drawn


def _curves(found: Curves) -> Figure | None:
    """The panels that hold more than a point, above each other, the marked step in all of them."""
    panels = [panel for panel in found.panels if len(panel.points) > 1]
    if not panels:
        return None
    drawn = figure(115 * len(panels) + 25)
    for axes, panel, colour in zip(
        drawn.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, PANELS, strict=False
    ):
        axes.plot(*zip(*panel.points, strict=True), color=LIGHT[colour], marker="o" if panel.dots else None)
        title, values = panel.title, np.array([value for _, value in panel.points])
        top = 1.2 * np.quantile(values, 0.99)
        if 0 < 3 * top < values.max():  # a single step must not press all others flat
            axes.set_ylim(values.min() - 0.05 * (top - values.min()), top)
            title = f"{title} ({count_of(int((values > top).sum()), 'step')} beyond the frame)"
        marked = axes.axvline(found.marked, color=LIGHT["muted"], linewidth=0.9, linestyle="--", zorder=1.9)
        if panel.dots and found.marked in dict(panel.points):
            axes.plot(found.marked, dict(panel.points)[found.marked], "o", color=LIGHT["orange"], markersize=6)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("step")
    legend(drawn, [marked], [found.mark])
    return drawn


def _points(deltas: Mapping[str, Mapping[str, Any] | None], which: str) -> tuple[float, float, float] | None:
    """Factor and ends of its interval, which is a point where there is none; the bare original itself is 1."""
    delta = deltas[which]
    if delta is None:
        return (1.0, 1.0, 1.0) if which == "original" else None
    mean = factor(delta["mean"])
    if math.isnan(mean):
        return None
    low, high = (factor(delta[end]) if finite(delta[end]) else mean for end in ("low", "high"))
    return mean, low, high


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
