"""Many forwards of one model in one pass over its weights.

Each forward runs in a greenlet, and waits wherever its model comes to the gate of a unit (`layerwise`). The unit is
loaded when all wait, then each passes it in its turn, while the next is read. So weights are read once, however many
batches, prefixes or variants of a model there are, and nothing has to know the signature of a block.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import greenlet
import torch

from .aside import Aside
from .layerwise import Layerwise

T = TypeVar("T")


def together(layers: Layerwise | None, jobs: Sequence[Callable[[], T]]) -> list[T]:
    """What each of `jobs` returns, in their order: calls of a model of `layers`, or of its twins; None: it is resident.

    Of jobs that wait for the same unit, the first goes first; so what an observer sees of one layer comes in the order
    of the jobs, as it does where one job follows the other. An error of one ends them all.
    """
    if layers is None or layers.waiting is not None:  # a job's own jobs: each waits where it comes to a gate
        return [job() for job in jobs]
    with layers.reading(), Aside(layers.aside) as aside:
        return _Passing(layers, aside).run(jobs)


class _Passing:
    """One pass. `at`: the gate whose unit is loaded."""

    def __init__(self, layers: Layerwise, aside: Aside) -> None:
        self.layers, self.aside, self.hub = layers, aside, greenlet.getcurrent()
        self.at: str | None = None
        self.parked: dict[greenlet.greenlet, str] = {}
        self.results: dict[greenlet.greenlet, Any] = {}

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        started = []
        self.layers.waiting = self._wait
        try:
            for job in jobs:
                one = greenlet.greenlet(job)
                one.gr_context = contextvars.copy_context()
                started.append(one)
                self._go_on(one)
            while self.parked:
                self._pass(min(self.parked.values(), key=self.layers.order.__getitem__))
            return [self.results[one] for one in started]
        finally:
            try:
                for one in started:
                    if not one.dead:
                        one.throw()  # unwinds what it has open
            finally:
                self.layers.waiting = None
                self.layers.release()

    def _pass(self, gate: str) -> None:
        """Load the unit of `gate`, and let all pass it that wait for it."""
        self.at = gate
        self.layers.load(gate)
        gates = list(self.layers.order)
        if (after := self.layers.order[gate] + 1) < len(gates):
            self.layers.read_ahead(gates[after])
        for one in [one for one, wanted in self.parked.items() if wanted == gate]:
            self._go_on(one)

    def _go_on(self, one: greenlet.greenlet) -> None:
        self.parked.pop(one, None)
        came_to = one.switch()
        if one.dead:
            self.results[one] = came_to
        else:
            self.parked[one] = came_to

    def _wait(self, gate: str, states: torch.Tensor | None) -> None:
        if gate == self.at:
            return
        if greenlet.getcurrent() is self.hub:
            self.layers.load(gate)
        else:
            with self.aside.put(states):
                self.hub.switch(gate)
