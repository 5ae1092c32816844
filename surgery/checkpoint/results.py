"""Files that a command writes its result to (--json, --junit): refused before the work begins, written whole or not."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..endings.owned import Owned
from ..errors import OutputError
from ..plain import shown_json
from .disk import replacing, require_name

STDOUT = Path("-")  # as a result's path: standard output


def require_result_file(path: Path | None, option: str, apart_from: Iterable[Path | str] = ()) -> None:
    """Raise OutputError unless `path` can be written and is none of `apart_from`, nor inside one of them.

    An older result there is removed: until this command is done, nothing must pass for what it found.
    """
    if path is None:
        return
    if path == STDOUT:
        if STDOUT in apart_from:
            raise OutputError(f"only one result can go to standard output; give {option} a file.")
        if sys.stdout is None:
            raise OutputError(f"standard output is closed; give {option} a file.")
        return
    require_name(path)
    if path.is_dir():
        raise OutputError(f"{path} is a directory; give a file for {option}.")
    require_apart(path, option, apart_from)
    if path.exists() and not _is_written(path):
        raise OutputError(f"{path} is a pipe or a device, not a regular file; give another path for {option}.")
    if not path.parent.is_dir():
        raise OutputError(
            f"{path.parent}, which is to hold {path.name}, is not a directory; create it or change {option}."
        )
    try:
        if _is_replaced(path):
            path.unlink(missing_ok=True)
            with replacing(path) as partial:
                partial.touch()
            path.unlink()
        else:
            made = not path.exists()  # the file that a link leads to
            path.open("ab").close()
            if made:
                path.resolve().unlink()
    except OSError as error:
        raise _unwritable(path, option, error) from error


def require_apart(path: Path, option: str, apart_from: Iterable[Path | str]) -> None:
    """Raise OutputError if `path` is one of `apart_from`, or lies in one."""
    for other in map(Path, apart_from):
        if other.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutputError(f"{path} would change {other}, which is not for results; give another path for {option}.")


def require_result_folder(path: Path | None, option: str, apart_from: Iterable[Path | str] = ()) -> None:
    """Raise OutputError unless `path` is, or can become, a directory to write to that lies in none of `apart_from`."""
    if path is None:
        return
    require_apart(path, option, apart_from)
    made = not path.exists()
    try:
        path.mkdir(exist_ok=True)
        with Owned(path):
            pass
        if made:
            path.rmdir()
    except OSError as error:
        raise _unwritable(path, option, error) from error


def write_result(path: Path | None, option: str, text: str) -> None:
    """Write `text` to `path`, if there is one: an existing file keeps its content until the new one is complete."""
    if path is None:
        return
    try:
        if path == STDOUT:
            _to_standard_output(text)
            return
        if not _is_replaced(path):
            path.write_text(text, encoding="utf-8")
            return
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, option, error) from error


def _to_standard_output(text: str) -> None:
    """In UTF-8 whatever the terminal's encoding; a reader that has gone away does not change how the command ends."""
    try:
        if (binary := getattr(sys.stdout, "buffer", None)) is not None:
            sys.stdout.flush()
            binary.write(text.encode("utf-8"))
            binary.flush()
        else:
            sys.stdout.write(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def json_text(result: Mapping[str, Any]) -> str:
    """JSON as every reader takes it: `plain_json` has taken NaN and infinities out.

    What a terminal would obey is written as escapes of JSON: it may go to one.
    """
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{shown_json(text)}\n"


def _is_replaced(path: Path) -> bool:
    """Whether `path` is replaced by a rename; devices and links (/dev/stdout is both) are written into instead."""
    return not path.is_symlink() and (path.is_file() or not path.exists())


def _is_written(path: Path) -> bool:
    """Whether `path` is a regular file, the null device, or one of this process's own outputs (/dev/stdout)."""
    known = path.stat()
    own = (os.fstat(stream) for stream in (1, 2) if _is_open(stream))
    return stat.S_ISREG(known.st_mode) or path.samefile(os.devnull) or any(os.path.samestat(known, one) for one in own)


def _is_open(stream: int) -> bool:
    try:
        os.fstat(stream)
    except OSError:
        return False
    return True


def _unwritable(path: Path, option: str, error: OSError) -> OutputError:
    if path == STDOUT:
        return OutputError(f"standard output cannot be written ({error.strerror}); give a file for {option}.")
    return OutputError(f"{path} cannot be written ({error.strerror}); give another path for {option}.")
