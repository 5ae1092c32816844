"""What the recipe's `tune` needs before weights are read, and the part of the processes that help with it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list

from ..anatomy.stored import stored_value
from ..checkpoint.disk import require_target
from ..checkpoint.results import require_apart, require_result_folder
from ..errors import SourceError
from ..live.loading import load_original
from ..live.model import Live
from ..live.text import Chunking
from ..operations.registers import Registers
from ..tuning.corpus import Corpus, make_corpus, make_image_corpus, require_images
from ..tuning.dataset import dataset_text
from ..tuning.operation import Tune
from ..tuning.store import Store
from ..tuning.tune import Training, make_accelerator, moved, require_shares, tune
from .inputs import Reader, Texts, WholeReader
from .options import RunOptions
from .pictures import Pictures
from .plan import Plan
from .ready import Ready


def prepare_training(
    plan: Plan, texts: Texts | Pictures, ready: Ready, options: RunOptions, out: Path
) -> Training | None:  # fmt: skip
    """All that can be refused before weights are read; None for a recipe that does not tune. `ready`: what the rest of
    the recipe reads."""
    settings, processes = plan.recipe.tune, int(os.environ.get("WORLD_SIZE", "1"))
    if settings is None:
        _require_no_tuning(options, processes)
        return None
    adapter, source = options.adapter, plan.source.root
    outputs = [path for path in (out, options.keep_failed) if path is not None]
    if adapter is not None:
        require_target(adapter, source if source.is_dir() else None)
        require_apart(adapter, "--adapter", outputs)
    if processes > 1 and options.device == "auto":
        raise SourceError("each of several processes holds the whole model, on its device; give --device cuda or cpu.")
    _require_trainable(plan, settings)
    if plan.anatomy.patching is None:
        assert isinstance(texts, Texts)
        corpus = _of_text(plan, texts, settings, ready)
    elif processes > 1:
        raise SourceError(f"{processes} processes were started, and an encoder is tuned by one alone; start one.")
    else:
        corpus = _of_encoder(texts, ready, settings)
    accelerator = make_accelerator(options.device)
    require_shares(settings, accelerator.num_processes)
    store = None
    if options.tuning is not None:
        store = Store(options.tuning, _identity(plan, corpus, ready.calibrating))
        if accelerator.is_main_process:  # the only one to write there
            require_result_folder(
                options.tuning, "--tuning", [source, *outputs, *([] if adapter is None else [adapter])]
            )
            store.load()
    device = options.device if processes == 1 else str(accelerator.device)
    stored = functools.partial(stored_value, plan.source.layout, plan.anatomy)
    return Training(corpus, accelerator, device, store, adapter, stored, plan.source.name)


def _require_trainable(plan: Plan, settings: Tune) -> None:
    """SourceError where nothing is added that learns, or LoRA would learn beside what an operation does to inputs."""
    if settings.lora is None and not plan.changes.trains:
        raise SourceError(
            "tune has nothing to train, as no operation of the recipe adds what can learn; add attention_bias, "
            "head_norm or tune.lora."
        )
    if settings.lora is not None and any(isinstance(change, Registers) for change in plan.recipe.changes):
        raise SourceError(
            "tune.lora cannot learn in layers whose inputs 'registers' changes; leave one of the two out of the recipe."
        )


def _of_text(plan: Plan, texts: Texts, settings: Tune, ready: Ready) -> Corpus:
    _require_room(plan, settings)
    read = texts.calibration if settings.dataset is None else (dataset_text(settings.dataset),)
    assert read is not None  # where it is not given, calibration text has been refused
    reader, chunking = ready.reader, ready.chunking
    assert isinstance(reader, Reader)
    return make_corpus(reader.every(read, max(settings.length, chunking.length)), settings, chunking.length)


def _of_encoder(texts: Texts | Pictures, ready: Ready, settings: Tune) -> Corpus:
    """All that was given to calibrate on, in memory: files as the encoder reads them, or whole texts."""
    given, reader = texts.calibration, ready.reader
    assert given is not None  # or it has been refused
    if isinstance(reader, WholeReader):
        rows = reader.rows(cast(Sequence[str], given), ready.chunking)
        fitted = 0 if ready.calibrating is None else len(ready.calibrating)
        require_images(len(rows), settings, "the calibration text", "chunks", fitted)
        return make_image_corpus(rows, settings)
    return make_image_corpus(reader.cut(given, Chunking(len(given)), "--calibration"), settings)


def _require_no_tuning(options: RunOptions, processes: int) -> None:
    for given, option in ((options.tuning, "--tuning"), (options.adapter, "--adapter")):
        if given is not None:
            raise SourceError(f"{option} {given} is for what 'tune' trains, and the recipe has none; leave it out.")
    if processes > 1:
        raise SourceError(
            f"{processes} processes were started, and only 'tune' can be shared among them; start one, or add tune."
        )


def _require_room(plan: Plan, settings: Tune) -> None:
    """SourceError for sequences that are longer than what the model has positions for, after its slots."""
    anatomy, length, taken = plan.anatomy, settings.length, plan.changes.positions
    limits = [limit for limit in (anatomy.max_positions, anatomy.max_length) if limit is not None]
    if limits and length > min(limits) - taken:
        raise SourceError(
            f"tune.length is {length}, and after {taken} slots the model has {min(limits) - taken} positions; lower it."
        )


def _identity(plan: Plan, corpus: Corpus, calibrating: torch.Tensor | None) -> dict:
    """What makes two runs of tuning the same one."""
    source, recipe = plan.source, plan.recipe.to_dict()
    fitted = None if calibrating is None else hashlib.sha256(calibrating.numpy().tobytes()).hexdigest()
    return {
        "source": hashlib.sha256(source.spec.encode()).hexdigest(),  # a path is not for others to read
        "revision": source.revision,
        "dtypes": sorted({tensor.dtype for tensor in source.layout.tensors.values()}),
        "operations": recipe["operations"],
        "tune": recipe["tune"],
        "text": corpus.sha256,
        "calibration chunks": fitted,
    }


def dismiss(training: Training | None) -> None:
    """Let the other processes go, which wait to assist: there is nothing to tune."""
    if training is not None:
        broadcast_object_list([None])


def assist(plan: Plan, training: Training) -> None:
    """The part of every process but the main one: wait for what it folded and fitted, and tune along."""
    assert plan.recipe.tune is not None
    found: Any = broadcast_object_list([None])[0]
    if found is None:
        return
    live = Live(load_original(found["directory"], device=training.device), plan.anatomy)
    parts = moved(found["parts"], training.device)
    with contextlib.ExitStack() as grafts:
        for operation in plan.recipe.operations:
            grafts.enter_context(operation.graft(live, parts[operation.name]))
        tune(live, plan.recipe.tune, training, max(operation.opens for operation in plan.recipe.operations))
