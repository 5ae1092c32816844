"""One pass of a model over text. Observers see hidden states, attention calls and logits, and keep what they need.

Notation: B sequences, T tokens, d hidden size, V vocabulary. Layer l = 0 is the embedding output, l = k the residual
stream after block k; the final norm's output is not a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anatomy.probe import Call, observing
from ..anatomy.seam import on_the_seam
from ..anatomy.sites import Anatomy

# Logits are the largest tensor of a pass; this bounds a batch of them, and with it the batch size.
LOGIT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Batch:
    """tokens (B, T) as fed to the model; the first `lead` of each row are a prefix that belongs to no text."""

    tokens: torch.Tensor
    lead: int


class Observer:
    """What may look at a pass. Override what you need; what is not overridden costs nothing."""

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        """states (B, T, d): the residual stream of `layer`."""

    def attention(self, block: int, call: Call, batch: Batch) -> None:
        """One attention call, before it is computed."""

    def logits(self, logits: torch.Tensor, batch: Batch) -> None:
        """logits (B, T, V)."""

    @classmethod
    def wants(cls, method: str) -> bool:
        return getattr(cls, method) is not getattr(Observer, method)


def stream(
    model: PreTrainedModel,
    anatomy: Anatomy,
    chunks: torch.Tensor,
    observers: Sequence[Observer],
    *,
    prefix: Sequence[int] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Feed `chunks` (N, T), each behind `prefix`, to the model once; `progress` is told how many sequences are done."""
    size = max(1, LOGIT_BYTES // (4 * model.config.get_text_config().vocab_size * (chunks.shape[1] + len(prefix))))
    lead = torch.tensor(list(prefix), dtype=torch.long).expand(chunks.shape[0], -1)
    device = input_device(model)
    needs_logits = any(o.wants("logits") for o in observers)
    for rows in torch.cat([lead, chunks], dim=1).split(size):
        batch = Batch(rows.to(device), len(prefix))
        # One row of logits is enough for a pass that nobody reads them from.
        keep = {} if needs_logits else {"logits_to_keep": 1}
        with torch.inference_mode(), _watching(model, anatomy, batch, observers):
            out = model(input_ids=batch.tokens, use_cache=False, **keep)
            for observer in observers:
                observer.logits(out.logits, batch)
        progress(len(rows))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: to the embedding, or to the CPU where that is offloaded and accelerate moves them on."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


@contextlib.contextmanager
def _watching(model, anatomy: Anatomy, batch: Batch, observers: Sequence[Observer]) -> Iterator[None]:
    trunk = model.get_submodule(anatomy.trunk)
    hidden = [o for o in observers if o.wants("hidden")]
    attention = [o for o in observers if o.wants("attention")]
    with contextlib.ExitStack() as stack:
        if hidden:
            for layer, name in enumerate(anatomy.blocks):
                block = trunk.get_submodule(name)
                if layer == 0:
                    stack.callback(block.register_forward_pre_hook(_before(hidden, batch), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(_after(layer + 1, hidden, batch)).remove)
        if attention:
            block_of = {trunk.get_submodule(site.name): site.block for site in anatomy.sites}

            def observe(call: Call) -> None:
                for observer in attention:
                    observer.attention(block_of[call.module], call, batch)

            stack.enter_context(on_the_seam(model, anatomy))
            stack.enter_context(observing(observe))
        yield


def _before(observers, batch: Batch):
    def hook(block: nn.Module, args, kwargs) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        for observer in observers:
            observer.hidden(0, states, batch)

    return hook


def _after(layer: int, observers, batch: Batch):
    def hook(block: nn.Module, args, output) -> None:
        states = output[0] if isinstance(output, tuple) else output
        for observer in observers:
            observer.hidden(layer, states, batch)

    return hook
