"""Which files a run writes, of what, and how much room they take on the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.layout import INDEX
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.source import Source, has_tokenizer
from ..converted.derived import Derived
from ..converted.files import is_rewritten, may_rewrite, rewritten_layout
from ..operations.base import Changes

SMALL_FILES = 4 * 2**20  # what manifest, card, configuration and code can take, generously
# How large a file of the source can become; a tokenizer.json grows by indentation.
REWRITTEN = {"copy": 1, "rewrite": 1, "change": 2}


@dataclass(frozen=True)
class FilePlan:
    """One file of the output: `action` is copy, link, change or add; `bytes` is exact for weights."""

    name: str
    action: str
    bytes: int | None
    source: str | None = None


def files_of(
    source: Source, shards: Mapping[str, str], changes: Changes, derived: Derived, *, changes_weights: bool, link: bool,
    folds_bos: bool, added: tuple[str, int],
) -> tuple[FilePlan, ...]:  # fmt: skip
    """Every file of the output. `shards`: of the source -> as it is called there; `added`: that of the new tensors, and
    its bytes."""
    action = "rewrite" if changes_weights else "link" if link and source.kind != "gguf" else "copy"
    weights = _weights(source, shards, action, changes)
    weights += [FilePlan(added[0], "add", added[1])] if changes.added else []
    return (*weights, *_others(source, derived, folds_bos))


def room(files: Sequence[FilePlan]) -> int:
    """Bytes that they take on the disk at the most; links take none."""
    added = sum(file.bytes or 0 for file in files if file.action == "add" and file.name.endswith(".safetensors"))
    return SMALL_FILES + added + sum(REWRITTEN.get(file.action, 0) * (file.bytes or 0) for file in files)


def carried(source: Source) -> tuple[str, ...]:
    """The source's companions that go along. Its Python files do not: transformers' own classes take their place."""
    return tuple(name for name in source.companions if not name.endswith(".py"))


def _weights(source: Source, shards: Mapping[str, str], action: str, changes: Changes) -> list[FilePlan]:
    files = []
    for old, new in shards.items():
        size = source.layout.sizes[old]
        if is_rewritten(source.layout, old, changes.replaced):
            header, infos = rewritten_layout(source.layout, old, new, changes.replaced)
            size = len(header) + sum(info.nbytes for info in infos.values())
            files.append(FilePlan(new, "rewrite", size, old))
            continue
        files.append(FilePlan(new, action, size, old))
    return files


def _others(source: Source, derived: Derived, folds_bos: bool) -> list[FilePlan]:
    """Everything but weights."""
    files = [FilePlan("config.json", "change", None, "config.json"), FilePlan(INDEX, "add", None)]
    companions = carried(source)
    for name in companions:
        path = source.root / name
        size = path.stat().st_size if path.is_file() else None
        action = "change" if may_rewrite(source.root, name, folds_bos) else "copy"
        files.append(FilePlan(name, action, size, name))
    if "tokenizer_config.json" not in companions and has_tokenizer(companions):
        files.append(FilePlan("tokenizer_config.json", "add", None))
    files += [FilePlan(name, "add", len(text.encode())) for name, text in derived.files().items()]
    return [*files, FilePlan("README.md", "add", None), FilePlan(MANIFEST, "add", None)]
