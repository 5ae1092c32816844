"""The recipe's `tune`, in one process or in several that share the work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from ..anatomy.seam import Norms, Slots, normed
from ..checkpoint.disk import require_target
from ..errors import SourceError
from ..loading import load_original
from ..operations.attention_bias import grafted
from ..operations.head_norm import at_gate
from ..planning import Plan
from ..reporting import Reporter
from ..results import require_result_folder
from ..tuning.corpus import Corpus, make_corpus
from ..tuning.dataset import dataset_text
from ..tuning.store import Store
from ..tuning.tune import Tuned, make_accelerator, require_shares, tune
from ..verification.text import Chunking, tokenize
from .inputs import Texts, fit_chunks, require_known, vocabulary_size


@dataclass(frozen=True)
class Training:
    """What tuning needs besides the model: text, processes, and directories for checkpoints and for an adapter."""

    corpus: Corpus
    accelerator: Accelerator
    device: str
    store: Store | None
    adapter: Path | None


def prepare_training(
    plan: Plan, tokenizer, texts: Texts, chunking: Chunking, device: str, checkpoints: Path | None, adapter: Path | None
) -> Training | None:
    """All that can be refused before weights are read; None for a recipe that does not tune."""
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
    length = fit_chunks(chunking, plan.anatomy, max(plan.n_slots, 1)).length  # as evaluated
    text = texts.calibration if settings.dataset is None else dataset_text(settings.dataset)
    ids = tokenize(tokenizer, text)
    require_known(ids, tokenizer, vocabulary_size(plan.source.layout, plan.source.config))
    corpus = make_corpus(ids, settings, length)
    accelerator = make_accelerator(device)
    require_shares(settings, accelerator.num_processes)
    if processes > 1:
        device = str(accelerator.device)
    return Training(corpus, accelerator, device, _store(plan, corpus, checkpoints), adapter)


def _store(plan: Plan, corpus: Corpus, directory: Path | None) -> Store | None:
    """Where checkpoints are kept; what is there already must be of the same run."""
    if directory is None:
        return None
    require_result_folder(directory, "--tuning", [plan.source.root])
    operations = [operation.model_dump(mode="json") for operation in plan.recipe.operations]
    tune_settings = plan.recipe.tune.model_dump(mode="json")
    store = Store(
        directory,
        {"source": plan.source.spec, "operations": operations, "tune": tune_settings, "text": corpus.sha256},
    )
    store.load()
    return store


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
    broadcast_object_list([{"directory": directory, "prefix": tuple(prefix), "slots": slots, "norms": norms}])
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
    _tune(plan, training, model, found["prefix"], found["slots"], found["norms"], lambda done, what: None)


def _tune(plan: Plan, training: Training, model: PreTrainedModel, prefix, slots: Slots, norms: Norms, advance) -> Tuned:
    gate = 0.0 if plan.head_norm is None else plan.recipe.head_norm.gate
    with contextlib.ExitStack() as inside:
        inside.enter_context(grafted(model, plan.anatomy, prefix, slots, plan.slots_visible))
        if plan.head_norm is not None:
            inside.enter_context(normed(model, plan.anatomy, *at_gate(plan.head_norm, norms, 0.0)))
        return tune(
            model, plan.anatomy, plan.recipe.tune, training.corpus, gate=gate, accelerator=training.accelerator,
            store=training.store, adapter=training.adapter, progress=advance,
        )  # fmt: skip
