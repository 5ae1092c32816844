"""How figures look, and how a figure becomes SVG that follows the page's light or dark theme.

A figure is drawn once, in the colours of the light theme, each of which has one role only. In the page's SVG every such
colour is replaced by the CSS variable of its role; heat maps, which are pixels, are drawn in both themes and CSS shows
one. Files for papers keep the light colours.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..checkpoint.disk import replacing

WIDTH, HALF = 350, 240  # of figures, in points; on the page one point is about one CSS pixel
PNG_DPI = 300

LIGHT = {
    "page": "#f7f7f4", "card": "#ffffff", "ink": "#1c1c1a", "muted": "#62615c", "line": "#d9d8d2", "strong": "#fefefe",
    "blue": "#2468d2", "orange": "#c8541a", "green": "#0f7f63", "violet": "#7446cc", "ochre": "#977000",
    "pink": "#bb2f77", "mix": "#e0a100", "compress": "#3f86f0", "refine": "#1aa57c",
}  # fmt: skip
DARK = {
    "page": "#131312", "card": "#1d1d1b", "ink": "#efeee8", "muted": "#a9a8a0", "line": "#3b3b37", "strong": "#0e1420",
    "blue": "#74a9ff", "orange": "#ff9459", "green": "#45c9a5", "violet": "#b79cff", "ochre": "#dfb13c",
    "pink": "#f580ba", "mix": "#f0b92a", "compress": "#5b9bff", "refine": "#35c297",
}  # fmt: skip
SERIES = ("blue", "orange", "green", "violet", "ochre", "pink")
DASHES = ("-", "--", "-.", ":")  # when the colours have run out

# From the card's own background to full strength: more is darker on white and lighter on black.
_RAMPS = {
    "on-light": LinearSegmentedColormap.from_list("light", ["#f1f4fa", "#a9c6f2", "#4a88e0", "#1b50ab", "#0a2560"]),
    "on-dark": LinearSegmentedColormap.from_list("dark", ["#23272e", "#21457f", "#2f71d3", "#80b2ff", "#e9f2ff"]),
}
_ROLES = {colour: f"var(--{role})" for role, colour in LIGHT.items()}
_COLOUR = re.compile("|".join(LIGHT.values()))
_TAG = re.compile("<[^<>]*>")  # matplotlib escapes < and > in text and in attributes
_REFERENCE = re.compile(r'(?<= id=")|(?<=url\(#)|(?<=href="#)')
_THEMED = re.compile(r' id="(on-light|on-dark)"')

_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout everywhere
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 8.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5, "legend.frameon": False, "legend.handlelength": 1.6, "legend.columnspacing": 1.2,
    "axes.titlelocation": "left", "axes.titlepad": 5, "axes.spines.top": False, "axes.spines.right": False,
    "text.color": LIGHT["ink"], "axes.titlecolor": LIGHT["ink"], "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["line"], "xtick.color": LIGHT["line"], "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"], "ytick.labelcolor": LIGHT["muted"], "grid.color": LIGHT["line"],
    "grid.linewidth": 0.5, "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y", "axes.grid.which": "major",
    "xtick.minor.visible": False, "ytick.minor.visible": False, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "lines.linewidth": 1.5, "lines.markersize": 2.6, "figure.constrained_layout.h_pad": 0.05,
    "text.parse_math": False,  # a token with two dollar signs is not a formula
    "svg.fonttype": "none", "svg.hashsalt": "surgery", "image.composite_image": False,
}  # fmt: skip


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Our style, whatever the user's matplotlibrc says; and no warning for a token whose letters the font lacks."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(_STYLE)
        yield


def figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of `width` x `height` points."""
    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def heat(axes: Axes, values: np.ndarray) -> None:
    """values (rows, columns) in 0..1, NaN where there is nothing, as an image in both themes."""
    for theme, ramp in _RAMPS.items():
        image = axes.imshow(ramp(np.ma.masked_invalid(values)), interpolation="none", aspect="auto")
        image.set_gid(theme)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def scale_bar(axes: Axes, ticks: list[float], labels: list[str], title: str) -> None:
    """What the shades of `heat` mean: `ticks` in 0..1 from light to strong."""
    heat(axes, np.linspace(1, 0, 64)[:, None])
    axes.set_xticks([])
    axes.set_yticks([63.5 - 64 * tick for tick in ticks], labels)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel(title)


def inline_svg(drawn: Figure, prefix: str, label: str) -> str:
    """The figure as an <svg> element for a page: themed colours, ids of its own (`prefix`), nothing fetched."""
    text = io.StringIO()
    drawn.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    body = text.getvalue()
    body = re.sub(r"<style.*?</style>", "", body[body.index("<svg") :], flags=re.DOTALL)
    opening, body = body.split(">", 1)
    box = opening.partition('viewBox="')[2].partition('"')[0]
    body = _TAG.sub(lambda tag: _themed(tag.group(), prefix), body)
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{body}'


def _themed(tag: str, prefix: str) -> str:
    tag = _THEMED.sub(r' class="\1"', tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)  # the page's own font
    if "data:image" in tag:  # base64 holds no reference and no colour
        return tag.replace(' id="', f' id="{prefix}-', 1)
    return _REFERENCE.sub(f"{prefix}-", _COLOUR.sub(lambda found: _ROLES[found.group()], tag))


def write_figure(drawn: Figure, stem: Path) -> list[Path]:
    """`stem`.png and `stem`.svg in the light theme on white. Raises OSError."""
    for artist in drawn.findobj(lambda artist: artist.get_gid() in _RAMPS):
        artist.set_visible(artist.get_gid() == "on-light")
        artist.set_gid(None)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with replacing(files[0]) as png:
        drawn.savefig(png, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    with replacing(files[1]) as svg:
        drawn.savefig(svg, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return files
