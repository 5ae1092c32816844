"""The files of a converted checkpoint: those of the manifest, of kinds that a run writes, and no code but ours."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..anatomy.classes import CAUSAL
from ..checkpoint.config import CONFIG
from ..checkpoint.contents import (
    SETTINGS,
    SIGNATURE,
    all_files,
    begins_as_code,
    is_document,
    is_foreign,
    may_change,
    names_code,
)
from ..checkpoint.copying import sha256_of_all
from ..checkpoint.layout import INDEX
from ..checkpoint.manifest import MANIFEST, Manifest
from ..checkpoint.own_files import in_hub_cache
from ..checkpoint.regular import MAX_JSON, MAX_PARTS, open_regular, parse_any
from ..checkpoint.source import ADAPTER
from ..converted.derived import derive
from ..converted.described import Described
from ..progress import Advance
from .checks import Found

_OTHER_VERSION = f"verify with the version in {MANIFEST}, or convert the source again"
MAX_CODE = 1_000_000  # bytes of a Python file, more than any that surgery writes


def same_files(root: Path, manifest: Manifest, advance: Advance) -> Found:
    """Every file is there as it was written, and no other. Documents and generation settings may be others: a note."""
    present = all_files(root)
    for name, path in present.items():
        if path.is_symlink() and not in_hub_cache(root, path):  # links to directories too, which a walk does not enter
            return False, f"{name} is a link, and its target is not part of the checkpoint"
        if not path.is_file() and not path.is_dir():
            return False, f"{name} is not a plain file"
    files = {name for name, path in present.items() if path.is_file()}
    expected = set(manifest.files)
    gone = {name for name in expected - files if is_document(name)}
    if missing := sorted(expected - files - gone):
        return False, f"{missing[0]} is missing ({len(missing)} of {len(expected)} files)"
    more = files - expected - {MANIFEST, SIGNATURE}
    added = {name for name in more if may_change(name)}
    if extra := sorted(more - added):
        return False, f"{extra[0]} is not in {MANIFEST} ({len(extra)} files were added)"
    if ADAPTER in files:
        return False, f"{ADAPTER} makes transformers load what it names in place of the model, or on top of it"
    edited = set()
    whole = [name for name in sorted(expected - gone) if present[name].stat().st_size == manifest.files[name].bytes]
    hashes = sha256_of_all({name: present[name] for name in whole}, advance)
    for name in sorted(expected - gone):
        entry, path = manifest.files[name], present[name]
        if path.stat().st_size != entry.bytes or hashes[name] != entry.sha256:
            if not may_change(name):
                return False, f"{name} is not the file that was written (SHA-256 differs)"
            edited.add(name)
    notes = [f"{name} was {what} since" for what, names in
             (("edited", edited), ("added", added), ("removed", gone)) for name in sorted(names)]  # fmt: skip
    return True, "; ".join([f"{len(expected) - len(gone | edited)} files, SHA-256 as written", *notes]), tuple(notes)


def known_kinds(root: Path, shards: Collection[str]) -> Found:
    """Nothing is there that a run does not write and that something might load, whatever the manifest says of it."""
    files = {name: path for name, path in all_files(root).items() if path.is_file()}
    for name, path in files.items():
        if is_foreign(name, shards):
            return False, f"{name} is none of the files that surgery writes, and something might load it"
        if name not in shards and begins_as_code(path):
            return False, f"{name} begins as a pickle, an archive or a program does"
    return True, f"{len(files)} files, all of kinds that surgery writes"


def same_code(root: Path, described: Described) -> Found:
    """The Python files are exactly what this version writes (safe to run, and tested), and no other code is named."""
    config = described.config
    try:
        derived = derive(*described.converted)
    except KeyError:
        return False, f"config.json: model_type {config['model_type']!r} is not of the installed transformers"
    classes = {*derived.classes.values()} if described.encodes else {derived.classes.get(CAUSAL)}
    named = [[name] for name in classes]
    for chooses, wanted in (("auto_map", [derived.auto_map]), ("architectures", named)):
        if config.get(chooses) not in wanted:
            return False, f"config.json: {chooses} is not what this version of surgery writes; {_OTHER_VERSION}"
    for name, path in all_files(root).items():
        if path.is_file() and name.lower().endswith(".json") and name not in (MANIFEST, INDEX):
            with open_regular(path) as file:
                raw = file.read(MAX_JSON + 1)
            if len(raw) > MAX_JSON or raw.count(b"{") + raw.count(b"[") > MAX_PARTS:
                return False, f"{name} is larger than any such file is"
            content = parse_any(raw, name)  # None: nothing that loads, so nothing that names code
            if name == SETTINGS and not isinstance(content, dict):
                return False, f"{name} is not a JSON object"
            if name == CONFIG and isinstance(content, dict):
                content.pop("auto_map", None)
            if key := names_code(content):
                return False, f"{name}: {key} names code, and surgery writes none there"
    files = derived.files()
    for name, path in all_files(root).items():
        if name.endswith(".py") and files.pop(name, None) != _code_of(path):
            return False, f"{name} is not what this version of surgery writes; {_OTHER_VERSION}"
    return (False, f"{min(files)} is missing") if files else (True, "Python files as this version writes them")


def _code_of(path: Path) -> str:
    with open_regular(path) as file:
        return file.read(MAX_CODE).decode("utf-8", errors="replace")
