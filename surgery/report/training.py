"""Curves of training from nothing: one line per variant over the optimiser steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..words import number
from .curves import legend, present, share_axis
from .style import LIGHT, SERIES, drawing, figure, write_figure

NAMES = {
    "plain": "plain", "sink_token": "with a sink token", "attention_bias": "with slots k′, v′",
    "head_norm": "with head-wise RMSNorm",
}  # fmt: skip
PANEL = 105  # points high
# Key of the measurements, the key of a dashed line beside it, title, and kind of axis.
PANELS = (
    ("nll", "loss", "Loss, nats per token: on held-out text, and dashed in training", "linear"),
    ("ratio", None, "Largest |x| / median of the stream, in its loudest layer", "log"),
    ("massive", "auto", "Massive activations: Sun's criterion, dashed scale-free", "count"),
    ("slot_score", "first_score", "Attention to slots or sink token, and dashed to the first token", "score"),
    ("sink_rate", None, "Sink rate: share of heads that have a sink", "share"),
)


def training_curves(variants: Mapping[str, dict], stem: Path) -> list[Path]:
    """Draw `measured` of each variant into `stem`.png and `stem`.svg; returns the files. Raises OSError."""
    with drawing():
        return write_figure(_drawn(variants), stem)


def _drawn(variants: Mapping[str, dict]) -> Figure:
    drawn = figure(PANEL * len(PANELS) + 25)
    # Lines that lie on each other, as counts of 0 do: what is drawn first is wider, and shows.
    styles: dict[str, dict[str, Any]] = {
        name: {"color": LIGHT[colour], "linewidth": 2.4 - 0.4 * at}
        for at, (name, colour) in enumerate(zip(NAMES, SERIES, strict=False))
    }
    panels = drawn.subplots(len(PANELS), sharex=True)
    for axes, (key, dashed, title, kind) in zip(panels, PANELS, strict=True):
        shown = []
        for name, found in variants.items():
            steps = [row["step"] for row in found["measured"]]
            for part, style in ((key, {}), (dashed, {"linestyle": (0, (3, 1.5)), "linewidth": 1.0})):
                line = np.array([row.get(part) for row in found["measured"]], float)  # None becomes NaN
                if present(line):
                    axes.plot(steps, line, clip_on=False, **{**styles[name], **style})
                    shown.append(line)
        axes.set_title(title)
        _scale(axes, kind, np.concatenate(shown))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(left=0)
    axes.set_xlabel("optimiser steps")
    legend(drawn, [Line2D([], [], **styles[name]) for name in variants], [NAMES[name] for name in variants], columns=2)
    return drawn


def _scale(axes, kind: str, values: np.ndarray) -> None:
    if kind == "share":
        share_axis(axes)
        return
    if kind == "log" and present(values[values > 0]):
        low, high = np.nanmin(values[values > 0]), np.nanmax(values)
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 50 else (1, 2, 5), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=kind == "count", steps=[1, 2, 5, 10]))
        if kind != "linear":
            axes.set_ylim(0, max(1.0 if kind == "count" else 0.1, 1.08 * np.nanmax(values)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2 if kind == "log" else 4)))
