"""Signatures of a directory: what they cover, and what is said of keys that are none."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.keys import key_pair, wrong_keys

from surgery.checkpoint import signature
from surgery.checkpoint.signature import PublicKey, Signer, parse_digest, signed_by
from surgery.errors import DamagedCheckpoint, SourceError

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return key_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    """A directory with two files, signed."""
    root = tmp_path / "out"
    root.mkdir()
    (root / "surgery.json").write_text("{}")
    (root / "model.bin").write_bytes(bytes(1000))
    Signer(keys[0]).sign(root)
    return root


def test_what_was_signed_is_what_the_library_itself_verifies(signed: Path, keys: tuple[Path, Path]) -> None:
    PublicKey(keys[1]).check(signed)
    assert signed_by(signed) == PublicKey(keys[1]).fingerprint
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--public_key", keys[1]]
    ended = subprocess.run([*command, "--signature", signed / "model.sig", signed], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def ignoring(root: Path) -> None:
    """The signer's own library can leave files out of a signature; here nothing may be."""
    from model_signing import hashing, signing

    config = hashing.Config().set_ignored_paths(paths=["model.sig", "model.bin"])
    key = root.parent / "again.pem"
    signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(config).sign(root, root / "model.sig")


def another_payload(root: Path) -> None:
    """The hash of a changed file, put into the signature too."""
    content = json.loads((root / "model.sig").read_text())
    before = hashlib.sha256((root / "model.bin").read_bytes()).hexdigest()
    (root / "model.bin").write_bytes(b"x")
    payload = base64.b64decode(content["dsseEnvelope"]["payload"]).decode()
    assert before in payload
    forged = payload.replace(before, hashlib.sha256(b"x").hexdigest())
    content["dsseEnvelope"]["payload"] = base64.b64encode(forged.encode()).decode()
    (root / "model.sig").write_text(json.dumps(content))


CHANGES: dict[str, tuple[Change, str]] = {
    "a bit": (lambda root: (root / "model.bin").write_bytes(bytes(999) + b"\1"), "model.bin is not the file"),
    "a file more": (lambda root: (root / "README.md").write_text("x"), "README.md was added"),
    "a file less": (lambda root: (root / "model.bin").unlink(), "model.bin was removed"),
    "no signature": (lambda root: (root / "model.sig").unlink(), "not signed"),
    "an empty one": (lambda root: (root / "model.sig").write_text(""), "no signature of this checkpoint"),
    "another object": (lambda root: (root / "model.sig").write_text("[[]]"), "no signature of this checkpoint"),
    "another payload": (another_payload, "no signature of this checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_after_signing_is_named(signed: Path, keys: tuple[Path, Path], case: str) -> None:
    change, says = CHANGES[case]
    change(signed)
    with pytest.raises(DamagedCheckpoint, match=says) as error:
        PublicKey(keys[1]).check(signed)
    assert len(str(error.value)) < 250


def test_a_signature_that_leaves_files_out_does_not_count(signed: Path) -> None:
    _, public = key_pair(signed.parent, "again")
    ignoring(signed)
    with pytest.raises(DamagedCheckpoint, match="model.bin was added"):
        PublicKey(public).check(signed)


def test_the_signature_of_another_key_is_named_as_such(signed: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match="is of another key"):
        PublicKey(key_pair(signed.parent, "other")[1]).check(signed)


def test_what_git_and_the_hub_leave_is_not_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    for name in (".gitattributes", ".git/HEAD", ".cache/huggingface/x"):
        (signed / name).parent.mkdir(parents=True, exist_ok=True)
        (signed / name).write_text("x")
    PublicKey(keys[1]).check(signed)


def test_keys_that_sign_nothing_are_refused_by_name(tmp_path: Path) -> None:
    for what, path in wrong_keys(tmp_path).items():
        with pytest.raises(SourceError) as error:
            Signer(path)
        assert str(path) in str(error.value) and len(str(error.value).replace(str(path), "")) < 150, what
    with pytest.raises(SourceError, match="public half"):
        PublicKey(key_pair(tmp_path)[0])


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    private, public = key_pair(tmp_path)
    for made in (lambda: Signer(private), lambda: PublicKey(public)):
        with pytest.raises(SourceError, match=r"pip install 'checkpoint-surgery\[sign\]'"):
            made()
    assert "checkpoint-surgery[sign]" in signature.MISSING


@pytest.mark.parametrize("text", ["", "sha256:", "sha256:" + "g" * 64, "0" * 63, "md5:" + "0" * 64])
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="64 hexadecimal digits"):
        parse_digest(text)
    assert parse_digest(f"{'A' * 64}\n") == f"sha256:{'a' * 64}"
