"""Files and JSON that come from strangers: opened only where they are plain files, read only as far as is sane."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DamagedCheckpoint, SourceError
from ..words import named

MAX_JSON = 100_000_000  # bytes of an index or a manifest; the largest that are known have a fifth of it
MAX_PARTS = 2_000_000  # objects and lists in one JSON text: what a hostile one could fill memory with
MAX_DEPTH = 64  # of objects and lists in each other: copying deeper ones ends in Python's recursion limit
_LFS = b"version https://git-lfs"
AGAIN = "download or save the checkpoint again"


def open_regular(path: Path) -> BinaryIO:
    """`path`, opened to be read; OSError where it is a pipe, a device or a directory, which could hang or never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_json(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in `path`; DamagedCheckpoint for anything else: duplicate keys, Git-LFS pointers, over `most`
    bytes."""
    try:
        with open_regular(path) as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    if is_lfs_pointer(raw):
        raise lfs_pointer(path)
    if len(raw) > most:
        raise DamagedCheckpoint(f"{path} is larger than {most // 1_000_000} MB, which no such file is; {AGAIN}.")
    return parse_object(raw, str(path))


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object `raw`; DamagedCheckpoint, which says `where`, for what is none or could not be worked with."""
    if raw.count(b"{") + raw.count(b"[") > MAX_PARTS:
        raise DamagedCheckpoint(f"{where} holds more than {MAX_PARTS:,} objects and lists; {AGAIN}.")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # lone surrogates would break every message later
        _require_shallow(value)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} is not valid JSON ({named(error, 120)}); {AGAIN}.") from None
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{where} is not a JSON object; {AGAIN}.")
    return value


def parse_any(raw: bytes | str, where: str) -> Any:
    """The JSON value `raw`, None where it is none; DamagedCheckpoint for one that is nested too deep to be looked into.

    How deep Python reads depends on how deep the program is that asks, so another one may read what we cannot.
    """
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    except RecursionError:
        raise DamagedCheckpoint(f"{where} is nested deeper than any such file is; {AGAIN}.") from None
    try:
        _require_shallow(value)
    except ValueError as error:
        raise DamagedCheckpoint(f"{where} is nested deeper than any such file is; {AGAIN}.") from error
    return value


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key '{named(key, 60)}' is there twice")
        result[key] = value
    return result


def _require_shallow(value: object) -> None:
    """ValueError where objects and lists lie deeper in each other than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [part for parts in inside for part in parts if isinstance(part, (dict, list))]
        if not level:
            return
    raise ValueError(f"objects and lists lie more than {MAX_DEPTH} deep in each other")


def lfs_pointer(path: Path) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path} is a Git-LFS pointer, not the file itself; fetch it with: git lfs pull.")


def is_lfs_pointer(head: bytes) -> bool:
    return head.startswith(_LFS)


def is_plain_name(name: str) -> bool:
    """Whether `name` is a file name and nothing more: no separators, no parent, no control characters, UTF-8."""
    return name not in ("", ".", "..") and not any(c in "/\\:" or c < " " or "\ud800" <= c <= "\udfff" for c in name)
