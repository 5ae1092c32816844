"""Run what a stranger wrote (a chat template, a tokenizer) in a child with limits, and tell its death in words.

Such a program may loop, take all memory or crash the library that reads it. None of that can be caught in the process
where it happens, so it happens in a fork first. A fork has everything imported and loaded, and costs milliseconds where
a new interpreter would cost seconds. It is safe for what is done in it: it runs one function on its only thread, uses
neither torch nor a GPU, writes to its pipe alone, and ends without running anybody's exit handlers. The tokenizers
library is told not to use its threads, which a fork does not have.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import logging
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from .errors import brief, out_of_memory

GIB = 2**30
PATIENCE, SHARE = 60, 6  # a child ends after so many seconds, and times its processor time: machines may be busy
_OURS = (signal.SIGALRM, signal.SIGXCPU, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # which may have handlers here
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_THREADS = "TOKENIZERS_PARALLELISM"


class Unbounded(Exception):
    """What a child was asked to do did not end well. `str(error)` is a clause: "it needs more than 1 GiB of memory"."""


def bounded(function: Callable[..., Any], *arguments: Any, seconds: int, memory: int) -> Any:
    """`function(*arguments)`, computed in a child with `seconds` of processor time and `memory` bytes more than we.

    The arguments are handed over as they are in memory; the result comes back as JSON. Raises Unbounded where the child
    takes longer, needs more, crashes, or where the function raises.
    """
    (reader, writer), parent = os.pipe(), os.getpid()
    with _forking():
        try:
            child = os.fork()
        except OSError as error:
            os.close(reader)
            os.close(writer)
            raise Unbounded(f"no process could be started for it: {error.strerror}") from error
        if child == 0:
            os.close(reader)
            _work(writer, function, arguments, seconds, memory, parent)
    try:
        os.close(writer)
        with open(reader, "rb") as pipe:
            answer = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if not answer or os.WIFSIGNALED(status):
        raise Unbounded(_death(status, seconds, memory))
    said = json.loads(answer)
    if "error" in said:
        cause = OSError(*said["of the system"]) if said.get("of the system") else None
        raise Unbounded(_too_large(memory) if said["error"] is None else said["error"]) from cause
    return said["result"]


def _work(
    writer: int, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: int, memory: int, parent: int
) -> NoReturn:  # fmt: skip
    """The child: does the work, answers, and ends."""
    try:
        gc.freeze()  # nothing of our parent's is to be finalised here
        _limit(seconds, memory, parent)
        try:
            answer = json.dumps({"result": function(*arguments)})
        except BaseException as error:  # panics of Rust libraries are no Exceptions
            system = [error.errno, error.strerror, os.fsdecode(error.filename)] if _of_a_file(error) else None
            answer = json.dumps({"error": None if out_of_memory(error) else brief(error), "of the system": system})
        data = answer.encode()
        while data:
            data = data[os.write(writer, data) :]
    finally:
        os._exit(0)


def _of_a_file(error: BaseException) -> TypeGuard[OSError]:
    """Whether the operating system has said this of a file: which of them it is may say more than a stranger's do."""
    return isinstance(error, OSError) and error.errno is not None and isinstance(error.filename, (str, bytes))


def _limit(seconds: int, memory: int, parent: int) -> None:
    """Let the kernel end this process when it has had its time, and refuse it memory when it has had that.

    It says nothing besides its answer: what our parent writes through may be locked by a thread that is not here.
    """
    _die_with(parent)
    faulthandler.disable()
    logging.disable()
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.stdout = sys.stderr = open(nowhere, "w")
    for number in _OURS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, _at_most(resource.RLIMIT_CPU, seconds))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE + SHARE * seconds)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, _at_most(resource.RLIMIT_AS, taken + memory))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` is killed: it holds what that has locked."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(0)


def _at_most(kind: int, value: int) -> tuple[int, int]:
    """`value` as soft limit, unless the limit that is there is lower."""
    soft, hard = resource.getrlimit(kind)
    known = [limit for limit in (soft, hard, value) if limit != resource.RLIM_INFINITY]
    return min(known), hard


@contextlib.contextmanager
def _forking() -> Iterator[None]:
    """A fork made in here uses no threads of the tokenizers library, which otherwise says so on standard error.

    Nor does it run our handlers of signals, which clean up what is ours, before it has put them away.
    """
    before, mask = os.environ.get(_THREADS), signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _death(status: int, seconds: int, memory: int) -> str:
    """Why a child that said nothing died, from its wait status."""
    if not os.WIFSIGNALED(status):
        return "it ended without a word"
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return f"it does not end within {seconds} s"
    if number == signal.SIGALRM:
        return f"it waits for something for more than {PATIENCE + SHARE * seconds} s"
    if number in (signal.SIGABRT, signal.SIGKILL):  # how libraries, and the system, answer to memory that is refused
        return f"{_too_large(memory)}, or crashes"
    return f"it crashes ({signal.Signals(number).name})"


def _too_large(memory: int) -> str:
    return f"it needs more than {memory / GIB:.0f} GiB of memory"
