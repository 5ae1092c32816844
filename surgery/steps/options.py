"""What a run is asked for besides recipe, source and output."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from ..live.memory import Place
from ..live.text import CHUNKS, Chunking, Files, files


class FilesField:
    """A field that is given as one file or several, by path or text, and read as a tuple of paths."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, instance: object, owner: type) -> tuple[Path, ...]:
        return () if instance is None else vars(instance)[self.name]

    def __set__(self, instance: object, given: Files) -> None:
        vars(instance)[self.name] = files(given)


class PathField:
    """A field that is given as a path or text, or not at all, and read as a path or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, instance: object, owner: type) -> Path | None:
        return None if instance is None else vars(instance)[self.name]

    def __set__(self, instance: object, given: Path | str | None) -> None:
        vars(instance)[self.name] = None if given is None else Path(given)


@dataclass(frozen=True)
class RunOptions:
    """How `surgery run` reads, computes, proves and writes.

    text, calibration: files to evaluate on, and to search, scale and tune on; given one, it is split. images,
    audio: the same as text for an encoder, files and directories; calibration are such then. chunking: how much of them
    is read.
    tasks: a directory of further task files. verify: False writes without proof. surveys: also survey original and
    converted. keep_failed: where an output goes that failed its gates. resume: a directory that keeps finished steps,
    from which a run that was cut off goes on. tuning: a directory that keeps the state of `tune`, from which a run that
    was cut off goes on. adapter: a new directory for what was tuned, as a PEFT adapter. link: hard-link unchanged
    shards. dtype: what a GGUF is dequantised to. revision: of a hub id. device: a torch device, or "auto". memory:
    bytes that may be taken, None for what is free. sign: a private key (PEM) to sign what is published with. command:
    the words of the command line, for the manifest.
    """

    text: FilesField = FilesField()
    images: FilesField = FilesField()
    audio: FilesField = FilesField()
    calibration: FilesField = FilesField()
    chunking: Chunking = CHUNKS
    tasks: PathField = PathField()
    verify: bool = True
    surveys: bool = False
    keep_failed: PathField = PathField()
    resume: PathField = PathField()
    tuning: PathField = PathField()
    adapter: PathField = PathField()
    link: bool = False
    dtype: str | None = None
    revision: str | None = None
    device: str = "cpu"
    memory: int | None = None
    command: Sequence[str] = ()
    sign: PathField = PathField()

    @property
    def place(self) -> Place:
        return Place(self.device, self.memory)


@dataclass(frozen=True)
class VerifyOptions:
    """What `surgery verify` checks besides the files, and how.

    against: the source, a path or a hub id of this revision. text, calibration: files to measure on, and to take static
    scales from; given one, it is split. images, audio: the same as text for an encoder, files and directories.
    chunking: how much of them is read; None: as much as the run that wrote it did. tasks: a directory of further task
    files. device: a torch device, or "auto". memory: bytes that may be taken, None for what is free. digest: of the
    manifest, as `run` said it ("sha256:..."). public_key: of who signed it (PEM). require: "verified" fails a
    checkpoint that was written without proof. command: the words of the command line, for the verdict.
    """

    against: Path | str | None = None
    text: FilesField = FilesField()
    images: FilesField = FilesField()
    audio: FilesField = FilesField()
    calibration: FilesField = FilesField()
    chunking: Chunking | None = None
    tasks: PathField = PathField()
    revision: str | None = None
    device: str = "cpu"
    memory: int | None = None
    command: Sequence[str] = ()
    digest: str | None = None
    public_key: PathField = PathField()
    require: Literal["verified"] | None = None

    @property
    def reads(self) -> bool:
        """Whether anything is given to measure on."""
        return bool(self.text or self.images or self.audio)

    @property
    def place(self) -> Place:
        return Place(self.device, self.memory)


@dataclass(frozen=True)
class ExportOptions:
    """How `surgery export` finds the original, and measures.

    original: what the checkpoint was converted from, a path or hub id; None: what the manifest names. text: files to
    measure on, none to measure nothing. chunking: how much of them is read; None: as much as the run that wrote the
    checkpoint did. device: a torch device, or "auto". command: the words of the command line, for `export.json`.
    engine_python: the Python that has the program, where that is another than surgery's.
    """

    original: Path | str | None = None
    text: FilesField = FilesField()
    chunking: Chunking | None = None
    device: str = "cpu"
    command: Sequence[str] = ()
    engine_python: PathField = PathField()


class RunKeywords(TypedDict, total=False):
    """The fields of `RunOptions`, as `run` takes them by themselves."""

    text: Files
    images: Files
    audio: Files
    calibration: Files
    chunking: Chunking
    tasks: Path | str | None
    verify: bool
    surveys: bool
    keep_failed: Path | str | None
    resume: Path | str | None
    tuning: Path | str | None
    adapter: Path | str | None
    link: bool
    dtype: str | None
    revision: str | None
    device: str
    memory: int | None
    command: Sequence[str]
    sign: Path | str | None


class VerifyKeywords(TypedDict, total=False):
    """The fields of `VerifyOptions`, as `verify` takes them by themselves."""

    against: Path | str | None
    text: Files
    images: Files
    audio: Files
    calibration: Files
    chunking: Chunking | None
    tasks: Path | str | None
    revision: str | None
    device: str
    memory: int | None
    command: Sequence[str]
    digest: str | None
    public_key: Path | str | None
    require: Literal["verified"] | None


class ExportKeywords(TypedDict, total=False):
    """The fields of `ExportOptions`, as `export` takes them by themselves."""

    original: Path | str | None
    text: Files
    chunking: Chunking | None
    device: str
    command: Sequence[str]
    engine_python: Path | str | None


Options = TypeVar("Options", RunOptions, VerifyOptions, ExportOptions)


def with_keywords(verb: str, options: Options, keywords: Mapping[str, Any]) -> Options:
    """`options` with the fields that `keywords` name; TypeError for a name that `verb` does not know."""
    if not isinstance(options, (RunOptions, VerifyOptions, ExportOptions)):
        raise TypeError(f"{verb}() takes its options by keyword, and was given {type(options).__name__} in their place")
    known = [field.name for field in fields(options)]
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean '{near[0]}'?" if near else ";"
            raise TypeError(f"{verb}() has no option '{name}'{meant} it takes {', '.join(known)}")
    return replace(options, **keywords)


RUN, VERIFY, EXPORTING = RunOptions(), VerifyOptions(), ExportOptions()  # as they are where nothing is said
