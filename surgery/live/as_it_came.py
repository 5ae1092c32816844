"""An encoder as it came, while operations stand in it: what they have put in place is taken away for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..runtime.eab_runtime import Slots
from .model import Live
from .places import on_layer


class _Reversible:
    """Something that stands in a model, and can be taken out and put back."""

    def __init__(self, install: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        self.install, self.undo = install, contextlib.ExitStack()

    def put(self) -> None:
        self.undo.enter_context(self.install())

    def take(self) -> None:
        self.undo.close()


def _standing(live: Live) -> list[_Reversible]:
    """What stands in the model, in order; kept where it stands."""
    found: list[_Reversible] = vars(live.trunk).setdefault("_standing", [])
    return found


@contextlib.contextmanager
def reversibly(live: Live, install: Callable[[], contextlib.AbstractContextManager[object]]) -> Iterator[None]:
    """An encoder with what `install` puts in place, within the block; `as_it_came` takes it away for a while."""
    graft, standing = _Reversible(install), _standing(live)
    graft.put()
    standing.append(graft)
    try:
        yield
    finally:
        standing.remove(graft)
        graft.take()


@contextlib.contextmanager
def as_it_came(live: Live) -> Iterator[None]:
    """Within the block an encoder computes as it did before slots were grafted: with none, and with all of its tokens.

    Of a language model slots are its prefix, and nothing has to be taken away for it to be the original.
    """
    with contextlib.ExitStack() as undo:
        for graft in reversed(_standing(live)):
            graft.take()
            undo.callback(graft.put)
        for module in live.trunk.modules():
            if isinstance(module, Slots):
                undo.callback(module.register_forward_hook(_none_of).remove)
        yield


def _none_of(slots: torch.nn.Module, args: object, held: tuple[torch.Tensor, torch.Tensor]) -> Any:
    return tuple(part[:0] for part in held)


@contextlib.contextmanager
def left_out(live: Live, first: int, stop: int) -> Iterator[None]:
    """An encoder in which the tokens `first` to `stop` - 1 of each image end before the first block."""

    def without(states: torch.Tensor) -> torch.Tensor:
        return torch.cat([states[:, :first], states[:, stop:]], dim=1)

    hook = on_layer(live, 0, without)
    try:
        yield
    finally:
        hook.remove()
