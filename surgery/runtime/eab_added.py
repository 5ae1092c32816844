"""What a model holds that the original does not: modules with parameters, and classes in front of the model's own."""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

import torch
from torch import nn


class Added(nn.Module):
    """What a module of the original is given. Its parameters stay float32 whatever the model is loaded in."""

    def add_parameter(self, name: str, *shape: int) -> None:
        # Never uninitialised memory: what no checkpoint fills is NaN, and `require_added` refuses it.
        setattr(self, name, nn.Parameter(torch.full(shape, float("nan"), dtype=torch.float32)))


def require_added(model: nn.Module) -> None:
    """Raise unless the model has slots (and what else is added), and all of it that is in memory is finite."""
    added = [(name, module) for name, module in model.named_modules() if isinstance(module, Added)]
    if not added:
        raise ValueError(f"{type(model).__name__} has no slots of this runtime")
    for name, module in added:
        for part, tensor in module.named_parameters():
            if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{name}.{part} is missing from the checkpoint or not finite: without it this is another model"
                )


@functools.cache
def _with(mixin: type, native: type) -> type:
    made = {"__module__": native.__module__, "__reduce_ex__": lambda module, _: (_new, (mixin, native), vars(module))}
    return type(native.__name__, (mixin, native), made)


def _new(mixin: type, native: type) -> Any:
    """A module of both, as pickle makes one before it fills it."""
    return nn.Module.__new__(_with(mixin, native))


def _guard(module: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: no call passes by what stands in front of the module's class (kernels replace `forward`)."""
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        raise ValueError(
            f"{type(module).__name__} runs another forward than its own, without what this model keeps of its prefix: "
            "load it without use_kernels"
        )


def put_in_front(module: Any, mixin: type, undo: contextlib.ExitStack) -> None:
    """Have `mixin` stand in front of the module's own class, until `undo` is closed."""
    native: type = type(module)
    module.__class__ = _with(mixin, native)
    undo.callback(setattr, module, "__class__", native)
    undo.callback(module.register_forward_pre_hook(_guard).remove)
    if (forward := vars(module).get("_old_forward")) is not None:  # accelerate holds the forward that it wrapped
        module._old_forward = types.MethodType(type(module).forward, module)
        undo.callback(setattr, module, "_old_forward", forward)
