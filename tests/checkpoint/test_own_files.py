"""A checkpoint's files are its own: links may stay inside, or lead to the hub cache's blobs, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from surgery.checkpoint.own_files import require_own_files
from surgery.errors import SourceError


def model(root: Path) -> Path:
    root.mkdir(parents=True)
    (root / "config.json").write_text("{}")
    return root


def secret(root: Path) -> Path:
    path = root / "id_rsa"
    path.write_text("a private text")
    return path


def through(root: Path, source: Path) -> None:
    """A link to a link that leaves."""
    (source / "a").symlink_to(secret(root))
    (source / "LICENSE").symlink_to("a")


def template(root: Path, source: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "x.jinja").symlink_to(secret(root))


def folder(root: Path, source: Path) -> None:
    (root / "templates").mkdir()
    (source / "additional_chat_templates").symlink_to(root / "templates")


FOREIGN = {
    "a companion": lambda root, source: (source / "LICENSE").symlink_to(secret(root)),
    "weights": lambda root, source: (source / "model.safetensors").symlink_to(secret(root)),
    "a neighbour": lambda root, source: (secret(root), (source / "LICENSE").symlink_to("../id_rsa")),
    "a device": lambda root, source: (source / "tokenizer.json").symlink_to("/dev/zero"),
    "through another": through,
    "a template": template,
    "a folder": folder,
    "a pipe": lambda root, source: os.mkfifo(source / "tokenizer.json"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_leads_out_is_refused(case: str, tmp_path: Path) -> None:
    make: Callable[[Path, Path], object] = FOREIGN[case]
    make(tmp_path, source := model(tmp_path / "source"))
    with pytest.raises(SourceError) as caught:
        require_own_files(source)
    assert "link to" in str(caught.value) or "pipe" in str(caught.value)


def test_what_stays_inside_is_taken(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    (source / "LICENSE").symlink_to("config.json")
    os.link(secret(tmp_path), source / "NOTICE")
    (tmp_path / "other").symlink_to(source)
    for root in (source, tmp_path / "other"):  # the directory itself may be a link
        require_own_files(root)


def test_a_hub_cache_is_taken_and_only_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = model(tmp_path / "snapshots" / "0123"), tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "abcd").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    require_own_files(snapshot)
    (blobs / "ef").symlink_to(secret(tmp_path))
    (snapshot / "LICENSE").symlink_to("../../blobs/ef")
    with pytest.raises(SourceError, match="LICENSE"):
        require_own_files(snapshot)


def test_blobs_beside_what_is_no_snapshot_are_foreign(tmp_path: Path) -> None:
    source = model(tmp_path / "models" / "source")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "key").write_text("private")
    (source / "LICENSE").symlink_to("../../blobs/key")
    with pytest.raises(SourceError, match="LICENSE"):
        require_own_files(source)
