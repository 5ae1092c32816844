"""Super neurons: the few MLP units that write a massive activation (arXiv 2605.06611); and how to go without them.

A block's MLP writes a_u * w_u to the stream for each intermediate unit u: its activation times its column of the down
projection. Where a block makes a massive activation (Sun et al. 2024), few of these products are most of the write.

Notation: B sequences, T tokens, d hidden size, m units. Layer l is the stream after block l - 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..anatomy.sites import Anatomy
from ..errors import SurgeryError
from .massive import MIN_MAGNITUDE, massive
from .stream import Batch, Observer, down_projections

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

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self._projections = down_projections(model, anatomy)
        self._norms: dict[int, torch.Tensor] = {}  # block -> (m,)
        self._births: dict[tuple[int, int], _Births] = {}  # block, dim
        self._before: torch.Tensor | None = None
        self._units: tuple[torch.Tensor, torch.Tensor] | None = None

    def units(self, block: int, activations: torch.Tensor, written: torch.Tensor, batch: Batch) -> None:
        self._units = activations, written

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        before, units = self._before, self._units
        self._before, self._units = states, None
        if units is not None:
            for row in zip(before, states, *units, strict=True):
                self._row(layer - 1, *(part[batch.lead :] for part in row))

    def _row(self, block: int, before, states, activations, written) -> None:
        """One sequence: before, states, written (T, d), activations (T, m)."""
        positions, dims = (states.abs() >= MIN_MAGNITUDE).nonzero(as_tuple=True)  # few, and the median is dear
        values = states[positions, dims]
        new = (values - before.to(states.device)[positions, dims]).abs() >= GROWTH * values.abs()
        if not new.any():
            return
        new &= massive(states.float())[0][positions, dims]
        if not new.any():
            return
        with align_module_device(self._projections[block]):  # a weight that accelerate keeps elsewhere comes back
            weight = _columns(self._projections[block])
            if block not in self._norms:
                self._norms[block] = weight.double().norm(dim=0).cpu()
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
        for (block, dim), births in self._births.items():
            reach = births.reach / births.count
            if not (dominant := (reach >= DOMINANT).nonzero().flatten().tolist()):
                continue
            with align_module_device(self._projections[block]):
                sparsity = hoyer(_columns(self._projections[block]))
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


class MassiveMeans(Observer):
    """Mean massive activation by layer and dim, of the first tokens of texts and of later ones."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int, bool], tuple[float, int]] = {}

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        for row in states[:, batch.lead :]:
            if row.abs().max() >= MIN_MAGNITUDE:  # the median in the criterion is dear
                for position, dim in massive(row.float())[0].nonzero().tolist():
                    total, count = self._sums.get((layer, dim, position == 0), (0.0, 0))
                    self._sums[layer, dim, position == 0] = total + row[position, dim].item(), count + 1

    def of(self, layer: int, position: int, dim: int, otherwise: float) -> float:
        total, count = self._sums.get((layer, dim, position == 0), (otherwise, 1))
        return total / count


def hoyer(weight: torch.Tensor) -> torch.Tensor:
    """Channel sparsity of each column of `weight` (d, m): (m,), 0 all channels alike, 1 a single channel.

    (sqrt(d) - |w|_1 / |w|_2) / (sqrt(d) - 1), Hoyer 2004 (JMLR 5, section 3.1). A column of zeros has 0.
    """
    weight, root = weight.double(), weight.shape[0] ** 0.5
    length = weight.norm(dim=0)
    ratio = weight.abs().sum(dim=0) / length.clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.where(length > 0, (root - ratio) / max(root - 1, 1e-12), 0.0).cpu()


def _none(units: int) -> _Births:
    return _Births(*(torch.zeros(units, dtype=torch.float64) for _ in range(3)))


