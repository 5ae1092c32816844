"""Register neurons: the few MLP units that make a patch stand out, and with it a place for what concerns the image.

Jiang et al. 2025 (arXiv 2506.08010): in encoders without registers a sparse set of units puts high norms on patches of
little information. Their activation can be moved to a token of its own, and the patches stay patches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..anatomy.linears import as_rows
from ..live.model import Live
from ..live.places import down_projections
from ..live.port import Batch, Images
from ..live.stream import Observer

DOMINANT = 0.1  # a unit counts with this part of the sum of |a_u| * ||w_u|| over the units of its MLP, at such patches
SELECTIVE = 5.0  # and if it is so many times as active there as at other patches
GROWS = 0.1  # a block makes patches stand out if it adds this part of the norm that they come to


@dataclass(frozen=True)
class RegisterNeuron:
    """`unit` of the MLP of `block`. At patches that stand out, mean over them: `activation`, and `reach`, its part of
    the sum of |a_u| * ||w_u||; `elsewhere`: its mean |activation| at other patches."""

    block: int
    unit: int
    activation: float
    elsewhere: float
    reach: float

    def to_dict(self) -> dict:
        return {**vars(self), "layer": self.block + 1}


class RegisterNeurons(Observer):
    """Finds them. `outliers`: of each image, in order, the places of its patches that stand out."""

    def __init__(self, live: Live, outliers: Sequence[Sequence[int]]) -> None:
        assert isinstance(live.port, Images)
        self.outliers, self.special = outliers, live.port.special
        self.lengths = {i: as_rows(module).double().norm(dim=0).cpu() for i, module in down_projections(live).items()}
        self.seen: dict[int, int] = defaultdict(int)  # images by layer; by ~block, of units
        self.norms: dict[int, list[float]] = defaultdict(list)  # of patches that stand out, by layer
        self.there: dict[int, list[torch.Tensor]] = defaultdict(list)  # block -> (m,) of each such patch
        self.rest: dict[int, list[torch.Tensor]] = defaultdict(
            list
        )  # block -> (m,), mean |a| of other patches, by image

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        for image, row in enumerate(states, self.seen[layer]):
            self.norms[layer] += row[list(self.outliers[image])].float().norm(dim=-1).tolist()
        self.seen[layer] += len(states)

    def units(self, block: int, activations: torch.Tensor, written: torch.Tensor, batch: Batch) -> None:
        for image, row in enumerate(activations, self.seen[~block]):
            out = list(self.outliers[image])
            if not out:
                continue
            self.there[block] += row[out].double().cpu().unbind()
            others = torch.ones(len(row), dtype=torch.bool)
            others[: self.special], others[out] = False, False
            self.rest[block].append(row[others.to(row.device)].abs().double().mean(dim=0).cpu())
        self.seen[~block] += len(activations)

    def found(self, most: int | None = None) -> list[RegisterNeuron]:
        """Those of the blocks in which the patches' norms grow, the furthest reaching first.

        `most`: so many, whatever their reach; None: those that are `DOMINANT`.
        """
        means = {layer: sum(norms) / len(norms) for layer, norms in self.norms.items() if norms}
        peak = max(means.values(), default=0.0)
        neurons = []
        for block, rows in self.there.items():
            if means[block + 1] - means[block] < GROWS * peak:
                continue
            there, rest = torch.stack(rows), torch.stack(self.rest[block]).mean(dim=0)
            reach = there.abs() * self.lengths[block]
            part = (reach / reach.sum(dim=1, keepdim=True).clamp(min=torch.finfo(reach.dtype).tiny)).mean(dim=0)
            selective = there.abs().mean(dim=0) >= SELECTIVE * rest
            wanted = selective if most is not None else selective & (part >= DOMINANT)
            neurons += [
                RegisterNeuron(block, unit, there[:, unit].mean().item(), rest[unit].item(), part[unit].item())
                for unit in wanted.nonzero().flatten().tolist()
            ]
        neurons.sort(key=lambda neuron: -neuron.reach)
        return neurons if most is None else neurons[:most]
