"""Which files a converted checkpoint may hold, by their names: what a run writes, and what its owner may add."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .config import CONFIG
from .layout import INDEX
from .manifest import MANIFEST
from .source import COMPANION_PATTERNS, REFUSED_SUFFIXES

SIGNATURE = "model.sig"  # as the command line of OpenSSF's model-signing calls it
SETTINGS = "generation_config.json"  # how to generate is its owner's to say, and no part of the model
# What git and the hub's client leave in a directory that was uploaded or downloaded; nothing loads from them.
NOT_OURS = (".git", ".gitattributes", ".cache")
_DOCUMENTS = (".gif", ".jpeg", ".jpg", ".md", ".pdf", ".png", ".rst", ".svg", ".txt", ".webp")
_VOCABULARIES = ("dict", "merges", "token", "vocab")  # words in names of text files that tokenizers read
# How files begin that run code once they are loaded: pickles, archives of pickles, shared libraries.
_LOADABLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x7fELF")


# Keys by which a JSON file makes transformers load classes from Python files, its own or another repository's.
_CODE = ("auto_map", "custom_pipelines")


def is_document(name: str) -> bool:
    """Whether people read this file (a relative name), and no program: the card, notes, images.

    Licences are not among them: they are carried over from the source.
    """
    last = name.rsplit("/", 1)[-1].lower()
    if not last.endswith(_DOCUMENTS) or any(word in last for word in _VOCABULARIES):
        return False
    return not any(fnmatchcase(last, pattern.lower()) for pattern in COMPANION_PATTERNS)


def may_change(name: str) -> bool:
    """Whether the owner of a checkpoint may edit, add or remove it without damage: documents, generation settings."""
    return name == SETTINGS or is_document(name)


def is_foreign(name: str, shards: Collection[str]) -> bool:
    """Whether no run writes a file of this (relative) name, nor may anyone add it. Python files are compared elsewhere.

    `shards`: files of weights that the index names.
    """
    if name.endswith(".py") or is_document(name) or name in (CONFIG, INDEX, MANIFEST, SIGNATURE, *shards):
        return False
    refused = name.lower().endswith(REFUSED_SUFFIXES)
    return refused or not any(fnmatchcase(name, pattern) for pattern in COMPANION_PATTERNS) or "/" in name


def begins_as_code(path: Path) -> bool:
    """Whether the file begins as a pickle, an archive or a program does, whatever it is called."""
    with path.open("rb") as file:
        return file.read(4).startswith(_LOADABLE)


def all_files(root: Path) -> dict[str, Path]:
    """Relative name -> path of everything in the directory `root`, directories too, less what is `NOT_OURS`."""
    present = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*"))}
    return {name: path for name, path in present.items() if name.split("/")[0] not in NOT_OURS}


def names_code(content: Any) -> str | None:
    """The first key anywhere in JSON `content` that names code. A number under it is the id of a token of that text."""
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            if named := [key for key in _CODE if _is_of_code(key, value.get(key))]:
                return named[0]
            left += value.values()
    return None


def without_code(content: Any) -> Any:
    """JSON `content` without the keys that name code."""
    if isinstance(content, list):
        return [without_code(value) for value in content]
    if isinstance(content, dict):
        return {key: without_code(value) for key, value in content.items() if not _is_of_code(key, value)}
    return content


def _is_of_code(key: str, value: Any) -> bool:
    return key in _CODE and not isinstance(value, (int, float, type(None)))
