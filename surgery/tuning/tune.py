"""Tune a model that has slots in place: prepare, run the loop, take out what was trained."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import PreTrainedModel

from ..anatomy.sites import Anatomy
from ..errors import SourceError
from ..live.graft import Norms, Slots
from ..recipe import Tune
from .adapted import ADAPTER, Adapted, Stored, as_is
from .corpus import Corpus
from .loop import Loop, Record
from .store import Store

# The main process measures the original while the others wait for it, which may take as long as it likes.
PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Tuned:
    """Slots and norms as trained, and linear weights that LoRA changed, by parameter name in the causal LM."""

    slots: Slots
    norms: Norms
    weights: dict[str, torch.Tensor]
    record: Record


def make_accelerator(device: str) -> Accelerator:
    """accelerate's view of the processes that share the work: one, or as many as `accelerate launch` started."""
    # The model is where --device has put it, and precision is what the recipe says, not what `accelerate config` did.
    return Accelerator(
        cpu=device == "cpu", device_placement=False, mixed_precision="no", dynamo_backend="no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )  # fmt: skip


def require_shares(settings: Tune, processes: int) -> None:
    """SourceError unless a batch divides among the processes and their micro-batches."""
    if settings.batch % (processes * settings.accumulate):
        raise SourceError(
            f"tune.batch is {settings.batch} sequences, which {processes} processes with {settings.accumulate} "
            "micro-batches each cannot share evenly; change tune.batch or tune.accumulate."
        )


def require_in_memory(model: PreTrainedModel, what: str) -> None:
    """SourceError for a model that accelerate keeps elsewhere in part: what is offloaded has no gradients to give, and
    cannot be changed in place."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SourceError(f"{what} needs all of the model in memory, and part is offloaded; give another --device.")


def tune(
    model: PreTrainedModel,
    anatomy: Anatomy,
    settings: Tune,
    corpus: Corpus,
    *,
    gate: float = 0.0,
    accelerator: Accelerator | None = None,
    store: Store | None = None,
    adapter: Path | None = None,
    stored: Stored = as_is,
    progress: Callable[[int, str], None] = lambda done, what: None,
) -> Tuned:
    """Train the slots and norms that are in `model`, and LoRA where `settings` say so; its own weights stay.

    `gate`: what the gates of norms, all 0 now, shall be in the end; 0 has them learned.
    `store`: checkpoints to go on from, and to save to at each judgement. `adapter`: a directory for a PEFT adapter of
    the model as it came. `stored`: a weight by its name in the causal LM, as a checkpoint will hold it.
    Raises SourceError for settings that do not fit the model.
    """
    accelerator = accelerator or make_accelerator(str(next(model.parameters()).device))
    require_shares(settings, accelerator.num_processes)
    require_in_memory(model, "tune")
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapted = Adapted(model, anatomy, settings, gate, stored)
    try:
        record = Loop(model, anatomy, adapted, settings, corpus, accelerator, store, progress).run()
        weights = {name: weight.cpu() for name, weight in adapted.weights()}
        slots, norms = _trained(adapted, anatomy)
        if adapter is not None and accelerator.is_main_process:
            adapted.save(adapter)
    finally:
        accelerator.free_memory()  # it would keep the model until the end of the run
        adapted.close()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required.get(name, False))
    return Tuned(slots, norms, weights, record)


def _trained(adapted: Adapted, anatomy: Anatomy) -> tuple[Slots, Norms]:
    slots, norms = {}, {}
    for site in anatomy.sites:
        module = adapted.trunk.get_submodule(site.name)
        slots[site.name] = tuple(part.detach().clone() for part in module.attention_bias())
        if (norm := getattr(module, "head_norm", None)) is not None:
            held = norm.modules_to_save[ADAPTER]
            norms[site.name] = {"weight": held.weight.detach().clone(), "gate": held.gate.detach().clone()}
    return slots, norms
