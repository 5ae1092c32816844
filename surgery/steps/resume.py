"""Finished steps of a run, kept in a directory (`--resume`), from which a run that was cut off goes on.

A step is taken up only by a run of the same identity: recipe, source, texts, settings, versions. Each is one file that
is replaced as a whole, so it is there complete or not at all. They are read as `torch.load` reads weights, without
running anything: of classes only those of surgery's that hold plain data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..checkpoint.copying import sha256_of
from ..checkpoint.disk import disk_errors, replacing
from ..checkpoint.regular import open_regular, read_json
from ..endings.leftovers import clear, leftovers
from ..errors import OutputError, SurgeryError, brief
from ..live.stream import Observer
from ..progress import Reporter

if TYPE_CHECKING:
    from ..checkpoint.witness import Reading
    from .options import RunOptions
    from .plan import Plan
    from .ready import Ready

IDENTITY, LOCK, SUFFIX = "steps.json", "lock", ".step"
# Names of steps -> what they are called.
STEPS = {
    "search": "the search for a prefix",
    "operated": "what the operations made",
    "original": "what the original measures",
}

T = TypeVar("T")


class Steps:
    """Steps that are kept nowhere: each is done whenever it is asked for."""

    def begin(self, identity: Mapping[str, Any]) -> None:
        """From here on it is known what this run is a run of."""

    def once(self, name: str, work: Callable[[], T]) -> T:
        """What `work` returns; what it returned before where the step `name` was finished by an earlier run."""
        return work()


ALWAYS = Steps()


class KeptSteps(Steps):
    """Steps kept in `directory`, which this process has to itself."""

    def __init__(self, directory: Path, reporter: Reporter) -> None:
        self.directory, self.reporter = directory, reporter

    def begin(self, identity: Mapping[str, Any]) -> None:
        identity = json.loads(json.dumps(identity))  # as it will be read again
        path = self.directory / IDENTITY
        if path.exists():
            try:
                before = read_json(path)
            except SurgeryError:
                before = {}
            if before == identity:
                return
            other = sorted(key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key))
            self.reporter.note(
                f"{self.directory} holds steps of another run (not the same: {', '.join(other)}), "
                "which are not taken up, and go"
            )
        with disk_errors(self.directory):
            for name in STEPS:  # first: whoever is killed here leaves what still goes together
                self._file(name).unlink(missing_ok=True)
            with replacing(path) as partial:
                partial.write_text(json.dumps(identity, indent=2), encoding="utf-8")

    def once(self, name: str, work: Callable[[], T]) -> T:
        path = self._file(name)
        if os.path.lexists(path):
            try:
                found: T = _read(path)
                self.reporter.note(f"{STEPS[name]} is taken up from {self.directory}")
                return found
            except Exception as error:  # whatever is in the way, the work can be done again
                self.reporter.note(f"{path} cannot be taken up ({brief(error)}), so that is done again")
        value = work()
        try:
            with disk_errors(self.directory), replacing(path) as partial:
                torch.save(value, partial)
        except SurgeryError as error:  # the work is done, and the run goes on with it
            self.reporter.note(f"{STEPS[name]} is not kept for --resume: {str(error).rstrip('.')}")
        return value

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}{SUFFIX}"


@contextlib.contextmanager
def keeping(directory: Path | None, reporter: Reporter) -> Iterator[Steps]:
    """Steps in `directory`, made where it is not there; OutputError while another process is at work in it."""
    if directory is None:
        yield Steps()
        return
    with disk_errors(directory):
        directory.mkdir(mode=0o700, exist_ok=True)
        _require_own(directory)
        for left in leftovers(directory):  # of a run that was killed while it wrote, or looked whether it can
            clear(left)
        if not (directory / IDENTITY).exists() and any(path.name != LOCK for path in directory.iterdir()):
            raise OutputError(f"{directory} (--resume) holds other files and no {IDENTITY}; give an empty directory.")
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"another run is at work in {directory} (--resume); wait for it, or give another."
            ) from error
        yield KeptSteps(directory, reporter)
    finally:
        os.close(lock)


def _require_own(directory: Path) -> None:
    """OutputError for a directory to which others write: steps decide what is written."""
    state = directory.stat()
    if state.st_uid != os.geteuid() or state.st_mode & stat.S_IWOTH:
        raise OutputError(f"{directory} (--resume) is another user's, or can be written by all; give one of your own.")


def identity(
    plan: Plan, reading: Reading, ready: Ready, options: RunOptions, versions: Mapping[str, str]
) -> dict[str, Any]:  # fmt: skip
    """What makes two runs the same one."""
    return {
        "recipe": plan.recipe.to_dict(),
        "source": {"files": reading.recorded, "dtype": options.dtype},
        "evaluation text": _of_chunks(ready.evaluation),
        "calibration text": _of_chunks(ready.calibrating),
        "options": {"verify": options.verify, "surveys": options.surveys, "device": options.device},
        "tasks": _of_files(options.tasks),
        "versions": dict(versions),
    }


def _of_files(folder: Path | None) -> dict[str, str] | None:
    """SHA-256 of each file below `folder`, by its name in there."""
    if folder is None:
        return None
    return {
        path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _of_chunks(chunks: torch.Tensor | None) -> str | None:
    """Which token ids these are."""
    return None if chunks is None else hashlib.sha256(chunks.contiguous().numpy().tobytes()).hexdigest()


def _read(path: Path) -> Any:
    with open_regular(path) as file:
        kinds: list[Any] = [_plain(name) for name in get_unsafe_globals_in_checkpoint(file)]
        file.seek(0)
        with safe_globals(kinds):
            return torch.load(file, weights_only=True, map_location="cpu")


def _plain(name: str) -> type:
    """A class that holds plain data, of surgery's or a set; ValueError for anything else that a file may name."""
    if name == "builtins.frozenset":
        return frozenset
    module, _, kind = name.rpartition(".")
    if module.split(".")[0] == __package__.split(".")[0]:
        found = getattr(sys.modules.get(module), kind, None)
        if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Observer)):
            return found
    raise ValueError(f"it names {name[:60]}, which is no plain data of surgery's")
