"""Provenance: what an act (a run, a verification, a survey) was done with, so that others can do it again.

It names no user and no directory: paths are reduced to their names, and files are told by their SHA-256.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import SourceError
from ..version import VERSION
from .copying import sha256_of

EPOCH = "SOURCE_DATE_EPOCH"  # reproducible-builds.org: the date to write in place of the clock's
LAST_SECOND = 253402300799  # of the year 9999
_SECRET = re.compile(r"\bhf_\w{8,}")  # a token of the hub

Short = Annotated[str, Field(max_length=1000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    """Keys of later versions are passed over."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class TextFile(_Part):
    """A file of text by its name, its size and its hash."""

    name: Short
    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


class TextFiles(_Part):
    """Text that was evaluated on and calibrated on. `split`: one text was both, its first half for calibration."""

    evaluation: list[TextFile] = []
    calibration: list[TextFile] = []
    split: bool = False


class Cut(_Part):
    """So many chunks of so many tokens; of images there is only their number."""

    count: Annotated[int, Field(ge=1, le=10**9)]
    length: Annotated[int, Field(ge=2, le=10**9)] | None = None


class Cuts(_Part):
    """How evaluation and calibration text (or images) were cut; None for what was not read."""

    evaluation: Cut | None = None
    calibration: Cut | None = None


class Provenance(_Part):
    """One act. `date` is when it began, in UTC; `dtype` is what models computed in; `command` is empty from Python.

    `versions`: of Python, of the packages that compute, and of the platform.
    """

    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    command: list[Short] = []
    device: Short
    dtype: Short
    versions: dict[Short, Short]
    texts: TextFiles = TextFiles()
    chunks: Cuts = Cuts()


def moment() -> str:
    """Now in UTC, as ISO 8601; or what SOURCE_DATE_EPOCH says. SourceError where that is no number of seconds."""
    given = os.environ.get(EPOCH)
    if given is None:
        seconds = int(time.time())
    elif re.fullmatch(r"\d{1,12}", given, re.ASCII) and int(given) <= LAST_SECOND:
        seconds = int(given)
    else:
        raise SourceError(f"{EPOCH} is {given[:40]!a}, not a number of seconds since 1970; mend or unset it.")
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def versions() -> dict[str, str]:
    """What computes: packages, Python, and the platform (system, kernel, machine; no host name)."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    return {"surgery": VERSION, **found, "python": platform.python_version(), "platform": platform.platform()}


def name_of(path: Path | str) -> str:
    """The last part of a path, which is all that may be told of it; that of a home directory is its user's name."""
    full = _full(path)
    name = os.path.basename(os.path.normpath(os.path.expanduser(path)))
    if full == _full("~"):
        return "~"
    return name if name not in ("", ".", "..") else os.path.basename(full) or full


def _full(path: Path | str) -> str:
    """`path` from the root on, links followed; as it is where that cannot be told (the working directory is gone)."""
    try:
        return os.path.realpath(os.path.expanduser(path))
    except (OSError, ValueError):
        return os.path.normpath(path)


def described(paths: Iterable[Path | str]) -> list[TextFile]:
    """Files of text that have been read, by name, size and hash. SourceError for one that is there no more."""
    found = []
    for path in map(Path, paths):
        try:
            entry = TextFile(name=plain(name_of(path)), bytes=path.stat().st_size, sha256=sha256_of(path))
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror}); give a text file.") from error
        found.append(entry)
    return found


def command_line(arguments: Sequence[str], hub_ids: Collection[str] = ()) -> list[str]:
    """Arguments with every path reduced to its name, and tokens of the hub to a word; ids of the hub stay."""
    return [plain(_reduced(argument, hub_ids)) for argument in arguments]


def _reduced(argument: str, hub_ids: Collection[str]) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    if not equals and option:
        return _SECRET.sub("TOKEN", option)
    is_path = os.sep in value or value in (".", "..") or value.startswith("~")
    if is_path and value.partition("@")[0] not in hub_ids:
        value = name_of(value)
    return _SECRET.sub("TOKEN", f"{option}{equals}{value}")


def plain(name: str) -> str:
    """A name that every JSON reader takes, of bounded length: bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode()[:1000]


def names_only(value: Any, paths: Iterable[Path | str]) -> Any:
    """`value` (JSON) with these paths, wherever they stand in its texts, reduced to their names."""
    told = {str(path): plain(name_of(path)) for path in map(Path, paths) if os.sep in str(path)}
    told |= {_full(path): name for path, name in told.items()}
    longest_first = sorted(told, key=len, reverse=True)

    def reduced(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: reduced(item) for key, item in part.items()}
        if isinstance(part, (list, tuple)):
            return [reduced(item) for item in part]
        if isinstance(part, str):
            for path in longest_first:
                part = part.replace(path, told[path])
        return part

    return reduced(value)
