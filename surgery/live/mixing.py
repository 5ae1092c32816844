"""Calls of mixers, the layers that hand a state from token to token, shown to whoever looks on."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..anatomy.mixers import Mixer
from .model import Live


@dataclass(frozen=True)
class Mixing:
    """One call of a mixer: what it was given, by the names of its arguments, and what it gave."""

    module: nn.Module
    mixer: Mixer
    given: dict[str, Any]
    output: Any

    @property
    def sequence(self) -> torch.Tensor:
        """The first of its outputs that is a sequence: (B, T, d)."""
        return self._of(self.output)

    def _of(self, output: Any) -> torch.Tensor:
        found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[self.mixer.outputs[0]]
        return found

    def without(self, lead: int) -> torch.Tensor:
        """Its `sequence` if it had been given nothing, vectors of zeros, in place of what leads the text.

        That is the prefix that a converted model remembers, else the first `lead` tokens of each row. Nobody is shown
        this call.
        """
        remembered: Any = getattr(self.module, "remembered_inputs", None)
        instead = {}
        with contextlib.ExitStack() as undo:
            if remembered is None:
                for name in self.mixer.inputs:
                    instead[name] = self.given[name].clone()
                    instead[name][:, :lead] = 0
            else:
                for parameter in remembered.parameters():
                    undo.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = torch.zeros_like(parameter.data)
            return self._of(self.module.forward(**{**self.given, **instead}))


@contextlib.contextmanager
def watching_mixers(live: Live, look: Callable[[int, Mixing], None]) -> Iterator[None]:
    """Within the block, `look` is shown each call of a mixer, with the number of the block that it is in."""

    def hook(
        block: int, mixer: Mixer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:  # fmt: skip
        remembered: Any = getattr(module, "remembered_inputs", None)
        names = inspect.signature(module.forward).parameters if remembered is None else remembered.arguments
        look(block, Mixing(module, mixer, {**dict(zip(names, args, strict=False)), **kwargs}, output))

    with contextlib.ExitStack() as undo:
        for mixer in live.anatomy.mixers:
            block = next(i for i, name in enumerate(live.anatomy.blocks) if f"{mixer.name}.".startswith(f"{name}."))
            watched = functools.partial(hook, block, mixer)
            undo.callback(live.trunk.get_submodule(mixer.name).register_forward_hook(watched, with_kwargs=True).remove)
        yield
