"""Settings a model that has slots in place: prepare, run the loop, take out what was trained."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from ..errors import SourceError
from ..live.loading import require_in_memory
from ..live.model import Live
from ..live.roundings import straight_through
from ..operations.base import Fitting
from ..progress import Advance, unseen
from .adapted import Adapted, Stored, as_is
from .corpus import Corpus
from .loop import Loop, Record
from .settings import Settings
from .store import Store

# The main process measures the original while the others wait for it, which may take as long as it likes.
PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Training:
    """What tuning needs besides the model and its settings, ready before weights are read.

    `accelerator`: the processes that share the work; by default this one. `device`: where each holds the model.
    `store`: checkpoints to go on from, and to save to at each judgement. `adapter`: a new directory for what was tuned,
    as a PEFT adapter of the model as it came, which it calls `base`. `stored`: a weight by its name in the causal LM,
    as it will be stored.
    """

    corpus: Corpus
    accelerator: Accelerator | None = None
    device: str = "cpu"
    store: Store | None = None
    adapter: Path | None = None
    stored: Stored = as_is
    base: str = ""

    @property
    def assists(self) -> bool:
        """Whether this process only helps the main one."""
        return self.accelerator is not None and not self.accelerator.is_main_process


@dataclass(frozen=True)
class Tuned:
    """Linear weights that LoRA changed, by parameter name in the causal LM, and how it went.

    Slots and norms as trained are left in the live model.
    """

    weights: dict[str, torch.Tensor]
    record: Record
    merged: int  # how many weights that are


def make_accelerator(device: str) -> Accelerator:
    """accelerate's view of the processes that share the work: one, or as many as `accelerate launch` started."""
    # The model is where --device has put it, and precision is what the recipe says, not what `accelerate config` did.
    return Accelerator(
        cpu=device == "cpu", device_placement=False, mixed_precision="no", dynamo_backend="no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )  # fmt: skip


def require_shares(settings: Settings, processes: int) -> None:
    """SourceError unless a batch divides among the processes and their micro-batches."""
    if settings.batch % (processes * settings.accumulate):
        raise SourceError(
            f"tune.batch is {settings.batch} sequences, which {processes} processes with {settings.accumulate} "
            "micro-batches each cannot share evenly; change tune.batch or tune.accumulate."
        )


def train(live: Live, settings: Settings, text: Fitting) -> Tuned:
    """Train what is in place, in the processes that share the work (see `assist`); the main one tells them of it."""
    text.reporter.step("tune what was added")
    parts = moved(dict(text.earlier), "cpu")  # devices differ from process to process
    broadcast_object_list([{"directory": text.directory, "parts": parts}])
    with text.reporter.bar("tuning", settings.steps) as advance:
        tuned = tune(live, settings, text.training, text.gate, advance)
    if tuned.record.stopped:
        text.reporter.note(f"tuning stopped: {tuned.record.stopped}")
    if tuned.record.best["step"] == 0:
        on = "text" if live.port.predicts else "inputs"
        text.reporter.note(f"no step was better on held-out {on} than the start: what is written is untuned")
    return tuned


def moved(value: Any, device: str) -> Any:
    """`value` with all tensors in it on `device`: in containers, in dataclasses, and among what functions are bound to.

    accelerate's own does not look into the latter two.
    """
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, functools.partial):
        return functools.partial(value.func, *moved(value.args, device), **moved(value.keywords, device))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **moved(fields, device))
    return value


def tune(live: Live, settings: Settings, training: Training, gate: float = 0.0, advance: Advance = unseen) -> Tuned:
    """Train the slots and norms that are in the model, and LoRA where `settings` say so; its own weights stay.

    `gate`: what the gates of norms, all 0 now, shall be in the end; 0 has them learned.
    Raises SourceError for settings that do not fit the model.
    """
    model = live.model
    accelerator = training.accelerator or make_accelerator(str(next(model.parameters()).device))
    require_shares(settings, accelerator.num_processes)
    require_in_memory(model, "tune")
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapted = Adapted(live, settings, gate, training.stored)
    try:
        with straight_through(model):
            record = Loop(live, adapted, settings, training.corpus, accelerator, training.store, advance).run()
        weights = {name: weight.cpu() for name, weight in adapted.weights()}
        if training.adapter is not None and accelerator.is_main_process:
            adapted.save(training.adapter, training.base)
    finally:
        accelerator.free_memory()  # it would keep the model until the end of the run
        adapted.close()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required.get(name, False))
    return Tuned(weights, record, len(weights))
