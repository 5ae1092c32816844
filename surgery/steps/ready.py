"""Texts, or images, and gates of a run made ready, before weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..anatomy.sites import Anatomy
from ..checkpoint.provenance import TextFiles
from ..errors import SourceError
from ..live.text import Chunking
from ..progress import Reporter
from ..verification.gates.base import Inputs
from ..words import human
from .inputs import Texts, fit_chunks, gather_texts, require_inputs, room_after
from .options import RunOptions, VerifyOptions
from .pictures import Pictures, gather_images
from .plan import Plan


@dataclass(frozen=True)
class Ready:
    """Chunks of evaluation text (N, T) and of calibration text (M, T), or pixels of images, where they are read; what
    gates have ready. `files`: that were read. `pictures`: of images to evaluate on, what each is called."""

    chunking: Chunking
    evaluation: torch.Tensor | None
    calibrating: torch.Tensor | None
    gates: Mapping[str, Any]
    files: TextFiles
    pictures: tuple[str, ...] = ()


def gather(options: RunOptions | VerifyOptions, reporter: Reporter) -> Texts | Pictures:
    """The texts, or images, that were given. SourceError for both."""
    if not options.images:
        return gather_texts(options.text, options.calibration, reporter)
    if options.text:
        raise SourceError("--text is for language models, and --images for encoders; take one of them away.")
    return gather_images(options.images, options.calibration, reporter)


def make_ready(plan: Plan, texts: Texts | Pictures, options: RunOptions, reporter: Reporter) -> Ready:
    """Gates and texts made ready. SourceError where something is missing, or text too short."""
    texts = require_port(plan.anatomy, texts)
    recipe, reader, taken = plan.recipe, plan.reader, plan.changes.positions
    given = "--text" if plan.anatomy.patching is None else "--images"
    gates = recipe.verify.gates() if options.verify else ()
    for gate in gates:
        gate.require_tools(options.device)
    chunking = fit_chunks(options.chunking, plan.anatomy, max(taken, 1))
    if chunking != options.chunking:
        reporter.note(f"chunks of {chunking.length} tokens: the model has no more positions after a prefix or BOS")
    room = room_after(plan.anatomy, taken)
    inputs = Inputs(chunking, options.device, room, options.tasks, classifies(plan.anatomy))
    ready = require_inputs(gates, inputs) if options.verify else {}
    evaluation = calibrating = None
    if options.verify:
        if texts.evaluation is None:
            needs = "text: give --text FILE" if given == "--text" else "images: give --images DIR"
            raise SourceError(f"verification needs {needs}, or --no-verify to write without proof.")
        evaluation = reader.cut(texts.evaluation, chunking, given)
    _require_calibration(plan, texts)
    if recipe.searches or recipe.reads is not None or any(gate.calibrates for gate in gates):
        assert texts.calibration is not None  # half of the evaluation text, if no other was given
        sets = max((gate.calibration_sets for gate in gates), default=1)
        calibrating = reader.cut_calibration(texts.calibration, chunking, sets)
    files: TextFiles = texts.files
    pictures: tuple[str, ...] = ()
    if isinstance(texts, Pictures):
        files = texts.read(*(0 if chunks is None else len(chunks) for chunks in (evaluation, calibrating)))
        if recipe.tune is not None:  # which reads all that there are
            files = texts.read(0 if evaluation is None else len(evaluation), len(texts.calibration or ()))
        pictures = tuple(path.name for path in texts.evaluation or ())
    return Ready(chunking, evaluation, calibrating, ready, files, pictures)


def require_port(anatomy: Anatomy, texts: Texts | Pictures) -> Any:
    """`texts`. SourceError where images are given for a language model, or text for an encoder."""
    images = anatomy.patching is not None
    if isinstance(texts, Pictures) is images:
        return texts
    if isinstance(texts, Pictures):
        raise SourceError(f"{anatomy.model_type} is a language model, which reads no --images; give --text.")
    if texts.evaluation is None and texts.calibration is None:
        return Pictures(None, None)
    raise SourceError(f"{anatomy.model_type} is an encoder of images, which reads no text; give --images.")


def classifies(anatomy: Anatomy) -> bool:
    """Whether the model says what is in an image."""
    return anatomy.model_class.__name__.endswith("ForImageClassification")


def _require_calibration(plan: Plan, texts: Texts | Pictures) -> None:
    """SourceError where operations read text, and there is none that they could read."""
    recipe, images = plan.recipe, plan.anatomy.patching is not None
    if texts.calibration is not None and (images or plan.target.tokenizer is not None):
        return
    if images and (reads := recipe.reads) is not None:
        raise SourceError(f"{reads} over images: give --calibration DIR (or --images).")
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
