"""Heat maps: the |activation| landscape, the sinks of every head, attention weights of chosen heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..words import encoded, finite, number, visible
from .curves import heads
from .style import HALF, LIGHT, figure, heat, scale_bar

LABEL = 14  # characters of a token that an axis has room for


def landscape(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """|activation| of the first tokens (rows) in chosen dimensions (columns) of the layer where it peaks."""
    shown = survey.get("landscape")
    if not shown or not shown.get("values") or not shown["values"][0]:
        return None
    size = np.abs(np.array(shown["values"], float))  # (t, dims)
    if not np.isfinite(size).any():
        return None
    rows, columns = size.shape
    drawn = figure(min(150 + 9 * rows, 470))
    grid = drawn.add_gridspec(2, 3, height_ratios=[1, 4.5], width_ratios=[6, 1.3, 0.25])
    axes = drawn.add_subplot(grid[1, 0])
    shade, ticks = _log_shade(size, surveys)
    heat(axes, shade)
    axes.set_xlabel("dimension")
    _sparse_labels(axes.xaxis, shown["dims"], np.nan_to_num(size).max(axis=0), 205 / columns, 11)
    axes.tick_params(axis="x", labelrotation=90)
    _sparse_labels(axes.yaxis, [visible(token, LABEL) for token in shown["tokens"]], np.nan_to_num(size).max(axis=1),
                   min(9, 330 / rows), 9)  # fmt: skip
    _skylines(drawn, grid, axes, size, _sizes(surveys).max())
    scale_bar(drawn.add_subplot(grid[1, 2]), list(ticks.values()), [number(at, 2) for at in ticks], "|activation|")
    return drawn


def _skylines(drawn: Figure, grid, axes: Axes, size: np.ndarray, top: float) -> None:
    """The largest value of each column above the map and of each row beside it, linear up to `top`."""
    above = drawn.add_subplot(grid[0, 0], sharex=axes)
    above.bar(range(size.shape[1]), np.nan_to_num(size).max(axis=0), color=LIGHT["blue"], width=1)
    above.set_ylim(0, 1.05 * top or 1)
    above.tick_params(axis="x", labelbottom=False, length=0)
    above.yaxis.set_major_locator(MaxNLocator(nbins=2))
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 3)))
    above.set_title("Largest of each dimension, linear scale")
    beside = drawn.add_subplot(grid[1, 1], sharey=axes)
    beside.barh(range(size.shape[0]), np.nan_to_num(size).max(axis=1), color=LIGHT["blue"], height=0.9)
    beside.tick_params(axis="y", labelleft=False, length=0)
    beside.set_xlim(0, 1.05 * top or 1)
    beside.set_xticks([])
    beside.grid(False)
    beside.set_title("of each token", fontsize=8.5)


def _sizes(surveys: Sequence[dict]) -> np.ndarray:
    """|activation| of every cell of every survey's landscape that is a number, (N,)."""
    shown = [survey["landscape"]["values"] for survey in surveys if (survey.get("landscape") or {}).get("values")]
    found = np.concatenate([np.abs(np.array(values, float)).ravel() for values in shown])
    return found[np.isfinite(found)]


def _log_shade(size: np.ndarray, surveys: Sequence[dict]) -> tuple[np.ndarray, dict[float, float]]:
    """|x| -> 0..1 on a logarithmic scale that all surveys share, and the powers of ten on it."""
    every = _sizes(surveys)
    every = every[every > 0]
    if not len(every):
        return np.zeros_like(size), {}
    low = np.log10(np.median(every))  # half of the cells are as light as can be: the scale is for the rest
    high = max(np.log10(every.max()), low + 1)
    powers = np.arange(np.ceil(low), np.floor(high) + 1)
    with np.errstate(divide="ignore"):
        shade = np.clip((np.log10(size) - low) / (high - low), 0, 1)
    return shade, {float(10.0**power): float((power - low) / (high - low)) for power in powers}


