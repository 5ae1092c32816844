"""Edits: change a few scalars or attention weights of a live model, and undo it.

Each is a context manager that yields `Touched`; what the model computes while it is open is changed. One that has
touched nothing at its end raises TouchedNothing.

Notation: B sequences, T tokens, d hidden size. Layer l is the stream after block l - 1, 0 the embedding output; tokens
are counted from the first that is fed, so feed no prefix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..anatomy.calls import Call, rewriting
from ..errors import SurgeryError
from .graft import on_the_seam
from .model import Live
from .places import on_layer, slot_count


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
def edit_stream(live: Live, layers: Iterable[int], pick: Callable, what: str) -> Iterator[Touched]:
    """For each sequence, at each of `layers`, what `pick(layer, states (T, d))` says: flat places and new values."""
    with intervention(what) as (touched, undo):
        for layer in layers:

            def change(states: torch.Tensor, layer: int = layer) -> torch.Tensor:
                changed = states.clone().flatten(1)
                for sequence, row in enumerate(states):
                    places, values = pick(layer, row)
                    changed[sequence, places] = values
                    touched.count += len(places)
                return changed.view_as(states)

            undo.callback(on_layer(live, layer, change, first=True).remove)
        yield touched


Change = contextlib.AbstractContextManager[Touched]


@contextlib.contextmanager
def hidden(live: Live, hides: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], what: str) -> Iterator[Touched]:
    """No site sees a key at a query where `hides` says so; slots stay visible.

    `hides` gets positions of queries (T, 1) and of keys (1, S), counted from the first token that is fed. It is asked
    at each site, not where masks are made: from these, sites with ALiBi tell how much of a row is padding.
    """
    n = 0 if live.anatomy.sees_all else slot_count(live)  # of an encoder masks have no columns for slots
    with intervention(what) as (touched, undo):

        def change(call: Call) -> Call:
            queries, keys, device = call.query.shape[2], call.key.shape[2], call.key.device
            mask, offset = call.mask, keys - queries
            if mask is None:  # plain causal, or none at all: left to the kernel
                mask = torch.ones(queries, n + keys, dtype=torch.bool, device=device)[None, None]
                mask = mask.tril(n + offset) if call.causal else mask
            hide = hides(torch.arange(offset, keys, device=device)[:, None], torch.arange(keys, device=device)[None])
            hide, low = F.pad(hide, (n, 0)), 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            touched.count += int(((mask > low) & hide).sum()) * len(call.query) // len(mask)
            return replace(call, mask=mask.masked_fill(hide, low))

        undo.enter_context(on_the_seam(live))
        undo.enter_context(rewriting(change))
        yield touched
