"""surgery.json: what a converted checkpoint is made of, and what was proved about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import ErrorDetails

from ..errors import DamagedCheckpoint
from .provenance import Provenance
from .regular import read_json

MANIFEST = "surgery.json"
TYPE_PREFIX = "eab_"  # what the model types of converted checkpoints begin with
FORMAT = 1


def _relative(name: str) -> str:
    """The name of a file that is safe to open below a directory: relative, and without a way up."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name or name == MANIFEST:
        raise ValueError("is no name of a file in the checkpoint")
    return name


Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, AfterValidator(_relative)]
Shape = Annotated[
    tuple[Count, ...],
    BeforeValidator(lambda shape: tuple(shape) if isinstance(shape, list) else shape),
    PlainSerializer(list),
]


class _Entry(BaseModel):
    """Keys of later versions are passed over."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class TensorEntry(_Entry):
    """What became of one tensor, and where it lies. `of`: the tensor of the source that a quantised one replaces."""

    status: Literal["kept", "changed", "added", "quantised", "emptied"]
    shard: str
    dtype: str
    shape: Shape
    of: str | None = None

    @model_serializer(mode="wrap")
    def _without_nothing(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}


class FileEntry(_Entry):
    """One file as it was written."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Count


class Manifest(_Entry):
    """The content of surgery.json, in the order of the file.

    `source`: spec, kind, revision, dtype and hashes; `recipe`: as parsed; `versions`: package name to version;
    `files`: every file in the directory, surgery.json itself left out; `verdict`: what verification found. The status
    is "verified" only where a verdict says it passed. `provenance`: of the run; older manifests have none. `quantised`:
    SHA-256 of what config.json says of quantised weights, None where they are plain.
    """

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    status: Literal["verified", "unverified"]
    source: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[FileName, FileEntry]
    verdict: dict[str, Any] | None
    provenance: Provenance | None = None
    quantised: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the checkpoint was kept though its verdict was that it failed."""
        return self.verdict is not None and self.verdict.get("passed") is False

    def with_files(self, files: Mapping[str, Mapping[str, Any]]) -> Manifest:
        """The same of a directory that holds these files: name -> sha256 and bytes."""
        return Manifest.model_validate({**self.to_dict(), "files": files})

    def concluded(self, verdict: dict[str, Any] | None) -> Manifest:
        """The same with what verification found."""
        return Manifest.model_validate({**self.to_dict(), "status": _status(verdict), "verdict": verdict})

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self.model_dump()


def build_manifest(
    *,
    source: dict[str, Any],
    recipe: dict[str, Any],
    versions: dict[str, Any],
    tensors: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, Mapping[str, Any]],
    verdict: dict[str, Any] | None,
    provenance: Provenance | None = None,
    quantised: str | None = None,
) -> Manifest:
    """The manifest of these parts, tensors and files sorted by name.

    tensors: name -> what a TensorEntry holds; files: name -> what a FileEntry holds.
    Raises ValueError for a tensor or file described otherwise: that is a bug of the caller.
    """
    return Manifest(
        format=FORMAT,
        status=_status(verdict),
        source=source,
        recipe=recipe,
        versions=versions,
        tensors={name: TensorEntry.model_validate(tensors[name]) for name in sorted(tensors)},
        files={name: FileEntry.model_validate(files[name]) for name in sorted(files) if name != MANIFEST},
        verdict=verdict,
        provenance=provenance,
        quantised=quantised,
    )


def _status(verdict: dict[str, Any] | None) -> Literal["verified", "unverified"]:
    return "verified" if verdict is not None and verdict.get("passed") is True else "unverified"


def read_manifest(root: Path) -> Manifest:
    """The manifest of the directory `root`, its structure checked; DamagedCheckpoint where it is missing or invalid.

    File names in it are safe to open below `root`: relative, and without a way up.
    """
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing, so nothing says what belongs here; convert the source again.")
    try:
        return Manifest.model_validate(read_json(path))
    except ValidationError as error:
        what = _what(error.errors(include_url=False)[0])
        raise DamagedCheckpoint(f"{path} is not a valid manifest: {what}; convert the source again.") from error


def _what(error: ErrorDetails) -> str:
    """What pydantic found, in words."""
    key, *inside = error["loc"]
    if inside and key == "tensors":
        return f'tensor "{inside[0]}" is not described by status, shard, dtype and shape'
    if inside and key == "files":
        return f'file "{inside[0]}" is not a relative name with sha256 and bytes'
    if key == "format" and type(error["input"]) is int:
        return f'"format" is {error["input"]}, this version of surgery reads {FORMAT}'
    if key == "status" and isinstance(error["input"], str):
        return f'"status" is {error["input"]!r}'
    return f'"{key}" is missing or of the wrong type'
