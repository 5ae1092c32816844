"""Interventions on an encoder, and how much of its features they leave: fidelity, in place of perplexity.

After Table 4 of Sun et al. (arXiv 2402.17762): massive activations set to zero hurt, set to their mean they do not. As
few encoders have such by the absolute criterion, what is changed is the largest entry of each image in the layer where
it stands out most by the scale-free one (`across.auto_massive`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..live.edits import Change, TouchedNothing, edit_stream, hidden
from ..live.features import Features
from ..live.model import Live
from ..live.paired import cosine_interval
from ..live.port import Batch, Images
from ..live.stream import Observer, stream
from ..progress import Advance, unseen


class Largest(Observer):
    """The largest entry of each image at a layer: its dim, and the mean of such entries by dim."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.values: dict[int, list[float]] = {}  # by dim

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        if layer == self.layer:
            for row in states:
                place = _largest(row)
                self.values.setdefault(place % row.shape[1], []).append(float(row.flatten()[place]))

    def mean(self, dim: int) -> float:
        return sum(self.values[dim]) / len(self.values[dim])


@dataclass(frozen=True)
class _Planned:
    name: str
    where: str
    apply: Callable[[], Change]


def run_on_images(live: Live, pixels: torch.Tensor, survey: dict, advance: Advance = unseen) -> list[dict]:
    """Each intervention on `pixels` (N, C, H, W), or recordings (N, ...), against the untouched encoder.

    Rows: `name`, `where`, `touched` (scalars, or places in the masks of all sites) and `fidelity`: `cls` and `patches`,
    mean and interval over images of the cosine between features before and after (of patches, or `frames`, their mean
    in each image; `cls` None where there is no such token). One that finds no hold has `error` and None for the rest.
    `advance` is told of images, N for each pass, of which there are `passes_on_images`.
    """
    layer = _loudest(survey)
    untouched, largest = Features(live), Largest(layer)
    stream(live, pixels, [untouched, largest], advance=advance, what="untouched")
    rows: list[dict[str, Any]] = []
    for plan in _planned(live, layer, largest):
        features = Features(live)
        try:
            with plan.apply() as touched:
                stream(live, pixels, [features], advance=advance, what=plan.name)
        except TouchedNothing as error:
            rows.append(
                {"name": plan.name, "where": plan.where, "touched": None, "fidelity": None, "error": str(error)}
            )
            continue
        found = fidelity(features, untouched)
        rows.append({"name": plan.name, "where": plan.where, "touched": touched.count, "fidelity": found})
    return rows


def passes_on_images(live: Live) -> int:
    """Over the images, with the untouched one."""
    assert isinstance(live.port, Images)
    return 5 + bool(live.port.registers) + live.port.cls


def fidelity(after: Features, before: Features) -> dict[str, Any]:
    """Features of each image, twice: how alike what stands for it and its patches are."""
    whole, patches = after.alike(before)
    return {
        after.whole or "cls": None if whole is None else cosine_interval(whole).to_dict(),
        after.called.parts: cosine_interval(patches).to_dict(),
    }


def _loudest(survey: dict) -> int:
    """The layer where the largest entry stands out most against an ordinary token's, before the last."""
    rows = survey["layers"][1:-1] or survey["layers"]
    found: int = max(rows, key=lambda row: row["auto_ratio"])["layer"]
    return found


def _planned(live: Live, layer: int, largest: Largest) -> list[_Planned]:
    port = live.port
    assert isinstance(port, Images)
    dims = sorted(largest.values, key=lambda dim: -len(largest.values[dim]))[:3]
    where = f"layer {layer}, dim{'s' if len(dims) > 1 else ''} {', '.join(map(str, dims))}"
    source = torch.Generator().manual_seed(0)

    def to_zero(_: int, states: torch.Tensor) -> tuple[list[int], float]:
        return [_largest(states)], 0.0

    def to_mean(_: int, states: torch.Tensor) -> tuple[list[int], float]:
        place = _largest(states)
        return [place], largest.mean(place % states.shape[1])

    def any_other(_: int, states: torch.Tensor) -> tuple[list[int], float]:
        return [int(torch.randint(states.numel(), (), generator=source))], 0.0

    def median_sized(_: int, states: torch.Tensor) -> tuple[list[int], float]:
        magnitude = states.abs().flatten()
        return [int((magnitude - magnitude.median()).abs().argmin())], 0.0

    picks = {
        "largest activation to zero": to_zero, "largest activation to its mean": to_mean,
        "a random activation to zero": any_other, "a median-sized activation to zero": median_sized,
    }  # fmt: skip
    planned = [
        _Planned(
            name, where if "largest" in name else f"layer {layer}", partial(edit_stream, live, [layer], pick, name)
        )
        for name, pick in picks.items()
    ]
    if port.registers:
        start = port.cls
        stop = start + port.registers
        name = f"{port.called.registers} hidden from all others"
        planned.append(_Planned(name, "all layers", partial(_hide, live, start, stop)))
    if port.cls:
        planned.append(_Planned("CLS hidden from all others", "all layers", partial(_hide, live, 0, 1)))
    return planned


def _hide(live: Live, start: int, stop: int) -> Change:
    def hides(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= start) & (key < stop) & ((query < start) | (query >= stop))

    return hidden(live, hides, f"tokens {start} to {stop - 1} hidden")


def _largest(states: torch.Tensor) -> int:
    return int(states.abs().flatten().argmax())
