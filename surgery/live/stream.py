"""One pass of a model over text. Observers see hidden states, attention calls and logits, and keep what they need.

Notation: B sequences, T tokens, d hidden size, V vocabulary. Layer l = 0 is the embedding output, l = k the residual
stream after block k; the final norm's output is not a layer.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..anatomy.calls import Call, observing
from ..anatomy.linears import widths
from ..progress import Advance, unseen
from .graft import on_the_seam
from .model import Live

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

    def attended(self, block: int, call: Call, output: torch.Tensor, batch: Batch) -> None:
        """The same call with its output (B, T, Hq, E), as it goes into the output projection.

        That is the heads' sums of values, normed where the site has a head norm; `call.summed` is then what was normed.
        """

    def units(self, block: int, activations: torch.Tensor, written: torch.Tensor, batch: Batch) -> None:
        """One down projection of an MLP: activations (B, T, m) go in, written (B, T, d) comes out.

        A block without one (`down_projections`) does not call. What norms or multipliers the block puts between the
        projection and the residual stream (Gemma 2, OLMo 2, Granite) is not in `written`.
        """

    def logits(self, logits: torch.Tensor, batch: Batch) -> None:
        """logits (B, T, V)."""

    def rows(self) -> dict[int, dict]:
        """What was found of each layer, as plain data; for observers that join in a survey."""
        return {}

    @classmethod
    def wants(cls, method: str) -> bool:
        return getattr(cls, method) is not getattr(Observer, method)


def stream(
    live: Live,
    chunks: torch.Tensor,
    observers: Sequence[Observer],
    *,
    prefix: Sequence[int] = (),
    advance: Advance = unseen,
    what: str = "",
) -> None:
    """Feed `chunks` (N, T), each after `prefix`, to the model once; `advance` is told of sequences and of `what`."""
    model = live.model
    size = max(1, LOGIT_BYTES // (4 * model.config.get_text_config().vocab_size * (chunks.shape[1] + len(prefix))))
    lead = torch.tensor(list(prefix), dtype=torch.long).expand(chunks.shape[0], -1)
    device = live.device
    keep = {}
    if (
        not any(o.wants("logits") for o in observers)
        and len({*getattr(model, "hf_device_map", {}).values()}) < 2  # else logits may be elsewhere than the place
        and "logits_to_keep" in inspect.signature(type(model).forward).parameters
    ):
        # One row of logits is enough for a pass that nobody reads them from. It is named by its place: given a number
        # of rows, some models (Gemma 4) compute their last blocks for only as many tokens.
        keep = {"logits_to_keep": torch.tensor([chunks.shape[1] + len(prefix) - 1], device=device)}
    for rows in torch.cat([lead, chunks], dim=1).split(size):
        batch = Batch(rows.to(device), len(prefix))
        with torch.inference_mode(), _watching(live, batch, observers):
            out = model(input_ids=batch.tokens, use_cache=False, **keep)
            for observer in observers:
                observer.logits(out.logits, batch)
        advance(len(rows), what)


def down_projections(live: Live) -> dict[int, nn.Module]:
    """Block -> the module that projects its MLP's activations down to the residual stream.

    By shape and place: inside the block, outside of its attention sites, from a wider space to the hidden size. A block
    with none or with several (two MLPs), or with experts, whatever stands beside them, is left out: which unit is meant
    would not be known.
    """
    trunk = live.trunk
    width = trunk.config.get_text_config().hidden_size
    sites = tuple(f"{site.name}." for site in live.anatomy.sites)
    found = {}
    for index, name in enumerate(live.anatomy.blocks):
        outside = [
            (path, module)
            for path, module in trunk.get_submodule(name).named_modules(prefix=name)
            if not f"{path}.".startswith(sites)
        ]
        inside = [module for _, module in outside if widths(module)[1] == width and widths(module)[0] > width]
        if len(inside) == 1 and not any(path.endswith(".experts") for path, _ in outside):
            found[index] = inside[0]
    return found


def slot_count(live: Live) -> int:
    """How many slots each site has; 0 in an unchanged model."""
    return (getattr(live.trunk.config, "eab", None) or {}).get("n_slots", 0)


def normed_sites(live: Live) -> int:
    """How many sites norm their heads' outputs."""
    return sum(hasattr(live.trunk.get_submodule(site.name), "head_norm") for site in live.anatomy.sites)


def on_layer(
    live: Live, layer: int, look: Callable[[torch.Tensor], torch.Tensor | None], *, first: bool = False
) -> RemovableHandle:
    """Show `look` the stream (B, T, d) at `layer` whenever it passes; what it returns, if anything, goes on instead.

    With `first`, in front of whatever already looks there. Gemma 3n carries several streams side by side, (K, B, T, d):
    shown is the one that its blocks read.
    """
    trunk, blocks = live.trunk, live.anatomy.blocks
    active = getattr(trunk.config.get_text_config(), "altup_active_idx", None)

    def shown(states: torch.Tensor) -> torch.Tensor | None:
        changed = look(states if active is None else states[active])
        if changed is None or active is None:
            return changed
        states = states.clone()
        states[active] = changed
        return states

    def leaving(block, args, output):
        several = isinstance(output, (tuple, list))  # OpenAI GPT gives a list
        changed = shown(output[0] if several else output)
        return changed if changed is None or not several else type(output)((changed, *output[1:]))

    def entering(block, args, kwargs):
        changed = shown(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    if layer:
        return trunk.get_submodule(blocks[layer - 1]).register_forward_hook(leaving, prepend=first)
    return trunk.get_submodule(blocks[0]).register_forward_pre_hook(entering, with_kwargs=True, prepend=first)


@contextlib.contextmanager
def _watching(live: Live, batch: Batch, observers: Sequence[Observer]) -> Iterator[None]:
    hidden, units, attention, attended = (
        [o for o in observers if o.wants(method)] for method in ("hidden", "units", "attention", "attended")
    )
    with contextlib.ExitStack() as stack:
        if hidden:
            for layer in range(len(live.anatomy.blocks) + 1):
                stack.callback(on_layer(live, layer, _look(layer, hidden, batch)).remove)
        for index, projection in down_projections(live).items() if units else ():
            stack.callback(projection.register_forward_hook(_projected(index, units, batch)).remove)
        if attention or attended:
            block_of = {live.trunk.get_submodule(site.name): site.block for site in live.anatomy.sites}

            def before(call: Call) -> None:
                for observer in attention:
                    observer.attention(block_of[call.module], call, batch)

            def after(call: Call, output: torch.Tensor) -> None:
                for observer in attended:
                    observer.attended(block_of[call.module], call, output, batch)

            stack.enter_context(on_the_seam(live))
            stack.enter_context(observing(before, after if attended else None))
        yield


def _look(layer: int, observers, batch: Batch):
    def look(states: torch.Tensor) -> None:
        for observer in observers:
            observer.hidden(layer, states, batch)

    return look


def _projected(block: int, observers, batch: Batch):
    def hook(projection: nn.Module, args, output) -> None:
        activations, (rows, length) = args[0], batch.tokens.shape
        if activations.numel() != rows * length * activations.shape[-1]:
            return  # not all tokens pass here: an expert's
        # Some families (OPT) put all tokens of a batch in one row.
        activations, written = (part.reshape(rows, length, -1) for part in (activations, output))
        for observer in observers:
            observer.units(block, activations, written, batch)

    return hook
