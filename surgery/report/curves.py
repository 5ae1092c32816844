"""What every figure with depth on an axis shares: reading a survey's layers, drawing a line, setting the axes.

Axes take their limits from all surveys of the report, so that the same height means the same in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..words import finite, number
from .style import LIGHT
from .summary import PHASES, phase_range


def values(survey: dict, key: str) -> np.ndarray:
    """`key` of every layer, (L + 1,) float64; NaN where it is missing, null or not finite. Lists give their median."""
    return np.array([_middle(row.get(key)) for row in survey["layers"]])


def heads(survey: dict, key: str) -> np.ndarray:
    """`key` of every layer and head: (L + 1, most heads), NaN where a layer has none or fewer."""
    rows = [_listed(row.get(key)) for row in survey["layers"]]
    table = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for at, row in enumerate(rows):
        table[at, : len(row)] = [value if finite(value) else math.nan for value in row]
    return table


def depths(survey: dict) -> np.ndarray:
    return np.array([row["layer"] for row in survey["layers"]])


def present(line: np.ndarray) -> bool:
    return bool(np.isfinite(line).any())


def draw_line(axes: Axes, survey: dict, line: np.ndarray, colour: str, label: str | None = None, **style) -> None:
    """line (L + 1,) against depth; nothing where it is all NaN."""
    # A point between two gaps is no line: without a marker it would not be seen.
    gaps = np.isnan(np.concatenate([[np.nan], line, [np.nan]]))
    lonely = ~gaps[1:-1] & gaps[:-2] & gaps[2:]
    marks = {"marker": "o", "markevery": lonely.nonzero()[0].tolist()} if lonely.any() else {}
    if present(line):
        axes.plot(depths(survey), line, color=LIGHT[colour], label=label, **marks, **style)


def shade_phases(axes: Axes, survey: dict) -> None:
    for phase in PHASES:
        if phase_range(survey, phase):
            start, stop = survey["across"]["phases"][phase]
            axes.axvspan(start - 0.5, stop + 0.5, color=LIGHT[phase], alpha=0.14, linewidth=0)


def depth_axis(axes: Axes, survey: dict) -> None:
    axes.set_xlim(depths(survey)[0] - 0.5, depths(survey)[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("layer")


def log_axis(axes: Axes, surveys: Sequence[dict], keys: Sequence[str], every_head: bool = False) -> None:
    """A logarithmic vertical axis that holds `keys` of all surveys (medians over heads, or every head)."""
    found = _gather(surveys, keys, every_head)
    found = found[found > 0]
    if not len(found):
        return
    low, high = found.min(), found.max()
    axes.set_yscale("log")
    axes.set_ylim(low / 1.5, high * 1.5)
    # Over less than two decades, some values within one.
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 50 else (1, 2, 5), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2)))
    axes.yaxis.set_minor_locator(NullLocator())


def linear_axis(
    axes: Axes, surveys: Sequence[dict], keys: Sequence[str], every_head: bool = False, floor: float | None = None
) -> None:
    """A linear vertical axis that holds `keys` of all surveys, and `floor` where one is given."""
    found = _gather(surveys, keys, every_head)
    if len(found):
        low = found.min() if floor is None else min(floor, found.min())
        margin = 0.06 * (found.max() - low) or 0.5
        axes.set_ylim(low - margin, found.max() + margin)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))


def share_axis(axes: Axes) -> None:
    """A vertical axis for what lies between 0 and 1."""
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])


def legend(drawn: Figure, handles: list, names: list[str], columns: int = 3) -> None:
    """A legend below the panels; the figure grows by it, so that panels keep their size whatever the legend holds."""
    if names:
        width, height = drawn.get_size_inches()
        drawn.set_size_inches(width, height + (8 + 13 * -(-len(names) // columns)) / 72)
        drawn.legend(handles, names, loc="outside lower left", ncols=columns)


def _gather(surveys: Sequence[dict], keys: Sequence[str], every_head: bool) -> np.ndarray:
    read = heads if every_head else values
    found = np.concatenate([read(survey, key).ravel() for survey in surveys for key in keys])
    return found[np.isfinite(found)]


def _listed(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _middle(value) -> float:
    numbers = [entry for entry in _listed(value) if finite(entry)]
    return float(np.median(numbers)) if numbers else math.nan
