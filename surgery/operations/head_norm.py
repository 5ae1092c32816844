"""Head-wise RMSNorm on a model that was trained without it: o <- o + g (norm(o) - o), before the output projection.

norm(o) = u * weight with u = o / RMS(o), over the dims of a head. At gate g = 0 nothing changes, exactly. The weight is
chosen so that norm(o) is as near to o on calibration text as one factor per dim allows: with sums over its tokens t,

    weight_i = sum_t u_ti o_ti / sum_t u_ti^2,

the least squares of sum_t (o_ti - u_ti weight_i)^2; where heads share a weight, the sums run over them too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..anatomy.calls import Call
from ..anatomy.sites import Anatomy
from ..errors import DamagedCheckpoint, SourceError, UnsupportedModel
from ..live.graft import Norms
from ..live.stream import Batch, Observer, stream
from ..recipe import HeadNorm

FORMAT = 1
EPS = 1e-6  # added to the mean square of a head, so that one that brings nothing back is not divided by zero
UNCHANGED = 1e-9  # share of the heads' energy that a norm must at least change


def norm_config(anatomy: Anatomy, operation: HeadNorm) -> dict:
    """`config.head_norm` of the converted model. SourceError for a layer that it does not have."""
    layers = range(len(anatomy.blocks)) if operation.layers == "all" else operation.layers
    if beyond := [layer for layer in layers if layer >= len(anatomy.blocks)]:
        raise SourceError(
            f"head_norm.layers: there is no layer {beyond[0]}, the last of {len(anatomy.blocks)} is "
            f"{len(anatomy.blocks) - 1}; they are counted from 0."
        )
    return {
        "format": FORMAT,
        "sites": {site.name: [site.heads, site.value_dim] for site in anatomy.sites if site.block in layers},
        "per_head": operation.per_head,
        "gated": operation.gate < 1,
        "eps": EPS,
    }


def norm_shapes(head_norm: dict) -> dict[str, dict[str, tuple[int, ...]]]:
    """Site name -> the shape of each of its parameters."""
    return {
        site: {
            "weight": (heads, dim) if head_norm["per_head"] else (dim,),
            **({"gate": (heads,)} if head_norm["gated"] else {}),
        }
        for site, (heads, dim) in head_norm["sites"].items()
    }


def norm_tensors(anatomy: Anatomy, head_norm: dict) -> dict[str, tuple[int, ...]]:
    """Tensor name in the checkpoint -> shape of every norm tensor, in the order of the file."""
    return {
        f"{anatomy.lead}{site}.head_norm.{part}": shape
        for site, shapes in norm_shapes(head_norm).items()
        for part, shape in shapes.items()
    }


def norm_values(anatomy: Anatomy, head_norm: dict, norms: Norms) -> dict[str, torch.Tensor]:
    """Tensor name -> float32 value, ready to be written. ValueError where a gate that is not 1 would be dropped."""
    for site, values in norms.items():
        if not head_norm["gated"] and not bool((values.get("gate", torch.ones(())) == 1).all()):
            raise ValueError(f"the norm of {site} has a gate that is not 1, and is to be written without")
    return {
        f"{anatomy.lead}{site}.head_norm.{part}": norms[site][part].detach().to("cpu", torch.float32).contiguous()
        for site, shapes in norm_shapes(head_norm).items()
        for part in shapes
    }


def at_gate(head_norm: dict, norms: Norms, gate: float) -> tuple[dict, Norms]:
    """The same norms, gated, with `gate` in every head."""
    gated = {}
    for site, values in norms.items():
        weight, (heads, _) = values["weight"], head_norm["sites"][site]
        gated[site] = {"weight": weight, "gate": weight.new_full((heads,), gate)}
    return {**head_norm, "gated": True}, gated


class NormFit(Observer):
    """The sums of which `norm weights` are made, in float64, for each site that `head_norm` names."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, head_norm: dict) -> None:
        trunk = model.get_submodule(anatomy.trunk)
        self.head_norm = head_norm
        self.names = {trunk.get_submodule(name): name for name in head_norm["sites"]}
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
        """Share of the energy of what heads bring back that fitted norms do not: sum (o - norm)^2 / sum o^2."""
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
    model: PreTrainedModel,
    anatomy: Anatomy,
    head_norm: dict,
    gate: float,
    chunks: torch.Tensor,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Norms, float]:
    """Norms for `model` (with its slots in place) fitted on `chunks` (M, T), and the share of energy they change."""
    fit = NormFit(model, anatomy, head_norm)
    stream(model, anatomy, chunks, [fit], progress=progress)
    for name, sums in fit.sums.items():
        if not bool(sums.isfinite().all()):
            raise DamagedCheckpoint(f"what {name} computes is not finite, so no norm can be fitted; check its weights.")
    if fit.residual < UNCHANGED:
        raise UnsupportedModel(
            f"{anatomy.model_type}: what its heads bring back has one size on the whole calibration text, so norms "
            "would change nothing; leave head_norm out, or give other text."
        )
    return fit.norms(gate), fit.residual
