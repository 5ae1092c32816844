"""Edits: change a few scalars or attention weights of a live model, and undo it.

Each is a context manager that yields `Touched`; what the model computes while it is open is changed. One that has
touched nothing at its end raises TouchedNothing. Layers, dims and units come from a survey of the same model on the
same text (`interventions`).

Notation: B sequences, T tokens, d hidden size. Layer l is the stream after block l - 1, 0 the embedding output; tokens
are counted from the first that is fed, so feed no prefix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..anatomy.probe import Call, rewriting
from ..anatomy.seam import on_the_seam
from ..anatomy.sites import Anatomy
from ..errors import SurgeryError
from .massive import MassiveMeans, massive
from .stream import down_projections, on_layer, slot_count

Dims = Mapping[int, Sequence[int]]  # layer -> dims in which the survey found massive activations
AMPLIFIED = 10.0  # factor on the token that is to become a sink


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

            undo.callback(on_layer(trunk, anatomy.blocks, layer, change, first=True).remove)
        yield touched


Change = contextlib.AbstractContextManager[Touched]


# ---- scalars of the residual stream


def set_massive(model: PreTrainedModel, anatomy: Anatomy, dims: Dims, means: MassiveMeans | None = None) -> Change:
    """Massive activations (Sun's criterion, in `dims` of each layer) to zero or to their means: Sun et al., section 3.

    A massive activation that `means` has not seen the like of stays as it is.
    """

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        places = _massive_places(states, dims[layer])
        if means is None:
            return places, 0.0
        flat, d = states.flatten(), states.shape[1]
        return places, flat.new_tensor([means.of(layer, *divmod(p, d), flat[p].item()) for p in places.tolist()])

    return edit_stream(model, anatomy, dims, pick, f"massive activations to {'zero' if means is None else 'means'}")


def zero_random(model: PreTrainedModel, anatomy: Anatomy, dims: Dims, seed: int = 0) -> Change:
    """The control: of each sequence and layer as many scalars as are massive, any others, to zero."""
    source = torch.Generator().manual_seed(seed)

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, float]:
        order, places = torch.rand(states.numel(), generator=source), _massive_places(states, dims[layer])
        order[places] = -1.0
        return order.topk(len(places)).indices.to(states.device), 0.0

    return edit_stream(model, anatomy, dims, pick, "random activations to zero")


def zero_median(model: PreTrainedModel, anatomy: Anatomy, dims: Dims) -> Change:
    """The other control: as many scalars, those whose size is nearest to the median, to zero."""

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, float]:
        magnitude, places = states.abs().flatten(), _massive_places(states, dims[layer])
        return (magnitude - magnitude.median()).abs().topk(len(places), largest=False).indices, 0.0

    return edit_stream(model, anatomy, dims, pick, "median-sized activations to zero")


def zero_largest(model: PreTrainedModel, anatomy: Anatomy, layer: int, scalars: int) -> Change:
    """The `scalars` largest entries of each sequence at `layer`, massive or not, to zero."""

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, float]:
        return states.abs().flatten().topk(min(scalars, states.numel())).indices, 0.0

    return edit_stream(model, anatomy, [layer], pick, f"the {scalars} largest activations of layer {layer} to zero")


def amplify(
    model: PreTrainedModel, anatomy: Anatomy, position: int, layer: int = 0, factor: float = AMPLIFIED
) -> Change:
    """Multiply the token at `position` by `factor` at `layer`, its variance by the square of it (arXiv 2605.06611).

    At the embedding output, what attention then writes to the token is small against its own part, as in a first token.
    """

    def pick(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = states[position : position + 1] * factor
        return position * states.shape[1] + torch.arange(chosen.numel(), device=states.device), chosen.flatten()

    return edit_stream(model, anatomy, [layer], pick, f"token {position} amplified at layer {layer}")


def _massive_places(states: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Flat places of the massive activations of states (T, d) in `dims`."""
    positions, found = massive(states.float())[0].unbind(dim=1)
    wanted = torch.isin(found, torch.tensor(list(dims), device=states.device))
    return (positions * states.shape[1] + found)[wanted]


# ---- MLPs


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


# ---- attention


def mask_first(model: PreTrainedModel, anatomy: Anatomy) -> Change:
    """Hide token 0 from every later one. Token 1 then sees only itself, as token 0 did: the sink may move there."""
    return hidden(model, anatomy, lambda query, key: (query > 0) & (key == 0), "attention to position 0 masked")


def isolate(model: PreTrainedModel, anatomy: Anatomy, position: int) -> Change:
    """Hide every earlier token from the one at `position`, as they are from a first token (arXiv 2605.06611)."""

    def hides(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query == position) & (key < position)

    return hidden(model, anatomy, hides, f"token {position} isolated")


@contextlib.contextmanager
def hidden(
    model: PreTrainedModel, anatomy: Anatomy, hides: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], what: str
) -> Iterator[Touched]:
    """No site sees a key at a query where `hides` says so; slots stay visible.

    `hides` gets positions of queries (T, 1) and of keys (1, S), counted from the first token that is fed. It is asked
    at each site, not where masks are made: from these, sites with ALiBi tell how much of a row is padding.
    """
    n = slot_count(model, anatomy)
    with intervention(what) as (touched, undo):

        def change(call: Call) -> Call:
            queries, keys, device = call.query.shape[2], call.key.shape[2], call.key.device
            mask, offset = call.mask, keys - queries
            if mask is None:  # plain causal, left to the kernel
                mask = torch.ones(queries, n + keys, dtype=torch.bool, device=device).tril(n + offset)[None, None]
            hide = hides(torch.arange(offset, keys, device=device)[:, None], torch.arange(keys, device=device)[None])
            hide, low = F.pad(hide, (n, 0)), 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            touched.count += int(((mask > low) & hide).sum()) * len(call.query) // len(mask)
            return replace(call, mask=mask.masked_fill(hide, low))

        undo.enter_context(on_the_seam(model, anatomy))
        undo.enter_context(rewriting(change))
        yield touched
