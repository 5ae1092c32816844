"""Building and running a model for its structure, within what the tensors beside its config could fill.

A config is a few bytes, and can ask for a model that never ends. Nothing here knows what its keys mean: what is counted
is parameters and modules as they are made, and operations as they are run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import DamagedCheckpoint


@dataclass
class Allowance:
    """What is left to be made and run for a checkpoint of some number of tensors.

    Tied matrices are made twice, and modules without tensors (dropout, activations) stand between the others. A layer
    of ten tensors takes some hundred operations.
    """

    tensors: int
    parameters: int
    modules: int
    operations: int

    @classmethod
    def of(cls, tensors: int) -> Allowance:
        return cls(tensors, 4 * tensors + 256, 16 * tensors + 4096, 2000 * tensors + 100_000)

    def take(self, kind: str) -> None:
        """One more of `kind`; DamagedCheckpoint where there have been too many."""
        left = getattr(self, kind) - 1
        setattr(self, kind, left)
        if left < 0:
            raise DamagedCheckpoint(
                f"the config asks for a model of far more {kind} than its {self.tensors:,} tensors could fill; correct "
                "its counts, or download the checkpoint again."
            )


@contextlib.contextmanager
def within(allowance: Allowance | None) -> Iterator[None]:
    """While active, models of this process are built and run within `allowance`; without bounds where it is None."""
    if allowance is None:
        yield
        return

    def parameter(module: nn.Module, name: str, value: object) -> None:
        allowance.take("parameters")

    def submodule(module: nn.Module, name: str, value: object) -> None:
        allowance.take("modules")

    handles = (
        hooks.register_module_parameter_registration_hook(parameter),
        hooks.register_module_module_registration_hook(submodule),
    )
    try:
        with _Counting(allowance):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Counting(TorchDispatchMode):
    """Counts operations; each runs as it would."""

    def __init__(self, allowance: Allowance) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allowance = allowance

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.allowance.take("operations")
        return function(*args, **(kwargs or {}))
