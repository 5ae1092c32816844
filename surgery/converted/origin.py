"""What the source's own card says of it: licence, languages, base model. A stranger wrote it, so nothing is believed.

Of README.md only its metadata are read, and of these a few keys, each of them a short name of a known form. A base
model is named where it can be known: a hub id that was given, the hub's cache that a directory lies in, or the card
(which then names what the source itself was made of). `_name_or_path` of a config.json is no proof, since "a/b" may
be a directory of whoever wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.source import Source
from ..errors import RecipeError
from ..recipe.strict_yaml import MAX_BYTES, read_yaml

README = "README.md"
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")  # how names of such files begin
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FORMS = {
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}"),
    "license_name": re.compile(r"[\w.+() -]{1,100}"),
    "license_link": re.compile(r"https?://[\w.~:/?#@!$&()*+,;=%-]{1,300}|[A-Za-z][\w.-]{0,100}"),
    "language": re.compile(r"[A-Za-z][A-Za-z0-9-]{0,20}"),
    "base_model": _HUB_ID,
}
_MOST = 300  # languages and base models
_CACHED = re.compile(r"models--(.+?)--(.+)")  # a directory of the hub's cache
_REPOSITORY = re.compile(r"https?://huggingface\.co/(.+?)/?")


@dataclass(frozen=True)
class Origin:
    """Of a source: keys of a card's metadata; `files` of its licence, which are carried along; what could not be read.

    `base_model`: one id of the hub or several; of a directory, what its card says that it was made of.
    """

    base_model: tuple[str, ...] = ()
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    broken: str | None = None
    cached: bool = False  # the source is a directory of the hub's cache, and `base_model` the model itself


def origin(source: Source) -> Origin:
    """What is known of `source`. Never raises for what its card holds: `broken` says why it was not read."""
    if source.kind == "gguf":
        return _of_gguf(source.plan.header.metadata)
    found = said_in(source.root)
    files = tuple(name for name in source.companions if name.upper().startswith(LICENCES))
    cached = _cached_id(source.root)
    known = source.repo if source.kind == "hub" else cached
    return replace(
        found, files=files, base_model=found.base_model if known is None else (known,), cached=cached is not None
    )


def said_in(root: Path) -> Origin:
    """What the card in the directory `root` says."""
    try:
        return _of_metadata(_metadata(root / README))
    except RecipeError as error:
        return Origin(broken=str(error))


def _metadata(path: Path) -> Mapping[str, Any]:
    """The YAML between the first two lines of `---`; empty where there is none. RecipeError for what is broken."""
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            head = file.read(MAX_BYTES + 1).decode("utf-8-sig", "replace").replace("\r\n", "\n")
    except OSError as error:
        raise RecipeError(f"{README} of the source cannot be read ({error.strerror})") from error
    if not head.startswith("---\n"):
        return {}
    text, end, _ = f"\n{head[4:]}".partition("\n---")
    if not end:
        raise RecipeError(f"{README} of the source begins metadata and does not end them in {MAX_BYTES // 1024} KiB")
    if not text.strip():
        return {}
    try:
        found = read_yaml(text, README)[0]
    except (RecipeError, RecursionError) as error:
        said = re.sub(r"[^\x20-\x7e]", "?", str(error))[:100]
        raise RecipeError(f"the metadata of the source's {README} are no plain YAML ({said})") from error
    if not isinstance(found, dict):
        raise RecipeError(f"the metadata of the source's {README} are no mapping")
    return found


def _of_metadata(found: Mapping[str, Any]) -> Origin:
    return Origin(
        base_model=_all(found, "base_model"), language=_all(found, "language"), license=_one(found, "license"),
        license_name=_one(found, "license_name"), license_link=_one(found, "license_link"),
    )  # fmt: skip


def _of_gguf(found: Mapping[str, Any]) -> Origin:
    """What the header says: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""
    named = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
    }
    made_of = {"base_model": found.get("general.source.huggingface.repository")}
    for key in ("general.source.repo_url", "general.repo_url", "general.base_model.0.repo_url"):
        if not _one(made_of, "base_model") and (link := _REPOSITORY.fullmatch(str(found.get(key))[:300])):
            made_of = {"base_model": link[1]}
    return _of_metadata({**{key: found.get(name) for key, name in named.items()}, **made_of})


def _one(found: Mapping[str, Any], key: str) -> str | None:
    return next(iter(_all(found, key)), None)


def _all(found: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The values of `key` that have its form, in their order, once each."""
    values = found.get(key)
    values = values[:_MOST] if isinstance(values, list) else [values]
    return tuple(dict.fromkeys(v for v in values if isinstance(v, str) and _FORMS[key].fullmatch(v)))


def _cached_id(root: Path) -> str | None:
    """owner/name, where `root` is a snapshot in the hub's cache: models--owner--name/snapshots/REVISION."""
    snapshot = root.resolve()
    cached = _CACHED.fullmatch(snapshot.parent.parent.name) if snapshot.parent.name == "snapshots" else None
    return None if cached is None or not _HUB_ID.fullmatch("/".join(cached.groups())) else "/".join(cached.groups())
