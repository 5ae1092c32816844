"""Head-wise RMSNorm on a model that was trained without it: o <- o + g (norm(o) - o), before the output projection.

norm(o) = u * weight with u = o / RMS(o), over the dims of a head. At gate g = 0 nothing changes, exactly. The weight is
chosen so that norm(o) is as near to o on calibration text as one factor per dim allows: with sums over its tokens t,

    weight_i = sum_t u_ti o_ti / sum_t u_ti^2,

the least squares of sum_t (o_ti - u_ti weight_i)^2; where heads share a weight, the sums run over them too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from ..anatomy.calls import Call
from ..anatomy.sites import Anatomy
from ..checkpoint.layout import Stored
from ..converted.card import Section
from ..converted.described import Described
from ..errors import DamagedCheckpoint, SourceError, UnsupportedModel
from ..live.graft import Fold, Norms, at_gate, grafted, head_norm_config, norm_shapes, normed
from ..live.model import Live
from ..live.stream import Batch, Observer, stream
from ..progress import Advance, unseen
from ..recipe.fields import Layers
from ..words import listing
from .base import Changes, Exact, Fitting, Operation, Stand, Target, Trained

UNCHANGED = 1e-9  # share of the heads' energy that a norm must at least change


class HeadNorm(Operation):
    """Norm the output of each head before the output projection: o + gate (norm(o) - o).

    `per_head`: each head has a weight of its own; otherwise the heads of a site share one. `gate`: 0 leaves the model
    the function that it is, 1 is the pure norm, emitted without a gate. `layers`: which blocks, counted from 0 as in
    the names of tensors.
    """

    name: ClassVar[str] = "head_norm"
    rests: ClassVar[bool] = True
    adds: ClassVar[bool] = True

    per_head: Annotated[bool, Field(description="a weight for each head; otherwise the heads of a layer share one")] = (
        False
    )
    gate: Annotated[
        float, Field(ge=0, le=1, allow_inf_nan=False, description="0 leaves the function as it is, 1 is the pure norm")
    ] = 0.0
    layers: Annotated[Layers, Field(description="all, or a list of layers, counted from 0")] = "all"

    @field_validator("layers")
    @classmethod
    def _each_layer_once(cls, value: Literal["all"] | tuple[int, ...]) -> Literal["all"] | tuple[int, ...]:
        if value != "all" and len(set(value)) != len(value):
            raise ValueError("names a layer more than once")
        return value

    @property
    def exact(self) -> Exact:
        return "bits" if self.gate == 0 else "no"

    @property
    def opens(self) -> float:
        return self.gate

    @property
    def inexact(self) -> str:
        return "head_norm with a gate above 0"

    @property
    def reads(self) -> str | None:
        return "head_norm is fitted"

    def described(self, anatomy: Anatomy) -> dict[str, Any]:
        """`config.head_norm` of the converted model. SourceError for a layer that it does not have."""
        layers = range(len(anatomy.blocks)) if self.layers == "all" else self.layers
        if beyond := [layer for layer in layers if layer >= len(anatomy.blocks)]:
            raise SourceError(
                f"head_norm.layers: there is no layer {beyond[0]}, the last of {len(anatomy.blocks)} is "
                f"{len(anatomy.blocks) - 1}; they are counted from 0."
            )
        attending = {site.block for site in anatomy.sites}
        if self.layers != "all" and (without := [layer for layer in layers if layer not in attending]):
            raise SourceError(
                f"head_norm.layers: layer {without[0]} has no attention whose heads could be normed; those that have: "
                f"{listing(sorted(attending), 16)}."
            )
        return head_norm_config(anatomy, layers, self.per_head, gated=self.gate < 1)

    def plan(self, target: Target, parts: Norms | None = None) -> Changes:
        anatomy, described = target.anatomy, self.described(target.anatomy)
        sites = len(described["sites"])
        return Changes(
            added={f"{anatomy.lead}{name}": Stored("F32", shape) for name, shape in norm_tensors(described).items()},
            config={"head_norm": described},
            parts=frozenset({"norms"}),
            told={"normed_sites": sites},
            words=(f"norms of the heads in {sites} of {len(anatomy.sites)}",),
            trains=(Trained("normed_sites", sites, f"norms of the heads at {sites} sites", "the norms of the heads"),),
        )

    def fit(self, live: Live, text: Fitting) -> Norms:
        text.reporter.step("fit the norms of the heads")
        with text.reporter.bar("fit", len(text.chunks)) as advance, _with_slots(live):
            norms, residual = fit_norms(live, self.described(live.anatomy), self.gate, text.chunks, advance)
        text.reporter.note(f"the norms give back all but {residual:.1%} of the energy of the heads' outputs")
        if self.gate == 0:
            text.reporter.note(
                "head_norm at gate 0: the norms are in place and fitted, and the model computes what it did before; "
                "train the gate, or raise it in the recipe, for norms that act"
            )
        return norms

    @contextlib.contextmanager
    def graft(self, live: Live, parts: Norms) -> Iterator[None]:
        """In place at gate 0, where the norms leave the model what it was."""
        with _with_slots(live), normed(live, *at_gate(self.described(live.anatomy), parts, 0.0)):
            yield

    def held(self, live: Live, parts: Norms) -> Norms:
        norms = {site: live.trunk.get_submodule(f"{site}.head_norm") for site in parts}
        return {
            site: {part: value.detach().clone() for part, value in norm.named_parameters()}
            for site, norm in norms.items()
        }

    def tensors(self, live: Live, parts: Norms) -> Mapping[str, torch.Tensor]:
        return {
            f"{live.anatomy.lead}{name}": value.detach().to("cpu", torch.float32).contiguous()
            for name, value in norm_values(self.described(live.anatomy), parts).items()
        }

    @classmethod
    def asks(cls, described: Described) -> Mapping[str, Mapping[str, Stored]]:
        if described.head_norm is None:
            return {}
        shapes = norm_tensors(described.head_norm.to_dict())
        return {"norms": {name: Stored("F32", shape) for name, shape in shapes.items()}}

    def says(self, parts: Norms, target: Target, recipe: Stand) -> Section:
        described, attending = self.described(target.anatomy), len(target.anatomy.sites)
        if not recipe.tuned and self.gate == 0:
            gate = (
                "Its gates are 0: the model computes what it would without the norms, exactly, until they are trained."
            )
        elif described["gated"]:
            gate = "A gate for each head mixes it in: o + g (norm(o) - o)."
        else:
            gate = "It has no gate."
        share = "differ from head to head" if self.per_head else "are shared by the heads of a site"
        return Section(
            tag="head-norm",
            title="head-wise RMSNorm",
            adds="norms",
            text=f"a **head-wise RMSNorm** in {len(described['sites'])} of {attending} attention sites: the output of "
            f"each head is normed before the output projection, with weights that {share}. {gate}",
        )


@contextlib.contextmanager
def _with_slots(live: Live) -> Iterator[None]:
    """Norms live where attention with slots runs; where no operation has put slots there, none will do."""
    if getattr(live.trunk.config, "eab", None) is not None:
        yield
        return
    with grafted(live, Fold((), {}, "as_prefix")):
        yield


def norm_tensors(head_norm: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor name in the trunk -> shape of every norm tensor, in the order of the file."""
    return {
        f"{site}.head_norm.{part}": shape
        for site, shapes in norm_shapes(head_norm).items()
        for part, shape in shapes.items()
    }