def sink_map(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """Sink score of every head (rows) in every layer (columns): to position 0, and to the slots where there are any."""
    first, slots = heads(survey, "sink_score"), _slot_sums(survey)
    if not np.isfinite(first).any():
        return None
    panels = [("Attention to the first token", first)]
    if np.isfinite(slots).any():
        panels.append(("Attention to the slots, all together", slots))
    drawn = figure((80 + min(18 * first.shape[1], 220)) * len(panels) + 20)
    grid = drawn.add_gridspec(len(panels), 2, width_ratios=[24, 1])
    layers = [row["layer"] for row in survey["layers"]]
    for at, (title, table) in enumerate(panels):
        kept = np.flatnonzero(np.isfinite(table).any(axis=1))  # the embedding's output has no heads
        axes = drawn.add_subplot(grid[at, 0])
        heat(axes, np.clip(table[kept[0] :].T, 0, 1))
        axes.set_title(title)
        axes.set_ylabel("head")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        step = max(1, -(-len(layers[kept[0] :]) // 12))
        axes.set_xticks(range(0, len(layers) - kept[0], step), layers[kept[0] :: step])
        axes.set_xlabel("layer" if at == len(panels) - 1 else "")
        scale_bar(drawn.add_subplot(grid[at, 1]), [0, 0.3, 1], ["0", "0.3", "1"], "")
    return drawn


def _slot_sums(survey: dict) -> np.ndarray:
    """`slot_score` of every layer and head, summed over slots: (L + 1, heads), NaN where there are none."""
    rows = [row.get("slot_score") or [] for row in survey["layers"]]
    summed = [{"slots": [sum(slots) if slots and all(map(finite, slots)) else None for slots in row]} for row in rows]
    return heads({"layers": summed}, "slots")


def attention_maps(survey: dict) -> list[tuple[str, str, Figure]]:
    """(file name, title, figure) for each head shown: weights of query tokens (rows) on slots and tokens (columns)."""
    found = []
    for shown in survey.get("attention_maps") or []:
        weights = np.array(shown.get("weights") or [[]], float)
        if not weights.size or not np.isfinite(weights).any():
            continue
        title = f"Block {shown['block']}, head {shown['head']}"
        drawn = _attention_map(shown, weights, causal=(encoded(survey) or {"causal": True}).get("causal", False))
        found.append((f"attention-block{shown['block']}-head{shown['head']}", title, drawn))
    return found


def _attention_map(shown: dict, weights: np.ndarray, causal: bool) -> Figure:
    rows, columns = weights.shape
    slots = max(0, columns - len(shown["tokens"]))  # columns in front of the tokens' own
    drawn = figure(225, HALF)
    grid = drawn.add_gridspec(1, 2, width_ratios=[18, 1])
    axes = drawn.add_subplot(grid[0, 0])
    future = np.arange(columns)[None, :] - slots > np.arange(rows)[:, None]
    heat(axes, np.where(future & causal, np.nan, np.clip(weights, 0, 1)))
    step = max(1, -(-rows * 10 // 170))
    axes.set_yticks(range(0, rows, step), [visible(token, LABEL) for token in shown["tokens"][:rows:step]], fontsize=8)
    # Single slots are too narrow to name: one label for all of them, which takes the room of position 0.
    places = list(range(0, columns - slots, max(1, (columns - slots) // 5)))[bool(slots) :]
    names = ["slots"] * bool(slots) + [str(position) for position in places]
    axes.set_xticks([(slots - 1) / 2] * bool(slots) + [slots + position for position in places], names)
    axes.set_xlabel("position of the key")
    scale_bar(drawn.add_subplot(grid[0, 1]), [0, 0.5, 1], ["0", "0.5", "1"], "")
    return drawn


def _sparse_labels(axis, labels: Sequence, importance: np.ndarray, pitch: float, room: float) -> None:
    """Label the loudest of the evenly spaced places (`pitch` points apart) that have `room` points to each other."""
    taken: list[int] = []
    for at in np.argsort(-np.nan_to_num(importance), kind="stable").tolist():
        if all(abs(at - other) * pitch >= room for other in taken):
            taken.append(at)
    taken.sort()
    axis.set_ticks(taken, [str(labels[at]) for at in taken])
