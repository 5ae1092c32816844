"""One pass of a model over text. Observers see hidden states, attention calls and logits, and keep what they need.

Notation: B sequences, T tokens, d hidden size, V vocabulary. Layer l = 0 is the embedding output, l = k the residual
stream after block k; the final norm's output is not a layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..anatomy.calls import Call, observing
from ..progress import Advance, unseen
from .graft import on_the_seam
from .mixing import Mixing, watching_mixers
from .model import Live
from .places import down_projections, on_layer
from .port import Batch
from .together import together


class Observer:
    """What may look at a pass. Override what you need; what is not overridden costs nothing.

    A batch passes all layers before the next comes, or all batches pass a layer before any comes to the next
    (`layerwise`): what is kept between two layers of one batch is kept by batch. At each layer batches come in order.
    """

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        """states (B, T, d): the residual stream of `layer`."""

    def attention(self, block: int, call: Call, batch: Batch) -> None:
        """One attention call, before it is computed."""

    def attended(self, block: int, call: Call, output: torch.Tensor, batch: Batch) -> None:
        """The same call with its output (B, T, Hq, E), as it goes into the output projection.

        That is the heads' sums of values, normed where the site has a head norm; `call.summed` is then what was normed.
        """

    def units(self, block: int, activations: torch.Tensor, written: torch.Tensor, batch: Batch) -> None:
        """One down projection of an MLP: activations (B, T, m) go in, written (B, T, d) comes out.

        A block without one (`down_projections`) does not call. What norms or multipliers the block puts between the
        projection and the residual stream (Gemma 2, OLMo 2, Granite) is not in `written`.
        """

    def mixed(self, block: int, mixing: Mixing, batch: Batch) -> None:
        """One call of a layer that hands a state from token to token."""

    def logits(self, logits: torch.Tensor, batch: Batch) -> None:
        """logits (B, T, V)."""

    def rows(self) -> dict[int, dict]:
        """What was found of each layer, as plain data; for observers that join in a survey."""
        return {}

    @classmethod
    def wants(cls, method: str) -> bool:
        return getattr(cls, method) is not getattr(Observer, method)


@dataclass(frozen=True)
class Reading:
    """Text to be read, `chunks` (N, T), each after `prefix`, or whatever else the model reads; and who looks on.

    `graft`: what is put into the model meanwhile, as a context manager. `what`: the words for progress. `depth`: the
    last layer that is computed, where logits are not wanted; None for all.
    """

    chunks: torch.Tensor
    observers: Sequence[Observer]
    prefix: Sequence[int] = ()
    graft: Callable[[Live], contextlib.AbstractContextManager[object]] | None = None
    what: str = ""
    depth: int | None = None


class _DeepEnough(Exception):
    """Ends a forward at the layer after which nobody looks."""


def stream(
    live: Live,
    chunks: torch.Tensor,
    observers: Sequence[Observer],
    *,
    prefix: Sequence[int] = (),
    advance: Advance = unseen,
    what: str = "",
) -> None:
    """Feed `chunks` (N, T), each after `prefix`, to the model once; `advance` is told of sequences and of `what`."""
    read(live, [Reading(chunks, observers, prefix, what=what)], advance)


@torch.inference_mode()
def read(live: Live, readings: Sequence[Reading], advance: Advance = unseen) -> None:
    """Feed the chunks of all `readings` to the model, in one pass over its weights; `advance` is told of sequences.

    Observers belong to one reading each.
    """
    if live.layers is None:
        for reading in readings:
            with contextlib.nullcontext() if reading.graft is None else reading.graft(live):
                _read([(live, reading)], advance)
        return
    with contextlib.ExitStack() as grafts:
        pairs = []
        for reading in readings:
            reader = live
            if reading.graft is not None:
                reader = grafts.enter_context(live.apart())
                grafts.enter_context(reading.graft(reader))
            pairs.append((reader, reading))
        _read(pairs, advance)


def _read(pairs: Sequence[tuple[Live, Reading]], advance: Advance) -> None:
    now: ContextVar[tuple[Reading, Batch]] = ContextVar("now")  # of whoever computes: see `together`
    jobs = [
        functools.partial(_forward, live, reading, batch, now, advance)
        for live, reading in pairs
        for batch in live.port.batches(live, reading.chunks, reading.prefix)
    ]
    with _watching(pairs, now):
        together(pairs[0][0].layers, jobs)


def _forward(
    live: Live, reading: Reading, batch: Batch, now: ContextVar[tuple[Reading, Batch]], advance: Advance
) -> None:
    """Feed `batch` to the model, and its logits to those who want them."""
    wanting = [observer for observer in reading.observers if observer.wants("logits")]
    batch = replace(batch, tokens=batch.tokens.to(live.device))
    before = now.set((reading, batch))
    try:
        logits = live.port.run(live, batch, bool(wanting))
        if logits is not None:
            for observer in wanting:
                observer.logits(logits, batch)
    except _DeepEnough:
        pass
    finally:
        now.reset(before)
    advance(len(batch.tokens), reading.what)


@contextlib.contextmanager
def _watching(pairs: Sequence[tuple[Live, Reading]], now: ContextVar[tuple[Reading, Batch]]) -> Iterator[None]:
    """Show observers what their own readings compute, in whatever order that is: `now` says which it is."""
    with contextlib.ExitStack() as stack:
        blocks: dict[int, dict[nn.Module, int]] = {}
        wants: set[str] = set()
        for live, reading in pairs:
            hidden, units, mixed, *sites = (
                [o for o in reading.observers if o.wants(method)]
                for method in ("hidden", "units", "mixed", "attention", "attended")
            )
            if hidden:
                for layer in range(len(live.anatomy.blocks) + 1):
                    stack.callback(on_layer(live, layer, _look(layer, hidden, reading, now)).remove)
            if reading.depth is not None:
                stack.callback(on_layer(live, reading.depth, _end(reading, now)).remove)
            for index, projection in down_projections(live).items() if units else ():
                stack.callback(projection.register_forward_hook(_projected(index, units, reading, now)).remove)
            if mixed:
                stack.enter_context(watching_mixers(live, _mixed(mixed, reading, now)))
            wants |= {method for method, some in zip(("attention", "attended"), sites, strict=True) if some}
            if any(sites) and id(live) not in blocks:
                blocks[id(live)] = {live.trunk.get_submodule(site.name): site.block for site in live.anatomy.sites}
                stack.enter_context(on_the_seam(live))
        if wants:
            block_of = {module: block for of_one in blocks.values() for module, block in of_one.items()}
            stack.enter_context(_observing(block_of, wants, now))
        yield


def _observing(
    block_of: Mapping[nn.Module, int], wants: Collection[str], now: ContextVar[tuple[Reading, Batch]]
) -> contextlib.AbstractContextManager[None]:
    """Attention calls, shown to the observers of the reading that makes them."""

    def before(call: Call) -> None:
        reading, batch = now.get()
        for observer in reading.observers:
            if observer.wants("attention"):
                observer.attention(block_of[call.module], call, batch)

    def after(call: Call, output: torch.Tensor) -> None:
        reading, batch = now.get()
        for observer in reading.observers:
            if observer.wants("attended"):
                observer.attended(block_of[call.module], call, output, batch)

    return observing(before, after if "attended" in wants else None)


def _look(layer: int, observers: Sequence[Observer], reading: Reading, now: ContextVar[tuple[Reading, Batch]]):
    def look(states: torch.Tensor) -> None:
        whose, batch = now.get()
        if whose is reading:
            for observer in observers:
                observer.hidden(layer, states, batch)

    return look


def _end(reading: Reading, now: ContextVar[tuple[Reading, Batch]]):
    def end(states: torch.Tensor) -> None:
        if now.get()[0] is reading:
            raise _DeepEnough

    return end


def _projected(block: int, observers: Sequence[Observer], reading: Reading, now: ContextVar[tuple[Reading, Batch]]):
    def hook(projection: nn.Module, args, output) -> None:
        whose, batch = now.get()
        activations, (rows, length) = args[0], batch.tokens.shape
        if whose is not reading or activations.numel() != rows * length * activations.shape[-1]:
            return  # not all tokens pass here: an expert's
        # Some families (OPT) put all tokens of a batch in one row.
        activations, written = (part.reshape(rows, length, -1) for part in (activations, output))
        for observer in observers:
            observer.units(block, activations, written, batch)

    return hook


def _mixed(observers: Sequence[Observer], reading: Reading, now: ContextVar[tuple[Reading, Batch]]):
    def look(block: int, mixing: Mixing) -> None:
        whose, batch = now.get()
        if whose is reading:
            for observer in observers:
                observer.mixed(block, mixing, batch)

    return look
