"""Figures of an encoder's tokens: norms by kind and by place, and where patches look."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread

from ..words import called, number, visible
from .curves import depth_axis, draw_line, legend, log_axis, present, share_axis, values
from .style import figure, heat

LABEL = 14  # characters of a name that an axis has room for


def kinds(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """Norms of tokens by kind, the share of patches (or frames) of high norm, and where patches look, by layer."""
    if not present(values(survey, "patch_norm")):
        return None
    drawn, read = figure(390), called(survey)
    norms, high, looks = drawn.subplots(3, sharex=True)
    for key, colour, name, style in (
        ("patch_norm", "blue", read.parts, "-"), ("patch_norm_max", "blue", f"longest {read.part}", ":"),
        ("cls_norm", "orange", "CLS", "-"), ("register_norm", "green", read.registers, "-"),
        ("special_norm", "violet", "other tokens", "-"),
    ):  # fmt: skip
        draw_line(norms, survey, values(survey, key), colour, name, linestyle=style)
    log_axis(norms, surveys, ("patch_norm", "patch_norm_max", "cls_norm", "register_norm", "special_norm"))
    norms.set_title("Norm")
    draw_line(high, survey, values(survey, "high_norm"), "pink", f"{read.parts} of high norm")
    share_axis(high)
    high.set_title(f"Share of {read.parts} at least three times as long as the median {read.part}")
    for key, colour in (("to_cls", "orange"), ("to_registers", "green"), ("to_high", "pink")):
        draw_line(looks, survey, values(survey, key), colour)
    share_axis(looks)
    firsts = (("to_cls", "CLS"), ("to_registers", read.registers))
    to = "".join(f"to {name}, " for key, name in firsts if present(values(survey, key)))
    looks.set_title(f"Attention of {read.parts} {to}to {read.parts} of high norm")
    depth_axis(looks, survey)
    pairs = [pair for axes in (norms, high) for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    legend(drawn, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return drawn


def norm_maps(survey: dict, surveys: Sequence[dict]) -> Figure | None:
    """Images, and the norms of their patches in a few layers, each layer on a scale of its own from 0."""
    shown = survey.get("norm_maps")
    if not shown or not shown.get("images"):
        return None
    images, layers = shown["images"], shown["layers"]
    drawn = figure(40 + 105 * len(images), 40 + 105 * (1 + len(layers)))
    panels = drawn.subplots(len(images), 1 + len(layers), squeeze=False)
    tops = [max(np.max(image["norms"][at]) for image in images) for at in range(len(layers))]
    for row, image in zip(panels, images, strict=True):
        picture = _picture(image["png"])
        row[0].imshow(picture, interpolation="none")
        row[0].set_xticks([])
        row[0].set_yticks([])
        row[0].grid(False)
        row[0].set_ylabel(visible(image["name"], LABEL))
        for axes, norms, top in zip(row[1:], image["norms"], tops, strict=True):
            heat(axes, np.array(norms, float) / (top or 1))
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, layer, top in zip(panels[0][1:], layers, tops, strict=True):
        axes.set_title(f"layer {layer}\n0 to {number(top, 3)}")
    return drawn


def _picture(png: str) -> np.ndarray:
    """A PNG in base64 as (H, W, 3), 0..1."""
    return imread(io.BytesIO(base64.b64decode(png)), format="png")[..., :3]
