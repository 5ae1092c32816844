"""A source while a run reads it: what its files were when it was opened, and whether they still are.

A run reads a file more than once: it loads it, copies it, hashes it. All three have to be of one content. Every file is
hashed before the model is loaded and again before anything is published, and what the file system says of it is noted
when the source is opened. A change that is taken back in between shows in the time of the last change of its inode,
which nobody can set.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..progress import Advance, unseen
from .config import CONFIG
from .copying import sha256_of, sha256_of_all
from .layout import INDEX

if TYPE_CHECKING:
    from .source import Source


@dataclass(frozen=True)
class State:
    """What the file system says of a file: which it is, how large, when its content and its inode last changed."""

    identity: tuple[int, int, int, int]  # device, inode, bytes, mtime in ns
    changed: int  # ctime in ns
    rights: tuple[int, int, int, int]  # links, mode, owner, group: a change of these moves ctime too

    def still(self, now: State) -> bool:
        """Whether the content cannot have changed between this and `now`."""
        return self.identity == now.identity and (self.changed == now.changed or self.rights != now.rights)


def state_of(path: Path) -> State:
    """The state of the file, or of the one that a link leads to. OSError where it is gone."""
    found = os.stat(path)
    identity = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return State(identity, found.st_ctime_ns, (found.st_nlink, found.st_mode, found.st_uid, found.st_gid))


def states_in(root: Path) -> dict[str, State]:
    """File name -> state of every plain file in the directory `root`; of the file itself where it is one.

    Nothing of what cannot be looked at: whoever reads it next says so.
    """
    found = {}
    with contextlib.suppress(OSError):
        for path in [root] if root.is_file() else root.iterdir():
            if path.is_file():
                found[path.name] = state_of(path)
    return found


@dataclass(frozen=True)
class Reading:
    """A source that is being read: the SHA-256 of each of its files before any of its weights was loaded."""

    source: Source
    hashes: Mapping[str, str]

    @property
    def recorded(self) -> dict[str, str]:
        """What the manifest says of the source: weights and config.json, or the one file of a GGUF."""
        source = self.source
        names = [source.root.name] if source.kind == "gguf" else [*source.layout.shards, CONFIG]
        return {name: self.hashes[name] for name in names}

    def changed(self) -> str | None:
        """The first file that is not what it was, in words; None where all are.

        Weights are hashed again only where the file system cannot tell.
        """
        hashed = {*self.source.layout.shards} if self.source.kind != "gguf" else set()
        for path in _files(self.source):
            before = self.source.seen.get(path.name)
            if not path.is_file():
                return f"{self.source.spec}: {path.name} is gone since it was read"
            now = state_of(path)
            if before is not None and not before.still(now):
                return f"{self.source.spec}: {path.name} changed while it was read"
            # A link that was made (--link) moves the time of the inode, which then says nothing of the content.
            known = path.name in hashed and before is not None and before.changed == now.changed
            if not known and sha256_of(path) != self.hashes[path.name]:
                return f"{self.source.spec}: {path.name} is not the file that was read (SHA-256 differs)"
        return None


def begin_reading(source: Source, advance: Advance = unseen) -> Reading:
    """Hash every file of the source that a run reads. OSError as it is for one that cannot be read."""
    return Reading(source, sha256_of_all({path.name: path for path in _files(source)}, advance))


def _files(source: Source) -> list[Path]:
    """Weights, configuration, index and companions, or the one file of a GGUF."""
    if source.kind == "gguf":
        return [source.root]
    names = dict.fromkeys([CONFIG, *source.companions, *source.layout.shards])
    index = [INDEX] if (source.root / INDEX).is_file() else []
    return [source.root / name for name in (*names, *index)]
