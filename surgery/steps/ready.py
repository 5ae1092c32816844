"""Texts, or files for an encoder, and gates of a run made ready, before weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..anatomy.classes import auto_of
from ..anatomy.sites import Anatomy
from ..checkpoint.provenance import TextFiles
from ..errors import SourceError
from ..live.text import Chunking
from ..progress import Reporter
from ..tuning.corpus import require_images
from ..verification.gates.base import Inputs
from ..words import human
from .inputs import Cutter, Texts, calibrated, fit_chunks, gather_texts, require_inputs, room_after, taken_by
from .options import RunOptions, VerifyOptions
from .pictures import FileReader, Pictures, gather_images
from .plan import Plan
from .recordings import Recordings, gather_audio


@dataclass(frozen=True)
class Ready:
    """Chunks of evaluation text (N, T) and of calibration text (M, T), or what an encoder reads, where they are read;
    what gates have ready. `files`: that were read, and the `reader` that did. `pictures`: of images to evaluate on,
    what each is called."""

    chunking: Chunking
    evaluation: torch.Tensor | None
    calibrating: torch.Tensor | None
    gates: Mapping[str, Any]
    files: TextFiles
    reader: Cutter
    pictures: tuple[str, ...] = ()


_NEEDS = {
    "--text": "text: give --text FILE", "--images": "images: give --images DIR",
    "--audio": "recordings: give --audio DIR",
}  # fmt: skip


def gather(options: RunOptions | VerifyOptions, reporter: Reporter) -> Texts | Pictures:
    """The texts, images or recordings that were given. SourceError for several of them."""
    require_one_kind(text=options.text, images=options.images, audio=options.audio)
    if options.images:
        return gather_images(options.images, options.calibration, reporter)
    if options.audio:
        return gather_audio(options.audio, options.calibration, reporter)
    return gather_texts(options.text, options.calibration, reporter)


def require_one_kind(**given: Sequence[Path]) -> None:
    """SourceError where there is something of several kinds, by the names of their options."""
    asked = [option for option, files in given.items() if files]
    if len(asked) > 1:
        of = {"text": "language models", "images": "encoders", "audio": "encoders of sound"}
        first, second = asked[:2]
        raise SourceError(f"--{first} is for {of[first]}, and --{second} for {of[second]}; take one of them away.")


def make_ready(plan: Plan, texts: Texts | Pictures, options: RunOptions, reporter: Reporter) -> Ready:
    """Gates and texts made ready. SourceError where something is missing, or text too short."""
    texts = require_port(plan.anatomy, texts)
    recipe, reader, taken = plan.recipe, plan.reader, plan.changes.positions
    given = f"--{plan.anatomy.reads}"
    gates = recipe.verify.gates() if options.verify else ()
    for gate in gates:
        gate.require_tools(options.device)
    chunking = fit_chunks(options.chunking, plan.anatomy, taken_by(plan.anatomy, taken))
    if chunking != options.chunking:
        after = " after a prefix or BOS" if taken_by(plan.anatomy, taken) else ""
        reporter.note(f"chunks of {chunking.length} tokens: the model has no more positions{after}")
    room = room_after(plan.anatomy, taken)
    inputs = Inputs(chunking, options.device, room, options.tasks, classifies(plan.anatomy))
    ready = require_inputs(gates, inputs) if options.verify else {}
    evaluation = calibrating = None
    sets = max((gate.calibration_sets for gate in gates), default=1)
    if isinstance(texts, Pictures) and isinstance(reader, FileReader):
        # Tuning reads all that there are to calibrate on.
        fitted = calibrated(chunking, sets) if recipe.tune is None else len(texts.calibration or ())
        reader = reader.over(texts.first(chunking.count if options.verify else 0, fitted), reporter)
    if options.verify:
        if texts.evaluation is None:
            raise SourceError(f"verification needs {_NEEDS[given]}, or --no-verify to write without proof.")
        evaluation = reader.cut(texts.evaluation, chunking, given)
    _require_calibration(plan, texts)
    if recipe.searches or recipe.reads is not None or any(gate.calibrates for gate in gates):
        assert texts.calibration is not None  # half of the evaluation text, if no other was given
        # What tuning is judged on, the last of them, is not what means are taken over.
        held = 0
        if recipe.tune is not None and isinstance(texts, Pictures):
            held, whose = recipe.tune.held_out, f"every other one of {given}" if texts.split else "--calibration"
            require_images(len(texts.calibration), recipe.tune, whose)
        calibrating = reader.cut_calibration(texts.calibration[: -held or None], chunking, sets)
    files: TextFiles = texts.files
    pictures: tuple[str, ...] = ()
    if isinstance(texts, Pictures):
        files = texts.read(*(0 if chunks is None else len(chunks) for chunks in (evaluation, calibrating)))
        if recipe.tune is not None:  # which reads all that there are
            files = texts.read(0 if evaluation is None else len(evaluation), len(texts.calibration or ()))
        pictures = tuple(path.name for path in texts.evaluation or ())
    return Ready(chunking, evaluation, calibrating, ready, files, reader, pictures)


def require_port(anatomy: Anatomy, texts: Texts | Pictures) -> Any:
    """`texts`. SourceError where they are not what the model reads, as images for a language model."""
    reads = anatomy.reads
    option = texts.option if isinstance(texts, Pictures) else "--text"
    if option == f"--{reads}":
        return texts
    if reads != "text" and isinstance(texts, Texts) and texts.evaluation is None and texts.calibration is None:
        return Pictures(None, None) if reads == "images" else Recordings(None, None)
    of = {"text": "a language model", "images": "an encoder of images", "audio": "an encoder of sound"}[reads]
    of = of if anatomy.patching is None or reads != "text" else "an encoder of text"
    given = "text" if option == "--text" else option
    raise SourceError(f"{anatomy.model_type} is {of}, which reads no {given}; give --{reads}.")


def classifies(anatomy: Anatomy) -> bool:
    """Whether the model says what is in an image, in a recording or in a text."""
    return anatomy.patching is not None and auto_of(anatomy.model_class, anatomy.config_class) in (
        "AutoModelForImageClassification", "AutoModelForAudioClassification", "AutoModelForSequenceClassification"
    )  # fmt: skip


def _require_calibration(plan: Plan, texts: Texts | Pictures) -> None:
    """SourceError where operations read text, and there is none that they could read."""
    recipe, patching = plan.recipe, plan.anatomy.patching
    of_text = plan.anatomy.reads == "text"
    if texts.calibration is not None and (not of_text or plan.target.tokenizer is not None):
        return
    if patching is not None and not of_text and (reads := recipe.reads) is not None:
        option = f"--{plan.anatomy.reads}"
        raise SourceError(f"{reads} over {patching.called.many}: give {option} DIR, and others with --calibration.")
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
