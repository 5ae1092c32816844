"""Weights turned with a rotation, gains of norms folded into others: what becomes of each, and the proof by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from ..live.parts import Part, Weights

ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4}  # relative error of a proof; norms compute in float32
LOUD = 2.0**10  # a clamp on values of heads shows when they are so much larger
ROWS = 2**14  # of a weight in float64 at a time

Side = tuple[str, int]  # a weight, and the dimension along which its vectors turn
Change = tuple[str, Callable[[torch.Tensor], torch.Tensor]]  # a weight, and what becomes of it


@dataclass(frozen=True)
class Gain:
    """The weight e = `name` + `offset` (d,) of a norm, which `readers` take over; a vector among them is divided."""

    name: str
    offset: float
    readers: tuple[Side, ...]


@dataclass(frozen=True)
class HeadSide:
    """Values of heads stand along `dim` of the weight `name`, at `channels` (H, D) or all over; `written` or read."""

    name: str
    dim: int
    channels: torch.Tensor | None
    written: bool


@dataclass(frozen=True)
class HeadValues:
    """Where the values (dim,) of a site's heads are written and read."""

    dim: int
    sides: tuple[HeadSide, ...]


# ---- weights changed


def changed(weights: Weights, changes: Iterable[Change]) -> Weights:
    new = {name: weight.detach() for name, weight in weights.items()}
    for name, change in changes:
        new[name] = change(new[name])
    return new


def is_vector(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight stands where a norm's output does and does not read it: a bias, what a mixer remembers."""
    return weight.ndim == 1 or ".remembered_inputs." in name


def scaled(weight: torch.Tensor, dim: int, by: torch.Tensor, vector: bool) -> torch.Tensor:
    """Channels along `dim` times `by` (d,); those of a vector divided by it."""
    if vector:
        scaled_back = weight.movedim(dim, -1).double() / by.to(weight.device)
        return torch.where(weight == 0, 0.0, scaled_back.movedim(-1, dim)).to(weight)
    return (weight.movedim(dim, -1).double() * by.to(weight.device)).movedim(-1, dim).to(weight)


def turned(weight: torch.Tensor, dim: int, by: torch.Tensor, channels: torch.Tensor | None = None) -> torch.Tensor:
    """Every vector v along `dim` becomes `by` (d, d) times v; of vectors at `channels` (H, d) each one does."""
    rows = weight.movedim(dim, -1)
    new = torch.empty_like(rows, memory_format=torch.contiguous_format)
    flat = rows.reshape(-1, rows.shape[-1])
    for old, place in zip(flat.split(ROWS), new.view(flat.shape).split(ROWS), strict=True):
        place.copy_(old)
        if channels is None:
            place.copy_(old.double() @ by.T.to(old.device))
        else:
            place[:, channels] = (old[:, channels].double() @ by.T.to(old.device)).to(place)
    return new.movedim(-1, dim)


def folding(gains: Iterable[Gain], weights: Weights) -> list[Change]:
    """Norms' weights taken over by what reads them: each norm is neutral then."""
    changes: list[Change] = []
    for gain in gains:
        scales = weights[gain.name].detach().double() + gain.offset
        changes += [
            (name, partial(scaled, dim=dim, by=scales, vector=is_vector(name, weights[name])))
            for name, dim in gain.readers
        ]
        changes.append((gain.name, partial(torch.full_like, fill_value=1 - gain.offset)))
    return changes


def turning(sides: Iterable[Side], rotation: torch.Tensor) -> list[Change]:
    return [(name, partial(turned, dim=dim, by=rotation)) for name, dim in sides]


def turning_heads(site: HeadValues, rotation: torch.Tensor, loud: float = 1.0) -> list[Change]:
    """Values of every head rotated (and times `loud`) where they are written, and back where they are read."""
    return [
        (s.name, partial(turned, dim=s.dim, by=rotation * (loud if s.written else 1 / loud), channels=s.channels))
        for s in site.sides
    ]


def proved(part: Part, changes: Iterable[Change], rotation: torch.Tensor | None = None) -> bool:
    """Whether the part with changed weights is the same function, of a stream rotated by `rotation` if there is one."""

    def turn(states: torch.Tensor) -> torch.Tensor:
        return states if rotation is None else turned(states, -1, rotation)

    with torch.no_grad():
        added, *others = part.run(part.weights, part.entering)
        after = part.run(changed(part.weights, changes), turn(part.entering))
    return all(_same(*pair) for pair in zip([turn(added), *others], after, strict=True))


def _same(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether the vectors of each token differ by rounding, relative to their norm."""
    if torch.equal(before, after):  # masks with infinities among them
        return True
    return bool(((before - after).norm(dim=-1) <= ROUNDING[before.dtype] * before.norm(dim=-1)).all())
