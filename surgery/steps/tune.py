"""The recipe's `tune`, in one process or in several that share the work."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from transformers import PreTrainedModel

from ..checkpoint.disk import require_target
from ..checkpoint.results import require_apart, require_result_folder
from ..errors import SourceError
from ..live.graft import Norms, Slots, normed
from ..live.loading import load_original
from ..live.text import Chunking, tokenize
from ..operations.attention_bias import grafted
from ..operations.changed import stored_value
from ..operations.head_norm import at_gate
from ..progress import Reporter
from ..tuning.corpus import Corpus, make_corpus
from ..tuning.dataset import dataset_text
from ..tuning.store import Store
from ..tuning.tune import Tuned, make_accelerator, require_shares, tune
from .inputs import Texts, require_known, vocabulary_size
from .plan import Plan


@dataclass(frozen=True)
class Training:
    """What tuning needs besides the model: text, processes, and directories for checkpoints and for an adapter."""

    corpus: Corpus
    accelerator: Accelerator
    device: str
    store: Store | None
    adapter: Path | None


def prepare_training(
    plan: Plan,
    tokenizer,
    texts: Texts,
    chunking: Chunking,
    calibrating: torch.Tensor | None,
    device: str,
    checkpoints: Path | None,
    adapter: Path | None,
    outputs: Sequence[Path],
) -> Training | None:
    """All that can be refused before weights are read; None for a recipe that does not tune.

    `chunking`: of what is evaluated; `calibrating`: chunks that the rest of the recipe fits on; `outputs`: where the
    run writes, `adapter` left out.
    """
    settings, processes = plan.recipe.tune, int(os.environ.get("WORLD_SIZE", "1"))
    if settings is None:
        for given, option in ((checkpoints, "--tuning"), (adapter, "--adapter")):
            if given is not None:
                raise SourceError(f"{option} {given} is for what 'tune' trains, and the recipe has none; leave it out.")
        if processes > 1:
            raise SourceError(
                f"{processes} processes were started, and only 'tune' can be shared among them; start one, or add tune."
            )
        return None
    if adapter is not None:
        require_target(adapter, plan.source.root if plan.source.root.is_dir() else None)
        require_apart(adapter, "--adapter", outputs)
    if processes > 1 and device == "auto":
        raise SourceError("each of several processes holds the whole model, on its device; give --device cuda or cpu.")
    _require_room(plan)
    text = texts.calibration if settings.dataset is None else dataset_text(settings.dataset)
    ids = tokenize(tokenizer, text)
    require_known(ids, tokenizer, vocabulary_size(plan.source.layout, plan.source.config))
    corpus = make_corpus(ids, settings, chunking.length)
    accelerator = make_accelerator(device)
    require_shares(settings, accelerator.num_processes)
    if processes > 1:
        device = str(accelerator.device)
    store = None
    if checkpoints is not None:
        store = Store(checkpoints, _identity(plan, corpus, calibrating))
        if accelerator.is_main_process:  # the only one to write there
            others = [plan.source.root, *outputs, *([] if adapter is None else [adapter])]
            require_result_folder(checkpoints, "--tuning", others)
            store.load()
    return Training(corpus, accelerator, device, store, adapter)


def _require_room(plan: Plan) -> None:
    """SourceError for sequences that are longer than what the model has positions for, behind its slots."""
    anatomy, length = plan.anatomy, plan.recipe.tune.length
    limits = [limit for limit in (anatomy.max_positions, anatomy.max_length) if limit is not None]
    if limits and length > min(limits) - plan.n_slots:
        raise SourceError(
            f"tune.length is {length}, and behind {plan.n_slots} slots the model has {min(limits) - plan.n_slots} "
            "positions; lower it."
        )


def _identity(plan: Plan, corpus: Corpus, calibrating: torch.Tensor | None) -> dict:
    """What makes two runs of tuning the same one."""
    source, recipe = plan.source, plan.recipe
    fitted = None if calibrating is None else hashlib.sha256(calibrating.numpy().tobytes()).hexdigest()
    return {
        "source": source.spec,
        "revision": source.revision,
        "dtypes": sorted({tensor.dtype for tensor in source.layout.tensors.values()}),
        "operations": [operation.model_dump(mode="json") for operation in recipe.operations],
        "tune": recipe.tune.model_dump(mode="json"),
        "text": corpus.sha256,
        "calibration chunks": fitted,
    }


def tune_added(
    plan: Plan,
    training: Training,
    model: PreTrainedModel,
    directory: Path,
    prefix: Sequence[int],
    slots: Slots,
    norms: Norms,
    reporter: Reporter,
) -> Tuned:
    """Train slots, norms and LoRA in the processes that share the work (see `assist`)."""
    reporter.step("tune what was added")
    parts = send_to_device({"slots": slots, "norms": norms}, "cpu")  # devices differ from process to process
    broadcast_object_list([{"directory": directory, "prefix": tuple(prefix), **parts}])
    with reporter.bar("tuning", plan.recipe.tune.steps) as advance:
        tuned = _tune(plan, training, model, prefix, slots, norms, advance)
    record = tuned.record
    if record.stopped:
        reporter.note(f"tuning stopped: {record.stopped}")
    if record.best["step"] == 0:
        reporter.note("no step was better on held-out text than the start: what is written is untuned")
    return tuned


def assist(plan: Plan, training: Training) -> None:
    """The part of every process but the main one: wait for what it folded and fitted, and tune along."""
    found = broadcast_object_list([None])[0]
    model = load_original(found["directory"], device=training.device)
    # Smoothed weights come from the main process when training starts.
    slots, norms = send_to_device((found["slots"], found["norms"]), training.device)
    _tune(plan, training, model, found["prefix"], slots, norms, lambda done, what: None)


def _tune(plan: Plan, training: Training, model: PreTrainedModel, prefix, slots: Slots, norms: Norms, advance) -> Tuned:
    gate = 0.0 if plan.head_norm is None else plan.recipe.head_norm.gate
    stored = functools.partial(stored_value, plan.source.layout, plan.anatomy)
    with contextlib.ExitStack() as inside:
        inside.enter_context(grafted(model, plan.anatomy, prefix, slots, plan.slots_visible))
        if plan.head_norm is not None:
            inside.enter_context(normed(model, plan.anatomy, *at_gate(plan.head_norm, norms, 0.0)))
        return tune(
            model, plan.anatomy, plan.recipe.tune, training.corpus, gate=gate, accelerator=training.accelerator,
            store=training.store, adapter=training.adapter, stored=stored, progress=advance,
        )  # fmt: skip
