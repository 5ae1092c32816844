"""The edits that a survey suggests: its massive activations, super neurons and sinks, changed in the live model.

Layers, dims and units come from a survey of the same model on the same text (`interventions`). Notation and undoing are
those of `live.edits`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from ..live.edits import Change, Touched, edit_stream, hidden, intervention
from ..live.model import Live
from ..live.places import down_projections
from .massive import MassiveMeans, massive

Dims = Mapping[int, Sequence[int]]  # layer -> dims in which the survey found massive activations
AMPLIFIED = 10.0  # factor on the token that is to become a sink


# ---- scalars of the residual stream


def set_massive(live: Live, dims: Dims, means: MassiveMeans | None = None) -> Change:
    """Massive activations (Sun's criterion, in `dims` of each layer) to zero or to their means: Sun et al., section 3.

    A massive activation that `means` has not seen the like of stays as it is.
    """

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        places = _massive_places(states, dims[layer])
        if means is None:
            return places, 0.0
        flat, d = states.flatten(), states.shape[1]
        return places, flat.new_tensor([means.of(layer, p // d, p % d, flat[p].item()) for p in places.tolist()])

    return edit_stream(live, dims, pick, f"massive activations to {'zero' if means is None else 'means'}")


def zero_random(live: Live, dims: Dims, seed: int = 0) -> Change:
    """The control: of each sequence and layer as many scalars as are massive, any others, to zero."""
    source = torch.Generator().manual_seed(seed)

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, float]:
        order, places = torch.rand(states.numel(), generator=source), _massive_places(states, dims[layer])
        order[places] = -1.0
        return order.topk(len(places)).indices.to(states.device), 0.0

    return edit_stream(live, dims, pick, "random activations to zero")


def zero_median(live: Live, dims: Dims) -> Change:
    """The other control: as many scalars, those whose size is nearest to the median, to zero."""

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, float]:
        magnitude, places = states.abs().flatten(), _massive_places(states, dims[layer])
        return (magnitude - magnitude.median()).abs().topk(len(places), largest=False).indices, 0.0

    return edit_stream(live, dims, pick, "median-sized activations to zero")


def zero_largest(live: Live, layer: int, scalars: int) -> Change:
    """The `scalars` largest entries of each sequence at `layer`, massive or not, to zero."""

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, float]:
        return states.abs().flatten().topk(min(scalars, states.numel())).indices, 0.0

    return edit_stream(live, [layer], pick, f"the {scalars} largest activations of layer {layer} to zero")


def amplify(live: Live, position: int, layer: int = 0, factor: float = AMPLIFIED) -> Change:
    """Multiply the token at `position` by `factor` at `layer`, its variance by the square of it (arXiv 2605.06611).

    At the embedding output, what attention then writes to the token is small against its own part, as in a first token.
    """

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = states[position : position + 1] * factor
        return position * states.shape[1] + torch.arange(chosen.numel(), device=states.device), chosen.flatten()

    return edit_stream(live, [layer], pick, f"token {position} amplified at layer {layer}")


def _massive_places(states: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Flat places of the massive activations of states (T, d) in `dims`."""
    positions, found = massive(states.float())[0].unbind(dim=1)
    wanted = torch.isin(found, torch.tensor(list(dims), device=states.device))
    return (positions * states.shape[1] + found)[wanted]


# ---- MLPs


@contextlib.contextmanager
def zero_mlp_write(live: Live, layer: int, position: int = 0) -> Iterator[Touched]:
    """Take away what the MLP of the block before `layer` writes to the token at `position` (targeted MLP ablation).

    By its down projection; a block without one, or with several, has nothing to take away.
    """
    with intervention(f"the MLP's write to token {position} at layer {layer}") as (touched, undo):
        if (projection := down_projections(live).get(layer - 1)) is not None:
            block = live.trunk.get_submodule(live.anatomy.blocks[layer - 1])
            shape: list[int] = []

            def entering(_, args, kwargs):
                shape[:] = (args[0] if args else kwargs["hidden_states"]).shape[-3:-1]

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
def silence_units(live: Live, units: Mapping[int, Collection[int]]) -> Iterator[Touched]:
    """Set MLP units to zero at every token; `units` maps a layer to those of the block before it."""
    with intervention("MLP units to zero") as (touched, undo):
        projections = down_projections(live)
        for layer, silent in units.items():
            if silent and layer - 1 in projections:

                def entering(_, args, silent=tuple(silent)):
                    activations = args[0].clone()
                    activations[..., silent] = 0.0
                    touched.count += activations[..., silent].numel()
                    return (activations, *args[1:])

                undo.callback(projections[layer - 1].register_forward_pre_hook(entering).remove)
        yield touched


# ---- attention


def mask_first(live: Live) -> Change:
    """Hide token 0 from every later one. Token 1 then sees only itself, as token 0 did: the sink may move there."""
    return hidden(live, lambda query, key: (query > 0) & (key == 0), "attention to position 0 masked")


def isolate(live: Live, position: int) -> Change:
    """Hide every earlier token from the one at `position`, as they are from a first token (arXiv 2605.06611)."""

    def hides(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query == position) & (key < position)

    return hidden(live, hides, f"token {position} isolated")