def _columns(projection: nn.Module) -> torch.Tensor:
    """The weight as (d, m), one column per unit."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight


# ---- interventions: context managers that change a live model and undo it


class TouchedNothing(SurgeryError):
    """An intervention that changed nothing, and so shows nothing."""


@dataclass
class Touched:
    """How many scalars (or attention weights) an intervention has changed so far."""

    count: int = 0


@contextlib.contextmanager
def intervention(what: str) -> Iterator[tuple[Touched, contextlib.ExitStack]]:
    """What is put on the stack is undone at the end; TouchedNothing if nothing was counted until then."""
    touched = Touched()
    with contextlib.ExitStack() as undo:
        yield touched, undo
    if not touched.count:
        raise TouchedNothing(
            f"the intervention ({what}) touched nothing on this model and text, so it would show nothing; take layers, "
            "dims and units from a survey of the same model on the same text, or leave it out."
        )


def on_layer(
    trunk: nn.Module, blocks: Sequence[str], layer: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> RemovableHandle:
    """Hook `change` of states (B, T, d) into the stream at `layer`, in front of whatever already looks at it there."""

    def leaving(block, args, output):
        if isinstance(output, (tuple, list)):  # OpenAI GPT gives a list
            return type(output)((change(output[0]), *output[1:]))
        return change(output)

    def entering(block, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    if layer:
        return trunk.get_submodule(blocks[layer - 1]).register_forward_hook(leaving, prepend=True)
    return trunk.get_submodule(blocks[0]).register_forward_pre_hook(entering, with_kwargs=True, prepend=True)


@contextlib.contextmanager
def edit_stream(
    model: PreTrainedModel, anatomy: Anatomy, layers: Sequence[int], pick: Callable, what: str
) -> Iterator[Touched]:
    """For each sequence, at each of `layers`, what `pick(layer, states (T, d))` says: flat places and new values."""
    trunk = model.get_submodule(anatomy.trunk)
    with intervention(what) as (touched, undo):
        for layer in layers:

            def change(states: torch.Tensor, layer: int = layer) -> torch.Tensor:
                changed = states.clone().flatten(1)
                for sequence, row in enumerate(states):
                    places, values = pick(layer, row)
                    changed[sequence, places] = values
                    touched.count += len(places)
                return changed.view_as(states)

            undo.callback(on_layer(trunk, anatomy.blocks, layer, change).remove)
        yield touched


@contextlib.contextmanager
def zero_mlp_write(model: PreTrainedModel, anatomy: Anatomy, layer: int, position: int = 0) -> Iterator[Touched]:
    """Take away what the MLP of the block before `layer` writes to the token at `position` (targeted MLP ablation).

    By its down projection; a block without one, or with several, has nothing to take away.
    """
    with intervention(f"the MLP's write to token {position} at layer {layer}") as (touched, undo):
        if (projection := down_projections(model, anatomy).get(layer - 1)) is not None:
            block = model.get_submodule(anatomy.trunk).get_submodule(anatomy.blocks[layer - 1])
            shape: list[int] = []

            def entering(_, args, kwargs):
                shape[:] = (args[0] if args else kwargs["hidden_states"]).shape[:2]

            def leaving(_, args, output):
                if output.numel() != shape[0] * shape[1] * output.shape[-1] or position >= shape[1]:
                    return None  # not every token passes here: one of several experts
                written = output.reshape(*shape, -1).clone()  # OPT: all tokens of a batch in one row
                written[:, position] = 0.0
                touched.count += written[:, position].numel()
                return written.view_as(output)

            undo.callback(block.register_forward_pre_hook(entering, with_kwargs=True, prepend=True).remove)
            undo.callback(projection.register_forward_hook(leaving, prepend=True).remove)
        yield touched


@contextlib.contextmanager
def silence_units(model: PreTrainedModel, anatomy: Anatomy, units: Mapping[int, Sequence[int]]) -> Iterator[Touched]:
    """Set MLP units to zero at every token; `units` maps a layer to those of the block before it."""
    with intervention("MLP units to zero") as (touched, undo):
        projections = down_projections(model, anatomy)
        for layer, silent in units.items():
            if silent and layer - 1 in projections:

                def entering(_, args, silent=tuple(silent)):
                    activations = args[0].clone()
                    activations[..., silent] = 0.0
                    touched.count += activations[..., silent].numel()
                    return (activations, *args[1:])

                undo.callback(projections[layer - 1].register_forward_pre_hook(entering).remove)
        yield touched
