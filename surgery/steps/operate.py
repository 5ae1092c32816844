"""Everything in a run that changes the live model: it is loaded once, and let go when this is done."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import DamagedCheckpoint
from ..live.loading import live_original
from ..live.memory import Place
from ..live.model import Live
from ..live.placed import require_places
from ..live.port import Images, port_of
from ..live.quantised import loaded_linears
from ..live.roundings import rounds_values, steady
from ..operations.base import Changes, Fitting, Once, Operation, Parts
from ..progress import Reporter
from ..verification.alike import random_features, require_alike
from ..verification.equivalence import Equivalence, compare_random_ids, take_control
from .plan import Plan


@dataclass(frozen=True)
class Operated:
    """What came out of the original while it was loaded.

    `parts` by operation; `changes`: what is done, now that everything is fitted; `tensors`: what is added and changed,
    by name in the causal language model, on the CPU.
    """

    parts: Mapping[str, Parts]
    changes: Changes
    tensors: Mapping[str, torch.Tensor]
    random_ids: Equivalence | None

    def said(self, plan: Plan) -> dict[str, Any]:
        """What the operations have to say in the verdict."""
        said: dict[str, Any] = {}
        for change in plan.recipe.changes:
            said |= change.found(self.parts[change.name], plan.target.tokenizer)
        return said

    def without_tensors(self, plan: Plan) -> Operated:
        """The same, once they are written: what is left is small."""
        parts = {change.name: change.remembered(self.parts[change.name]) for change in plan.recipe.changes}
        return replace(self, parts=parts, tensors={})


def operate(
    plan: Plan, directory: Path, chunks: torch.Tensor | None, training: Any, place: Place, reporter: Reporter,
    once: Once,
) -> Operated:  # fmt: skip
    """Load the original from `directory`; fit and graft each operation in its order; compare; collect the tensors.

    chunks (M, T): calibration text, or what an encoder reads, None where there is none. UnsupportedModel where the
    model with all of its exact operations in place is not the original after the same prefix: nothing is written then.
    """
    reporter.step("load the original")
    port = port_of(plan.anatomy, chunks)
    live = live_original(directory, plan.anatomy, place, plan.fitting_dtype, port)
    if live.layers is None:  # layer by layer each is looked at when it comes
        _require_finite(live)
    if chunks is not None and not port.predicts:
        require_places(live, chunks)
    changes = plan.recipe.changes
    if plan.recipe.rounds_linears:
        loaded_linears(live)  # weights that are offloaded are refused before the work begins
    for change in changes:
        change.require(live)
    parts: dict[str, Parts] = {}
    random_ids: Equivalence | None = None
    gate = max(change.opens for change in changes)
    with contextlib.ExitStack() as grafts:
        grafts.enter_context(steady(live.model))
        for change in changes:
            if change is plan.recipe.tune:
                parts = _in_float32(live, changes, parts)
            planned = plan.by_operation[change.name]
            fitting = Fitting(plan.target, planned, chunks, reporter, {**parts}, training, gate, directory, once)
            part = parts[change.name] = change.fit(live, fitting)
            if not port.predicts:
                prefix = change.plan(plan.target, part).prefix or ()
                grafts.enter_context(_grafted_alike(live, change, part, prefix, reporter))
                continue
            if change is changes[0]:  # the model is still as it came; only the first can stand for a prefix
                prefix = change.plan(plan.target, part).prefix or ()
                control = take_control(live, prefix, comparable(live, changes))
            grafts.enter_context(change.graft(live, part))
            if change is _last_exact(changes):
                reporter.step("compare with the original on random token ids")
                random_ids = compare_random_ids(live, control)
        if plan.recipe.tune is not None:
            parts = {change.name: change.held(live, parts[change.name]) for change in changes}
        tensors = collect(live, changes, parts)
    del live
    gc.collect()
    return Operated(parts, plan.final(parts), tensors, random_ids)


def _in_float32(live: Live, changes: Sequence[Operation], parts: Mapping[str, Parts]) -> dict[str, Parts]:
    """The model, with all that is in it, in float32, which training takes; and the parts that are in it."""
    if not rounds_values(live.model):
        return {**parts}
    for tensor in (*live.model.parameters(), *live.model.buffers()):
        if tensor.dtype == torch.float64:
            tensor.data = tensor.data.float()
    return {change.name: change.held(live, parts[change.name]) for change in changes if change.name in parts}


@contextlib.contextmanager
def _grafted_alike(
    live: Live, change: Operation, part: Parts, prefix: Sequence[int], reporter: Reporter
) -> Iterator[None]:  # fmt: skip
    """An encoder with `change` in place, which is compared with what it was before, where that is to be the same; after
    the `prefix` that is folded."""
    same = change.exact != "no" or change.rests
    before = random_features(live, prefix) if same else None
    with change.graft(live, part):
        if before is not None:
            assert isinstance(live.port, Images)
            reporter.step(f"compare on random {live.port.called.many}, before and after {change.name}")
            require_alike(live, before, change.name)
        yield


def _last_exact(changes: Sequence[Operation]) -> Operation:
    """After which the model in memory is still to be the original's function."""
    return [change for change in changes if change.exact != "no" or change.rests][-1]


def comparable(live: Live, changes: Sequence[Operation]) -> Callable[[int], bool]:
    """Whether the model with `changes` is to be the original's function on so many tokens."""
    exact = [change for change in changes if change.exact != "no"]
    return lambda length: all(change.exact_on(live.model.config, length) for change in exact)


def collect(live: Live, changes: Sequence[Operation], parts: Mapping[str, Parts]) -> dict[str, torch.Tensor]:
    """What is added and changed, in main memory; of a tensor that several change, the last counts."""
    tensors = {}
    for change in changes:
        for name, tensor in change.tensors(live, parts[change.name]).items():
            tensors[name] = tensor.detach().cpu()
    return tensors


def _require_finite(live: Live) -> None:
    for name, tensor in live.model.named_parameters():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise DamagedCheckpoint(
                f"{name} of the source holds NaN or Inf, so nothing computed from it would mean anything; restore it."
            )
