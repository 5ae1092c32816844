"""Progress: long work reports through one object, which callers can leave out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

# How all long work tells that it advances: so many units (sequences, steps, bytes) since the last call, and of what.
Advance = Callable[[int, str], None]


def unseen(count: int, what: str) -> None:
    """The `Advance` of work that nobody watches."""


class Reporter:
    """Silent: what the Python verbs use unless told otherwise."""

    def step(self, text: str) -> None:
        """A step has begun."""

    @contextlib.contextmanager
    def bar(self, what: str, total: int | None, *, of_bytes: bool = False) -> Iterator[Advance]:
        """A progress bar (`total` None: of unknown length); yields its `Advance`."""
        yield unseen

    def note(self, text: str) -> None:
        """Something a person should know."""


SILENT = Reporter()