def norm_values(head_norm: dict[str, Any], norms: Norms) -> dict[str, torch.Tensor]:
    """Tensor name in the trunk -> value. ValueError where a gate that is not 1 would be dropped."""
    for site, values in norms.items():
        if not head_norm["gated"] and not bool((values.get("gate", torch.ones(())) == 1).all()):
            raise ValueError(f"the norm of {site} has a gate that is not 1, and is to be written without")
    return {
        f"{site}.head_norm.{part}": norms[site][part]
        for site, shapes in norm_shapes(head_norm).items()
        for part in shapes
    }


class NormFit(Observer):
    """The sums of which `norm weights` are made, in float64, for each site that `head_norm` names."""

    def __init__(self, live: Live, head_norm: dict[str, Any]) -> None:
        self.head_norm = head_norm
        self.names = {live.trunk.get_submodule(name): name for name in head_norm["sites"]}
        self.sums: dict[str, torch.Tensor] = {}  # (3, Hq, E): of u o, of u^2, of o^2

    def attended(self, block: int, call: Call, output: torch.Tensor, batch: Batch) -> None:
        if (name := self.names.get(call.module)) is None:
            return
        states = output[:, batch.lead :].double()
        unit = states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + self.head_norm["eps"])
        found = torch.stack([(a * b).sum(dim=(0, 1)) for a, b in ((unit, states), (unit, unit), (states, states))])
        self.sums[name] = self.sums[name] + found if name in self.sums else found

    def norms(self, gate: float) -> Norms:
        """Least-squares weights, float32, and `gate` for each head unless it is 1."""
        if missing := [name for name in self.head_norm["sites"] if name not in self.sums]:
            raise UnsupportedModel(f"{missing[0]} did not attend while the calibration text ran")
        fitted = {name: {"weight": self._weight(name).float()} for name in self.head_norm["sites"]}
        return at_gate(self.head_norm, fitted, gate)[1] if self.head_norm["gated"] else fitted

    def _weight(self, name: str) -> torch.Tensor:
        products, squares, _ = self.sums[name]
        return least_squares(products, squares, self.head_norm["per_head"])

    @property
    def residual(self) -> float:
        """Share of the energy of the heads' outputs that fitted norms do not give back: sum (o - norm)^2 / sum o^2."""
        left = whole = 0.0
        for name, (products, squares, energy) in self.sums.items():
            weight = self._weight(name)
            left += (energy - 2 * weight * products + weight.square() * squares).sum().item()
            whole += energy.sum().item()
        return left / whole if whole else 0.0


