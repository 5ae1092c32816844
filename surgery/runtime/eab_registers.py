"""Test-time registers: a token beside the patches that takes what a few MLP units put on patches (arXiv 2506.08010).

A token of zeros enters the first block. It is taken out behind each block and put in again in front of the next, so
that nothing outside of the blocks sees it, not even who asks for the hidden states of all layers. At each unit that is
named the largest activation of a token (by size) is moved to it; all others have none there.

`config.test_time_registers` describes it: `at`, where the token stands (1: after CLS); `blocks`, their names in the
trunk; and `units`, which maps the name of each down projection to the units of what enters it.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .eab_added import put_in_front
from .eab_runtime import AttentionBiasMixin, find_trunk

MARK = "eab_registers"  # attribute of a trunk that has them: its `Passage`


class Passage:
    """The way of the token: where it stands, and it (B, 1, d) by the number of the block that it enters.

    Each block finds its own, so that it may be computed once more (gradient checkpointing).
    """

    def __init__(self, at: int) -> None:
        self.at, self.tokens = at, dict[int, Tensor]()


class _Carrying:
    """In front of a block's class: (B, T, d) come in, T + 1 tokens pass it, and T leave. `eab_carries`: the way of the
    token, and the block's number."""

    eab_carries: tuple[Passage, int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        passage, index = self.eab_carries
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        token = passage.tokens[index] if index else passage.tokens.pop(0, torch.zeros_like(states[:, :1]))
        longer = with_token(states, passage.at, token)
        if args:
            output = super().forward(longer, *args[1:], **kwargs)  # type: ignore[misc]
        else:
            output = super().forward(**{**kwargs, "hidden_states": longer})  # type: ignore[misc]
        states = output if isinstance(output, Tensor) else output[0]
        states, passage.tokens[index + 1] = without_token(states, passage.at)
        return states if isinstance(output, Tensor) else type(output)((states, *output[1:]))


def with_token(states: Tensor, at: int, token: Tensor) -> Tensor:
    """states (B, T, d) with a token (B, 1, d) in front of token `at`."""
    return torch.cat([states[:, :at], token, states[:, at:]], dim=1)


def without_token(states: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """The reverse: states without token `at`, and that token."""
    return torch.cat([states[:, :at], states[:, at + 1 :]], dim=1), states[:, at : at + 1]


def moved(activations: Tensor, at: int, units: Tensor) -> Tensor:
    """activations (B, T, m) with what any token has at `units` moved to the token `at`: the largest by size."""
    own = activations[:, :, units]  # (B, T, units)
    largest = own.gather(1, own.abs().argmax(dim=1, keepdim=True))  # (B, 1, units)
    activations = activations.clone()
    activations[:, :, units] = 0.0
    activations[:, at : at + 1, units] = largest
    return activations


def _move(at: int, units: list[int], projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of a down projection."""
    states: Tensor = args[0]
    return (moved(states, at, torch.tensor(units, device=states.device)), *args[1:])


def _silence(units: list[int], projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].index_fill(-1, torch.tensor(units, device=args[0].device), 0.0), *args[1:])


def install_registers(trunk: nn.Module, registers: dict[str, Any]) -> contextlib.ExitStack:
    """Bring the token into each block, move activations to it, and take it out; closing what is returned undoes it."""
    undo, at = contextlib.ExitStack(), registers["at"]
    passage = Passage(at)
    setattr(trunk, MARK, passage)
    undo.callback(delattr, trunk, MARK)
    for index, name in enumerate(registers["blocks"]):
        block: Any = trunk.get_submodule(name)
        block.eab_carries = passage, index
        undo.callback(delattr, block, "eab_carries")
        put_in_front(block, _Carrying, undo)
    for name, units in registers["units"].items():
        projection = trunk.get_submodule(name)
        undo.callback(projection.register_forward_pre_hook(functools.partial(_move, at, units)).remove)
    return undo


def install_silence(trunk: nn.Module, units: dict[str, list[int]]) -> contextlib.ExitStack:
    """Hooks that leave those units out, by down projection; closing what is returned takes them out again."""
    undo = contextlib.ExitStack()
    for name, some in units.items():
        hook = functools.partial(_silence, some)
        undo.callback(trunk.get_submodule(name).register_forward_pre_hook(hook).remove)
    return undo


class RegistersMixin(AttentionBiasMixin):
    """Mixed into a model class of transformers, it makes the class load and run with test-time registers."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        trunk = find_trunk(self, config.eab["trunk"])
        if not hasattr(trunk, MARK):  # AutoModel may have built the trunk with them
            install_registers(trunk, config.test_time_registers)
