"""A model in parts, each a function of its weights and of the residual stream that enters it: its blocks, and the rest.

Notation: B sequences, T tokens, d hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from .model import Live

OUTSIDE = "what is outside of the blocks"
STREAM = "hidden_states"  # the argument's name, where a block gets it by name

Weights = dict[str, torch.Tensor]  # by their names in the causal LM


@dataclass(frozen=True)
class Part:
    """A stretch of the model. `entering` (B, T, d) is random, as large as what enters on text.

    On text, massive activations would drown all else. `run` gives, for weights and what enters, what the part adds to
    the stream (B, T, d), then whatever else others get of it: logits, or what blocks are handed beside the stream.
    """

    name: str
    weights: Weights
    entering: torch.Tensor
    run: Callable[[Weights, torch.Tensor], list[torch.Tensor]]

    @property
    def width(self) -> int:
        return self.entering.shape[-1]


def parts(live: Live, tokens: torch.Tensor) -> list[Part]:
    """Each block of the model at work on `tokens` (B, T), then what is outside of them.

    Outside, buffers are there too, and a weight with two names (tied embeddings) under both, as if it were two.
    UnsupportedModel where a block shares a weight, or where something stands between blocks.
    """
    blocks = [live.trunk.get_submodule(name) for name in live.anatomy.blocks]
    calls = _calls(live, blocks, tokens)
    if any(not torch.equal(a.outputs[0], b.given[0]) for a, b in zip(calls, calls[1:], strict=False)):
        raise UnsupportedModel(f"{live.anatomy.model_type}: the residual stream changes between its blocks.")
    leads = [f"{live.anatomy.lead}{name}." for name in live.anatomy.blocks]
    weights = _weights(live, leads)
    source = torch.Generator().manual_seed(0)
    found = [
        Part(lead[:-1], weights[lead], _as_large(call.given[0], source), partial(_run_block, block, lead, call))
        for lead, block, call in zip(leads, blocks, calls, strict=True)
    ]
    run = partial(_run_outside, live.model, blocks, calls, tokens)
    return [*found, Part(OUTSIDE, weights[""], _as_large(calls[-1].outputs[0], source), run)]


def _as_large(states: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    return torch.randn(states.shape, generator=source).to(states) * states.abs().median()


def _weights(live: Live, leads: list[str]) -> dict[str, Weights]:
    """The weights of each block by what their names begin with, and the others by ""."""
    found: dict[str, Weights] = {lead: {} for lead in (*leads, "")}
    owners: dict[int, str] = {}
    for name, weight in live.model.named_parameters(remove_duplicate=False):
        lead = next((lead for lead in leads if name.startswith(lead)), "")
        if id(weight) in owners and (lead or owners[id(weight)]):
            raise UnsupportedModel(
                f"{live.anatomy.model_type}: {name} is the tensor of another place as well, and cannot change in one; "
                "leave rotation out."
            )
        owners[id(weight)] = lead
        found[lead][name] = weight
    buffers = {name: b for name, b in live.model.named_buffers() if not name.startswith(tuple(leads))}
    found[""].update({name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()})
    return found


@dataclass(frozen=True)
class _Call:
    """One call of a block, and what came of it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def given(self) -> list[Any]:
        """All that the block gets, the stream first."""
        if self.args:
            return [*self.args, *self.kwargs.values()]
        beside = [value for name, value in self.kwargs.items() if name != STREAM]
        return [self.kwargs[STREAM], *beside]

    @property
    def outputs(self) -> list[Any]:
        """All that it returns, the stream first."""
        return [self.output] if isinstance(self.output, torch.Tensor) else list(self.output)

    def entered_by(self, stream: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments for another stream; copies, since some blocks write into what they are given."""
        args = (stream, *self.args[1:]) if self.args else ()
        kwargs = self.kwargs if self.args else {**self.kwargs, STREAM: stream}
        return tuple(map(_copy, args)), {name: _copy(value) for name, value in kwargs.items()}

    def output_of(self, stream: torch.Tensor) -> Any:
        """The same output with another stream."""
        return stream if isinstance(self.output, torch.Tensor) else type(self.output)((stream, *self.output[1:]))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


@torch.no_grad()
def _calls(live: Live, blocks: Sequence[nn.Module], tokens: torch.Tensor) -> list[_Call]:
    calls: list[_Call] = []

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(args, kwargs, output))

    with contextlib.ExitStack() as undo:
        for block in blocks:
            undo.callback(block.register_forward_hook(keep, with_kwargs=True).remove)
        live.model(input_ids=tokens, use_cache=False)
    return calls


def _run_block(
    block: nn.Module, lead: str, call: _Call, weights: Weights, entering: torch.Tensor
) -> list[torch.Tensor]:
    args, kwargs = call.entered_by(entering)
    own = {name.removeprefix(lead): weight for name, weight in weights.items()}
    leaving, *others = _Call(args, kwargs, functional_call(block, own, args, kwargs)).outputs
    return [leaving - entering, *_tensors(others)]


def _run_outside(
    model: PreTrainedModel, blocks: Sequence[nn.Module], calls: Sequence[_Call], tokens: torch.Tensor,
    weights: Weights, leaving: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    """What enters the first block, the logits if the last one gives `leaving`, and what else blocks are handed.

    No block computes.
    """
    given: list[list[Any]] = []

    def skipping(call: _Call) -> Callable[..., Any]:
        def skip(*args: Any, **kwargs: Any) -> Any:
            given.append(_Call(args, kwargs).given)
            return call.output_of(leaving)

        return skip

    with contextlib.ExitStack() as undo:
        for block, call in zip(blocks, calls, strict=True):
            block.forward = skipping(call)
            undo.callback(delattr, block, "forward")  # the instance's: the class's is back
        inputs = {"input_ids": tokens, "use_cache": False}
        logits = functional_call(model, weights, (), inputs, tie_weights=False).logits
    return [given[0][0], logits, *_tensors(value for _, *beside in given for value in beside)]


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """Those that weights may have made."""
    values = [part for value in values for part in (value if isinstance(value, (tuple, list)) else [value])]
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
