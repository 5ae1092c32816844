"""Writing a checkpoint that either does not exist or is complete: a hidden directory beside OUT, renamed at the end."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from ..endings.owned import Owned
from ..endings.signals import caught, has_published, held
from ..endings.temporary import FULL
from ..errors import DamagedCheckpoint, OutputError, SourceError
from .copying import PART, Hashing, copy_content, copy_tree, sha256_of, to_disk
from .disk import disk_errors, require_space, require_target, translated
from .layout import CHUNK, Layout, iter_tensor_chunks
from .regular import is_plain_name, open_regular
from .values import as_stored, dtype_code, tensor_bytes
from .writing import plan_file

if TYPE_CHECKING:
    import torch


class Stage:
    """A hidden directory beside OUT that becomes OUT by `publish`, or goes elsewhere by `keep`, or is removed.

    Use as a context manager. Signals that end the process remove it too (`endings`). A process that is killed leaves it
    behind, and it can be told by then that nobody works in it.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(out)
        self._owned: Owned | None = None
        self._caught = caught()
        self._hashes: dict[str, tuple[tuple[int, int], str]] = {}  # name -> ((size, mtime in ns), sha256)

    @property
    def path(self) -> Path:
        return self._open.inside

    @property
    def scratch(self) -> Path:
        """Where a source may be written out as plain files, on the same file system."""
        return self._open.path / "source"

    @property
    def _open(self) -> Owned:
        if self._owned is None:
            raise RuntimeError("the stage is not open")
        return self._owned

    def __enter__(self) -> Stage:
        require_target(self.out)
        self._caught.__enter__()
        try:
            with disk_errors(self.out):
                self._owned = Owned(self.out.parent.resolve(), self.out.name)
                self._owned.__enter__()
                self.path.mkdir()  # with the mode that OUT is to have
        except BaseException:
            self._remove()
            self._caught.__exit__()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            leftover = self._remove()
            if leftover is not None and error is None:
                raise OutputError(f"{leftover} could not be removed; remove it by hand.")
        finally:
            self._caught.__exit__()
        if isinstance(error, OSError) and error.errno in FULL:  # from code that wrote into `path` by itself
            raise translated(error, self.out) from error

    def _remove(self) -> Path | None:
        owned, self._owned = self._owned, None
        return None if owned is None else owned.remove()

    def add_file(self, src: Path, name: str, link: bool = False, sha256: str | None = None) -> None:
        """Copy `src` into the stage as `name`, or hard-link it (then it shares its bytes and mode with the source).

        `sha256`: of `src`, where it is known; who gives it makes sure that `src` is still the same at the end.
        """
        target = self._new(name)
        if link:
            try:
                os.link(os.path.realpath(src), target)
            except OSError as error:
                raise OutputError(
                    f"{src} cannot be hard-linked into {self.out.parent} ({error.strerror}; both must be "
                    "on one filesystem that has hard links); run without hard links."
                ) from error
            if sha256 is not None:  # else it is hashed when the hashes are asked for
                self._remember(name, sha256)
            return
        try:
            source = open_regular(Path(src))
        except OSError as error:
            raise SourceError(f"{src} cannot be read ({error.strerror}); check the source.") from error
        with source:
            if sha256 is None:
                self._write(name, iter(lambda: source.read(CHUNK), b""))
                return
            with disk_errors(self.out), _create(target) as file:
                copy_content(source, file)
        self._remember(name, sha256)

    def adopt(self, src: Path, name: str) -> None:
        """Take `src`, a file that lies in `scratch`, as `name`: linked where the filesystem has links, else copied."""
        try:
            os.link(src, self._new(name))
        except OSError:  # no links here: both are on the disk until `scratch` is removed
            require_space(self.out.parent, src.stat().st_size)
            self.add_file(src, name)

    def add_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write `tensors` as the safetensors file `name`, in the order given, dtypes as they are."""
        entries = [(key, dtype_code(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()]
        header, _ = plan_file(name, entries, {"format": "pt"} if metadata is None else metadata)
        self._write(name, itertools.chain([header], map(tensor_bytes, tensors.values())))

    def add_changed(self, layout: Layout, shard: str, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write `shard` of a checkpoint as `name`, with other values for some of its tensors: same dtypes, same places.

        Never a hard link, and each tensor is asked for once, when its place is written. SourceError where one is not in
        the shard or does not fit (`as_stored`).
        """
        for key in tensors:
            if key not in layout.tensors or layout.tensors[key].shard != shard:
                raise SourceError(f'Tensor "{key}" would be changed, but {layout.root / shard} has no such tensor.')
        changed = sorted((layout.tensors[key] for key in tensors), key=lambda info: (info.start, info.stop))
        try:
            source = (layout.root / shard).open("rb")
        except OSError as error:
            raise SourceError(f"{layout.root / shard} cannot be read ({error.strerror}); check the source.") from error

        def parts() -> Iterator[bytes | memoryview]:
            position = 0
            for info in changed:
                yield from _read(source, info.start - position)
                yield tensor_bytes(as_stored(info, tensors[info.name]))
                position = source.seek(info.stop)
            yield from _read(source, layout.sizes[shard] - position)

        with source:
            self._write(name, parts())

    def add_rewritten(
        self, layout: Layout, shard: str, name: str, header: bytes,
        written: Callable[[str], Mapping[str, torch.Tensor] | None],
    ) -> None:  # fmt: skip
        """Write `shard` of a checkpoint as `name`, others in place of some of its tensors, one in memory at a time.

        `header`: of what will be written, in its order. `written`: name of a tensor -> what takes its place, None where
        it stays as it is.
        """

        def parts() -> Iterator[bytes | memoryview]:
            yield header
            for info in layout.of_shard(shard):
                if (instead := written(info.name)) is None:
                    yield from iter_tensor_chunks(layout, info.name)
                else:
                    yield from map(tensor_bytes, instead.values())

        self._write(name, parts())

    def add_text(self, name: str, text: str) -> None:
        self._write(name, [text.encode("utf-8")])

    def add_json(self, name: str, obj: object) -> None:
        self.add_text(name, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")

    def replace_json(self, name: str, obj: object) -> None:
        """Write `name` anew in place of what was staged under it."""
        with disk_errors(self.out):
            (self.path / name).unlink()
        self.add_json(name, obj)

    def hashes(self) -> dict[str, dict[str, Any]]:
        """{file: {"sha256", "bytes"}} of every file in the stage, whoever wrote it; names relative, with slashes."""
        result = {}
        for path in sorted(path for path in self.path.rglob("*") if not path.is_dir()):
            name = path.relative_to(self.path).as_posix()
            if name not in self._hashes or self._hashes[name][0] != _state(path):  # not ours, or edited since
                self._hashes[name] = (_state(path), sha256_of(path))
            (size, _), digest = self._hashes[name]
            result[name] = {"sha256": digest, "bytes": size}
        return result

    def publish(self) -> Path:
        """Make the stage OUT, durably: files and directories synced, then one rename. Returns OUT."""
        with disk_errors(self.out):
            for path in self.path.rglob("*"):
                _sync(path)
            _sync(self.path)
            if os.path.lexists(self.out):
                raise OutputError(f"{self.out} appeared while it was being written; choose another path and run again.")
            with held():
                os.rename(self.path, self.out)
                has_published(self.out)
                self._remove()
            _sync(self.out.parent)
        return self.out

    def keep(self, directory: Path) -> Path:
        """Move the stage to `directory` (which must not exist) instead of publishing it; for what failed its gates."""
        directory = Path(directory)
        require_target(directory)
        with disk_errors(directory):
            try:
                os.rename(self.path, directory)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                with Owned(directory.parent, directory.name) as copied:
                    copy_tree(self.path, copied.inside)
                    os.replace(copied.inside, directory)
            has_published(directory)
            self._remove()
        return directory

    def _write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a new file of the stage, hashed on the way, and have the disk begin early."""
        with disk_errors(self.out), _create(self._new(name)) as file, Hashing() as digest:
            for data in parts:
                digest.update(data)
                file.write(data)
                if (at := file.tell()) % PART < len(data):
                    to_disk(file, at - at % PART - PART, PART)
        self._remember(name, digest.hexdigest())

    def _new(self, name: str) -> Path:
        if not is_plain_name(name):
            raise OutputError(f"{name!r} is not a plain file name, so it cannot be written to {self.out}; rename it.")
        target = self.path / name
        if os.path.lexists(target):
            raise OutputError(f"{name} would be written to {self.out} twice; rename one of the two in the source.")
        return target

    def _remember(self, name: str, sha256: str) -> None:
        self._hashes[name] = (_state(self.path / name), sha256)


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _read(file: BinaryIO, left: int) -> Iterator[bytes]:
    """The next so many bytes, a part at a time."""
    while left:
        if not (chunk := file.read(min(CHUNK, left))):
            raise DamagedCheckpoint(f"{file.name} was truncated while it was read; restore it.")
        left -= len(chunk)
        yield chunk


def _create(path: Path) -> BinaryIO:
    return path.open("xb")  # mode from the umask, never over something that is there


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
