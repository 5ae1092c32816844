"""Provenance as a table, the same for model card and report; made from its JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint.disk import human
from ..table import Table
from ..words import NONE, count_of, visible_name

MOST = 6  # files of the source that are listed


def table(told: Mapping[str, Any] | None) -> Table | None:
    """`told` is `provenance` of a verdict or a survey; None where it has none."""
    if not told:
        return None
    texts, cuts = told.get("texts") or {}, told.get("chunks") or {}
    rows = [
        ("source", _source(told.get("source") or {})),
        *_hashes(told.get("source") or {}),
        *_texts(f"evaluation {_thing(cuts)}", texts.get("evaluation") or []),
        *_texts(f"calibration {_thing(cuts)}", texts.get("calibration") or []),
        ("read", _read(cuts, bool(texts.get("split")))),
        ("computed", f"in {_plain(told.get('dtype'))} on {_plain(told.get('device'))}"),
        ("begun", _plain(told.get("date")).replace("T", " ").replace("Z", " UTC")),
        ("recipe", _plain(json.dumps(told["recipe"], ensure_ascii=False)) if told.get("recipe") else ""),
        ("versions", ", ".join(f"{_plain(name)} {_plain(of)}" for name, of in (told.get("versions") or {}).items())),
        ("command", " ".join(map(_plain, told.get("command") or []))),
    ]
    text = "Names of files only; the SHA-256 of each says which it was."
    return Table("Provenance", ("", "what it was"), [row for row in rows if row[1]], text=text, words=2)


def line(told: Mapping[str, Any] | None) -> str:
    """When, on what text and with which version, in a line; empty where nothing is told."""
    if not told:
        return ""
    files, cut = (told.get("texts") or {}).get("evaluation") or [], (told.get("chunks") or {}).get("evaluation")
    named = [_plain(file["name"]) for file in files[:MOST]]
    parts = [_plain(told.get("date"))[:10], ", ".join(named) if len(files) <= MOST else ""]
    parts.append(_cut(cut) if cut else "")
    parts.append(f"surgery {_plain((told.get('versions') or {}).get('surgery'))}")
    return " · ".join(part for part in parts if part)


def _source(source: Mapping[str, Any]) -> str:
    revision, dtype = source.get("revision"), source.get("dtype")
    parts = [_plain(source.get("spec")), f"revision {_plain(revision)}" if revision else ""]
    parts.append(f"dequantised to {_plain(dtype)}" if dtype else "")
    return ", ".join(part for part in parts if part) if source.get("spec") else ""


def _hashes(source: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = source.get("sha256") or {}
    rows = [(_plain(name), f"SHA-256 {_plain(digest)}") for name, digest in [*found.items()][:MOST]]
    return rows if len(found) <= MOST else [*rows, ("", f"and {count_of(len(found) - MOST, 'file')} more")]


def _texts(what: str, files: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = [
        (what, f"{_plain(file['name'])}, {human(file['bytes'])}, SHA-256 {_plain(file['sha256'])}")
        for file in files[:MOST]
    ]
    return rows if len(files) <= MOST else [*rows, ("", f"and {count_of(len(files) - MOST, 'file')} more")]


def _thing(cuts: Mapping[str, Any]) -> str:
    """What was read: text, or files that are one thing each, images or recordings, of which there is no length."""
    return "file" if any(cut and cut["length"] is None for cut in cuts.values()) else "text"


def _cut(cut: Mapping[str, Any]) -> str:
    if cut["length"] is None:
        return count_of(cut["count"], "file")
    return f"{count_of(cut['count'], 'chunk')} of {cut['length']:,} tokens"


def _read(cuts: Mapping[str, Any], split: bool) -> str:
    """How text was cut; of one text that was split, which half was for what."""
    halves = {"evaluation": " of its second half", "calibration": " of its first half"} if split else {}
    if _thing(cuts) == "file":
        halves = dict.fromkeys(halves, ", every other one of those given")
    said = [
        f"{what}: {_cut(cut)}{halves.get(what, '')}"
        for what in ("evaluation", "calibration")
        if (cut := cuts.get(what))
    ]
    return "; ".join(said)


def _plain(value: object) -> str:
    return NONE if value is None else visible_name(str(value))
