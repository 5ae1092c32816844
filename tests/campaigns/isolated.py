"""Tries in a forked child that is watched: a hang, a crash or a hunger for memory ends it, and the next goes on."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MB = 1 << 20


def watched(
    tries: Sequence[Any], attempt: Callable[[Any], str | None], seconds: float, memory: int
) -> Iterator[tuple[Any, str | None]]:
    """(a try, what was wrong with it or None) of each: what `attempt` says, or a limit that it went over.

    `seconds`: by the wall clock, of one try. `memory`: bytes that one try may take beyond what stood before it.
    """
    left = list(tries)
    while left:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _work(left, attempt, writer, memory)
        os.close(writer)
        done = 0
        for fault in _heard(reader, seconds):
            yield left[done], fault
            done += 1
            if done == len(left):
                break
        else:
            yield left[done], _death(child)
            done += 1
        os.close(reader)
        _end(child)
        left = left[done:]


def _work(tries: Sequence[Any], attempt: Callable[[Any], str | None], writer: int, memory: int) -> None:
    """The child: a line of JSON for each try, then the end of the process, whatever happens."""
    try:
        os.setpgid(0, 0)
        for one in tries:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the tries before
            before = _status("VmRSS")
            resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 4 * memory, resource.RLIM_INFINITY))
            fault = attempt(one)
            grown = _status("VmHWM") - before
            if fault is None and grown > memory:
                fault = f"took {grown // MB:,} MB"
            os.write(writer, json.dumps(fault).encode() + b"\n")
    finally:
        os._exit(0)


def _status(key: str) -> int:
    """Bytes that the kernel says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _heard(reader: int, seconds: float) -> Iterator[str | None]:
    """What the child says of each try; ends where it says nothing for so long, or is gone."""
    rest, until = b"", time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, until - time.monotonic()))
        data = os.read(reader, 1 << 16) if ready else b""
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line)
        until = time.monotonic() + seconds


def _death(child: int) -> str:
    ended = status = 0
    for _ in range(100):  # its pipe is closed a moment before it can be waited for
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.01)
    if not ended:
        return "hung"
    return f"killed its process ({signal.Signals(os.WTERMSIG(status)).name})" if os.WIFSIGNALED(status) else "left"


def _end(child: int) -> None:
    """The child and all that it started."""
    for kill in (os.killpg, os.kill):
        try:
            kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    try:
        os.waitpid(child, 0)
    except ChildProcessError:  # it has been asked for before
        return
