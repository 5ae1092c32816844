"""Files that are given for an encoder, one by one or as directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import SourceError


def every_file(given: Sequence[Path], suffixes: Sequence[str], called: str, option: str) -> list[Path]:
    """The files among files and directories, which are searched for those with one of `suffixes`, in order.

    `called`: what they are, and by which `option` they were given.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += sorted(one for one in path.iterdir() if one.suffix.lower() in suffixes and _is_shown(one))
        elif path.is_file():
            found.append(path)
        else:
            raise SourceError(f"{path}: is neither a file nor a directory; give {called} with {option}.")
    return found


def first_files(given: Sequence[Path], found: Sequence[Path], count: int, called: str) -> list[Path]:
    """The first `count` of those that were `found`; SourceError where there are fewer."""
    if len(found) < count:
        names = ", ".join(map(str, given))
        raise SourceError(
            f"{names}: {len(found)} {called}, and {count} are to be read; give more, or ask for fewer (--chunks)."
        )
    return list(found[:count])


def _is_shown(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")
