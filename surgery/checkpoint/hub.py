"""Models on the hub: what an id names, headers by range requests, and downloads with progress."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DamagedCheckpoint, SourceError
from ..progress import Advance, unseen
from .disk import require_space
from .elsewhere import NOWHERE, Elsewhere
from .header import MAX_HEADER
from .hub_client import at_once, bars, hub_errors
from .layout import INDEX, SINGLE
from .regular import read_json

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[^\s\x00-\x1f\x7f\\~^:?*\[@/-][^\s\x00-\x1f\x7f\\~^:?*\[@]*")  # as git has it
MAX_NAME, MAX_REVISION = 96, 255  # characters: what the hub allows, and what git can keep as a file
GUESS = 1 << 16  # bytes asked for first: most headers of one shard are shorter


@dataclass(frozen=True)
class HubId:
    """A model on the hub, "owner/name", at a branch, tag or commit; None: its main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class Snapshot:
    """One commit of `id`, and the directory in the client's cache that holds what has been downloaded of it."""

    id: HubId
    root: Path

    @property
    def commit(self) -> str:
        return self.root.name


def hub_id(spec: str, revision: str | None = None) -> HubId | None:
    """What "owner/name" or "owner/name@revision" names; None where `spec` has neither form.

    `revision` is one that was given beside it. SourceError where the two are not the same, or no name that git allows.
    """
    repo, at, own = spec.partition("@")
    if len(repo) > MAX_NAME or not _NAME.fullmatch(repo):
        return None
    if at and revision is not None and own != revision:
        raise SourceError(
            f"{repo}@{own:.80} names a revision, and --revision is another ({revision:.80}); give one of the two."
        )
    found = own if at else revision
    if found is not None and (len(found) > MAX_REVISION or not _REVISION.fullmatch(found)):
        raise SourceError(f"{repo}: {found!r:.80} is no branch, tag or commit; write owner/name@REVISION.")
    return HubId(repo, found)


# ---- reading


def fetch_some(at: HubId, patterns: Sequence[str], refused: Sequence[str]) -> Snapshot:
    """The commit that `at` stands for, and those of its files that match `patterns` and none of `refused`.

    Without a network it is what the cache has, if that is complete.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(str(at)):
        root = snapshot_download(
            at.repo, revision=at.revision, allow_patterns=[*patterns], ignore_patterns=[*refused],
            tqdm_class=bars(unseen, threading.Event()),
        )  # fmt: skip
    return Snapshot(at, Path(root))


def weights_of(snapshot: Snapshot) -> Elsewhere:
    """The weight files of a snapshot that are not in its directory: nothing but their headers is downloaded."""
    if all((snapshot.root / name).exists() for name in _named_weights(snapshot.root)):
        return NOWHERE
    sizes = {
        name: size
        for name, size in sizes_of(snapshot).items()
        if name.endswith(".safetensors") and "/" not in name and not (snapshot.root / name).exists()
    }

    def heads(names: Sequence[str]) -> dict[str, tuple[int, bytes]]:
        with hub_errors(str(snapshot.id)):
            found = at_once(lambda name: _head(snapshot, name, sizes[name]), names, threading.Event())
        return dict(zip(names, found, strict=True))

    return Elsewhere(frozenset(sizes), heads)


def sizes_of(snapshot: Snapshot) -> dict[str, int]:
    """Bytes of every file of the commit, by its path."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(str(snapshot.id)):
        entries = HfApi().list_repo_tree(snapshot.id.repo, revision=snapshot.commit, recursive=True)
        return {entry.path: int(entry.size) for entry in entries if isinstance(entry, RepoFile)}


def download(snapshot: Snapshot, sizes: Mapping[str, int], advance: Advance = unseen) -> None:
    """Bring these files, name to bytes, into the snapshot's directory, where they are missing.

    A connection that breaks off is taken up where it broke, and files that were complete stay for another try.
    `advance` is told of bytes. Raises NoSpace before anything is downloaded.
    """
    from huggingface_hub import hf_hub_download

    require_space(snapshot.root, sum(sizes.values()))
    stop = threading.Event()

    def fetch(name: str) -> None:
        bar = bars(lambda count, _: advance(count, name), stop)
        hf_hub_download(snapshot.id.repo, name, revision=snapshot.commit, tqdm_class=bar)

    with hub_errors(str(snapshot.id)):
        at_once(fetch, [*sizes], stop)


def _named_weights(root: Path) -> Collection[str]:
    """The weight files that the directory says it has; an index that cannot be read names none that are there."""
    if not (root / INDEX).exists():
        return (SINGLE,)
    try:
        named = read_json(root / INDEX).get("weight_map")
    except DamagedCheckpoint:
        return (SINGLE,)
    return {str(name) for name in named.values()} if isinstance(named, dict) else (SINGLE,)


def _head(snapshot: Snapshot, name: str, size: int) -> tuple[int, bytes]:
    """Size of a safetensors file, and its bytes to the end of the header, as far as that can be one."""
    head = _range(snapshot, name, 0, min(GUESS, size))
    stop = 8 + int.from_bytes(head[:8], "little")
    if len(head) < stop <= min(size, 8 + MAX_HEADER):
        head += _range(snapshot, name, len(head), stop)
    return size, head


def _range(snapshot: Snapshot, name: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file. A server that sends all of it instead is left as soon as they have come."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    if start == stop:
        return b""
    url = hf_hub_url(snapshot.id.repo, name, revision=snapshot.commit)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        before = 0 if response.status_code == 206 else start
        for part in response.iter_bytes(GUESS):
            data += part
            if len(data) >= before + stop - start:
                break
    if len(data) < before + stop - start:
        raise OSError(f"{len(data) - before} bytes of {stop - start} came")
    return bytes(data[before : before + stop - start])
