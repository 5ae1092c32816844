"""Directories of processes that were killed, and scripts that are ended by signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

# Whoever started the tests in the background has signals ignored, for children too.
_DEFAULT = """
import os, signal, sys, time
from pathlib import Path
from surgery.endings.owned import Owned
from surgery.endings.signals import *
"""
_KILLED = """
name = sys.argv[2] or None
owned = Owned(Path(sys.argv[1]), name)
owned.__enter__()
owned.inside.mkdir()
(owned.inside / "weights").write_bytes(bytes(1000))
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(parent: Path, name: str | None = None) -> Path:
    """What a process left in `parent` that was killed while it wrote `name` there: a file of 1,000 bytes inside."""
    before = set(parent.iterdir())
    subprocess.run([sys.executable, "-c", _DEFAULT + _KILLED, str(parent), name or ""], cwd=ROOT, check=False)
    (left,) = set(parent.iterdir()) - before
    return left


@dataclass(frozen=True)
class Signalled:
    code: int
    out: str
    err: str


def signalled(
    script: str, argument: Path, send: Callable[[subprocess.Popen], None], ignored: Sequence[signal.Signals] = ()
) -> Signalled:
    """Run `script` until it has printed "ready", then `send` it what is to end it."""

    def handlers() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    child = subprocess.Popen(
        [sys.executable, "-c", _DEFAULT + script, str(argument)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        preexec_fn=handlers,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    send(child)
    out, err = child.communicate(timeout=60)
    return Signalled(child.returncode, out.decode(), err.decode())
