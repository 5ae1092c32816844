"""Super neurons: the few MLP units that write a massive activation (arXiv 2605.06611); and how to go without them.

A block's MLP writes a_u * w_u to the stream for each intermediate unit u: its activation times its column of the down
projection. Where a block makes a massive activation (Sun et al. 2024), few of these products are most of the write.

Notation: B sequences, T tokens, d hidden size, m units. Layer l is the stream after block l - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device

from ..anatomy.linears import as_rows
from ..live.model import Live
from ..live.places import down_projections
from ..live.stream import Batch, Observer
from .massive import at_least, median
from .thresholds import MIN_MAGNITUDE, MIN_RATIO

GROWTH = 0.5  # a block makes a massive activation if it adds at least this part of it
DOMINANT = 0.1  # a unit dominates with this part of the sum of |a_u| * ||w_u|| over the units of its MLP


@dataclass
class _Births:
    """Sums over the massive activations that one block made in one dim; vectors are (m,), by unit, float64."""

    activation: torch.Tensor
    reach: torch.Tensor  # |a_u| * ||w_u|| as a part of its sum over units
    wrote: torch.Tensor  # a_u * w_u[dim], positive where it has the sign of the massive activation
    written: float = 0.0  # the same of the whole MLP, with its bias
    count: int = 0


class SuperNeurons(Observer):
    """Finds them at births: |x| massive after the block by Sun's criterion, and at least half of it new.

    Sees only blocks with one down projection (`stream.down_projections`). Sums are kept for each dim of each block that
    makes massive activations, nothing of the text.
    """

    def __init__(self, live: Live) -> None:
        self._projections, self._layers = down_projections(live), len(live.anatomy.blocks)
        self._norms: dict[int, torch.Tensor] = {}  # block -> (m,)
        self._births: dict[tuple[int, int], _Births] = {}  # block, dim
        self._sparsity: dict[int, torch.Tensor] = {}  # block -> `hoyer` (m,)
        self._before: dict[Batch, torch.Tensor] = {}
        self._units: dict[Batch, tuple[torch.Tensor, torch.Tensor]] = {}

    def units(self, block: int, activations: torch.Tensor, written: torch.Tensor, batch: Batch) -> None:
        self._units[batch] = activations, written

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        before, units = self._before.pop(batch, None), self._units.pop(batch, None)
        if layer < self._layers:
            self._before[batch] = states
        if before is not None and units is not None:
            for row in zip(before, states, *units, strict=True):
                self._row(layer - 1, *(part[batch.lead :] for part in row))

    def _row(self, block: int, before, states, activations, written) -> None:
        """One sequence: before, states, written (T, d), activations (T, m)."""
        magnitude = states.abs()
        positions, dims = at_least(magnitude, magnitude.amax(dim=1), MIN_MAGNITUDE).unbind(dim=1)  # few, often none
        values = states[positions, dims]
        new = (values - before.to(states.device)[positions, dims]).abs() >= GROWTH * values.abs()
        if not new.any():
            return
        new &= values.float().abs() >= MIN_RATIO * median(magnitude.float())
        if not new.any():
            return
        with align_module_device(self._projections[block]):  # a weight that accelerate keeps elsewhere comes back
            weight = as_rows(self._projections[block])  # (d, m), a column for each unit
            if block not in self._norms:
                self._norms[block], self._sparsity[block] = weight.double().norm(dim=0).cpu(), hoyer(weight)
            for position, dim in zip(positions[new].tolist(), dims[new].tolist(), strict=True):
                births = self._births.setdefault((block, dim), _none(weight.shape[1]))
                acts, sign = activations[position].double().cpu(), states[position, dim].sign().item()
                reach = acts.abs() * self._norms[block]
                births.activation += acts
                births.reach += reach / reach.sum().clamp(min=torch.finfo(reach.dtype).tiny)
                births.wrote += sign * acts * weight[dim].double().cpu()
                births.written += sign * written[position, dim].item()
                births.count += 1

    def to_list(self) -> list[dict]:
        """One entry per unit and dim, those of the most massive activations first.

        `layer` (the one after the block), `unit`, `dim`; `births`, how many massive activations the block made in that
        dim; over these, `share`: what the unit wrote of what the MLP wrote to them; `activation`, its mean; `reach`,
        its mean part of sum |a_u| * ||w_u||, at least `DOMINANT`. Of its column of the down projection: `column_norm`
        and `sparsity` (`hoyer`), with `usual_sparsity`, the median over all columns of that projection.
        """
        found = []
        for (block, dim), births in sorted(self._births.items()):
            reach = births.reach / births.count
            if not (dominant := (reach >= DOMINANT).nonzero().flatten().tolist()):
                continue
            sparsity = self._sparsity[block]
            found += [
                {
                    "layer": block + 1,
                    "unit": unit,
                    "dim": dim,
                    "share": births.wrote[unit].item() / births.written if births.written else 0.0,
                    "activation": births.activation[unit].item() / births.count,
                    "column_norm": self._norms[block][unit].item(),
                    "reach": reach[unit].item(),
                    "births": births.count,
                    "sparsity": sparsity[unit].item(),
                    "usual_sparsity": sparsity.median().item(),
                }
                for unit in dominant
            ]
        return sorted(found, key=lambda entry: (-entry["births"], -abs(entry["share"])))


def hoyer(weight: torch.Tensor) -> torch.Tensor:
    """Channel sparsity of each column of `weight` (d, m): (m,), 0 all channels alike, 1 a single channel.

    (sqrt(d) - |w|_1 / |w|_2) / (sqrt(d) - 1), Hoyer 2004 (JMLR 5, section 3.1). A column of zeros has 0.
    """
    weight, root = weight.double(), weight.shape[0] ** 0.5
    length = weight.norm(dim=0)
    ratio = weight.abs().sum(dim=0) / length.clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.where(length > 0, (root - ratio) / max(root - 1, 1e-12), 0.0).cpu()


def _none(units: int) -> _Births:
    activation, reach, wrote = (torch.zeros(units, dtype=torch.float64) for _ in range(3))
    return _Births(activation, reach, wrote)
