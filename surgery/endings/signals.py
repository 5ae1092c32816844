"""Signals that ask a process to end: Ctrl-C, SIGTERM, SIGHUP.

In a command (`command_begins`) such a signal ends the process at once, from inside its handler: what it has open is
removed, one sentence is said, and it exits with 128 + the signal's number. No exception is raised, for serializers,
imports and destructors turn those into other errors or lose them. From Python (`caught`) it is KeyboardInterrupt or
SystemExit, as ever.

A process has one set of handlers, and so one `_Process`: the only state of this kind.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading

from ..plain import shown

TYPE_CHECKING = False  # what typing calls so; this is imported before a signal can be heard, so it imports little
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType
    from typing import Any

_ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Process:
    """What this process is doing, as far as its end is concerned."""

    def __init__(self) -> None:
        self.command: int | None = None  # its id while it is a command: a forked child is not
        self.code: int | None = None  # how the command has ended, once it has
        self.held = 0  # how many blocks are running that must not be cut off
        self.waiting: int | None = None  # the signal that came meanwhile
        self.before: dict[int, Any] = {}  # the handlers that a command has replaced
        self.published: list[Path] = []
        self.cleaning: dict[int, Callable[[], Path | None]] = {}  # each removes, and returns what would not go


_process = _Process()


def command_begins() -> None:
    """From now on signals end the process at once. One that is ignored (nohup, background jobs) stays ignored."""
    _process.command, _process.code, _process.waiting, _process.published = os.getpid(), None, None, []
    _process.before = _take()


def command_ends(code: int) -> int:
    """The work is done, and signals that come while the interpreter is taken down change nothing; returns `code`."""
    _process.code = code
    return code


def command_released() -> None:
    """For a program that has called the command line and goes on: handlers as they were before."""
    _process.command = _process.code = None
    _put_back(_process.before)


class caught:
    """A block in which SIGTERM and SIGHUP are SystemExit, and none of them cuts off what `held` protects.

    Only in the main thread, and only those that nobody else handles. At the end what was there before is put back.
    """

    def __enter__(self) -> None:
        self._before = _take()

    def __exit__(self, *error: object) -> None:
        _put_back(self._before)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A block that signals do not cut off: they are heard at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    _process.held += 1
    try:
        yield
    finally:
        _process.held -= 1
        if not _process.held and (number := _process.waiting) is not None:
            _process.waiting = None
            _end(number)


def on_ending(key: int, clean: Callable[[], Path | None]) -> None:
    """Before a signal ends the process `clean` is called, which returns what it could not remove."""
    _process.cleaning[key] = clean


def no_longer(key: int) -> None:
    """Take back `on_ending`."""
    _process.cleaning.pop(key, None)


def has_published(path: Path) -> None:
    """Whatever happens from now on, `path` is complete: errors and endings say so."""
    _process.published.append(path)


def published() -> str | None:
    """What has been published, as a clause of a sentence."""
    if not _process.published:
        return None
    return f"{' and '.join(map(str, _process.published))} had been written before, complete"


def _take() -> dict[int, Any]:
    """Put our handler where nobody has one; what was there."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    free = (signal.SIG_DFL, signal.default_int_handler)
    return {number: signal.signal(number, _heard) for number in _ASKING if signal.getsignal(number) in free}


def _put_back(handlers: dict[int, Any]) -> None:
    while handlers:
        signal.signal(*handlers.popitem())


def _heard(number: int, frame: FrameType | None) -> None:
    if _process.command is not None and os.getpid() != _process.command:  # a worker of ours, which owns nothing
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif _process.held:
        _process.waiting = _process.waiting or number
    else:
        _end(number)


def _end(number: int) -> None:
    if _process.command is None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
    _process.held += 1  # whatever comes now only waits
    code = 128 + number if _process.code is None else _process.code
    try:
        _kill_children()
        left = [path for clean in [*_process.cleaning.values()] if (path := clean()) is not None]
        if _process.code is None:
            _say(number, left)
    finally:
        os._exit(code)


def _say(number: int, left: list[Path]) -> None:
    """The one sentence, without anything that an import, a lock or a reader who does not read could keep from us."""
    said = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    if left:
        more = f"{left[0]} could not be removed, so remove it by hand"
    else:
        more = published() or "nothing unfinished is left behind"
    with contextlib.suppress(OSError, ValueError):
        begin = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # over a progress bar, which has hidden the cursor
        if select.select([], [2], [], 1)[1]:
            os.write(2, f"{begin}error {shown(f'{said}; {more}')}.\n".encode("utf-8", "backslashreplace"))


def _kill_children() -> None:
    """Workers do not outlive the command, whatever they are doing; what they have open is the command's."""
    with contextlib.suppress(OSError):  # where there is no such file, they see their parent go
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/children", encoding="ascii") as listed:
                for child in listed.read().split():
                    with contextlib.suppress(OSError):
                        os.kill(int(child), signal.SIGKILL)
