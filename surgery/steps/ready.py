"""Texts and gates of a run made ready, before weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SourceError
from ..live.text import Chunking
from ..progress import Reporter
from ..verification.gates.base import Inputs
from ..words import human
from .inputs import Texts, fit_chunks, require_inputs, room_after
from .options import RunOptions
from .plan import Plan
from .recipe import Recipe


@dataclass(frozen=True)
class Ready:
    """Chunks of evaluation text (N, T) and of calibration text (M, T), where they are read; what gates have ready."""

    chunking: Chunking
    evaluation: torch.Tensor | None
    calibrating: torch.Tensor | None
    gates: Mapping[str, Any]


def make_ready(plan: Plan, texts: Texts, options: RunOptions, reporter: Reporter) -> Ready:
    """Gates and texts made ready. SourceError where something is missing, or text too short."""
    recipe, reader, taken = plan.recipe, plan.reader, plan.changes.positions
    gates = recipe.verify.gates() if options.verify else ()
    for gate in gates:
        gate.require_tools(options.device)
    chunking = fit_chunks(options.chunking, plan.anatomy, max(taken, 1))
    if chunking != options.chunking:
        reporter.note(f"chunks of {chunking.length} tokens: the model has no more positions after a prefix or BOS")
    room = room_after(plan.anatomy, taken)
    ready = require_inputs(gates, Inputs(chunking, options.device, room, options.tasks)) if options.verify else {}
    evaluation = calibrating = None
    if options.verify:
        if texts.evaluation is None:
            raise SourceError("verification needs text: give --text FILE, or --no-verify to write without proof.")
        evaluation = reader.cut(texts.evaluation, chunking, "--text")
    _require_calibration(recipe, texts, reader.tokenizer)
    if recipe.searches or recipe.reads is not None or any(gate.calibrates for gate in gates):
        assert texts.calibration is not None  # half of the evaluation text, if no other was given
        sets = max((gate.calibration_sets for gate in gates), default=1)
        calibrating = reader.cut_calibration(texts.calibration, chunking, sets)
    return Ready(chunking, evaluation, calibrating, ready)


def _require_calibration(recipe: Recipe, texts: Texts, tokenizer: object) -> None:
    """SourceError where operations read text, and there is none that they could read."""
    if texts.calibration is not None and tokenizer is not None:
        return
    if recipe.searches:
        raise SourceError(
            "prefix: auto is searched on text: give --calibration FILE (or --text) and a tokenizer, or list the prefix "
            "in the recipe."
        )
    if (reads := recipe.reads) is not None:
        raise SourceError(f"{reads} on text: give --calibration FILE (or --text), and a model with a tokenizer.")


def say_notes(plan: Plan, options: RunOptions, reporter: Reporter) -> None:
    """Say what there is to know of the plan: how tensors fit the model, and that it comes layer by layer where it does.

    NoSpace where it does not fit into memory, and cannot come so.
    """
    for note in plan.notes:
        reporter.note(note)
    if plan.resident:
        return
    found = plan.memory()
    reporter.note(
        f"{plan.source.name} comes layer by layer: all of it would take {human(found['resident'])} of memory, and "
        f"{human(found['allowed'])} may be taken"
    )
