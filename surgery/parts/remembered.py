"""Remembered inputs: what a mixer with a state was given of a prefix."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..anatomy.mixers import Mixer
from ..anatomy.sites import Anatomy
from .base import Keep, Kind


class RememberedInputs(Kind):
    name = "remembered inputs"
    key = "mixers"
    held = "remembered_inputs"

    def shapes(self, n: int, declared: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """(n, width) for each argument of a mixer that is a sequence."""
        return {
            f"{mixer}.{self.held}.{argument}": (n, width)
            for mixer, entry in declared.items()
            for argument, width in entry["inputs"].items()
        }

    def values(self, held: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = held()
        return found

    @contextlib.contextmanager
    def reading(self, anatomy: Anatomy, trunk: torch.nn.Module, keep: Keep) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            for mixer in anatomy.mixers:
                module = trunk.get_submodule(mixer.name)
                entering = functools.partial(
                    self._entering, mixer, [*inspect.signature(module.forward).parameters], keep
                )
                undo.callback(module.register_forward_pre_hook(entering, with_kwargs=True).remove)
            yield

    def _entering(
        self, mixer: Mixer, names: Sequence[str], keep: Keep, module: torch.nn.Module, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for argument in mixer.inputs:
            keep(f"{mixer.name}.{self.held}.{argument}", given[argument][0].clone())