def least_squares(products: torch.Tensor, squares: torch.Tensor, per_head: bool) -> torch.Tensor:
    """Weights (Hq, E), or (E,) for all heads, from sums of u o and of u^2, each (Hq, E).

    A dim that never was active takes the scale of its head, a head that never was that of its site, a site that never
    was 1.
    """
    if not per_head:
        products, squares = products.sum(dim=0, keepdim=True), squares.sum(dim=0, keepdim=True)
    weight = torch.ones((), dtype=products.dtype, device=products.device)
    for dims in ((0, 1), (1,), ()):
        total, whole = (part.sum(dim=dims, keepdim=True) if dims else part for part in (products, squares))
        weight = torch.where(whole > 0, total / whole.clamp(min=torch.finfo(whole.dtype).tiny), weight)
    return weight if per_head else weight[0]


def fit_norms(
    live: Live,
    head_norm: dict[str, Any],
    gate: float,
    chunks: torch.Tensor,
    advance: Advance = unseen,
) -> tuple[Norms, float]:
    """Norms for the model (with its slots in place) fitted on `chunks` (M, T), and the share of energy they change."""
    fit = NormFit(live, head_norm)
    stream(live, chunks, [fit], advance=advance, what="calibration")
    for name, sums in fit.sums.items():
        if not bool(sums.isfinite().all()):
            raise DamagedCheckpoint(f"what {name} computes is not finite, so no norm can be fitted; check its weights.")
    if fit.residual < UNCHANGED:
        raise UnsupportedModel(
            f"{live.anatomy.model_type}: its heads' outputs have one size on the whole calibration text, so "
            "norms would change nothing; leave head_norm out, or give other text."
        )
    return fit.norms(gate), fit.residual
