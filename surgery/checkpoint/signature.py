"""Seals on a checkpoint: the digest of its manifest, and signatures of all of its files (OpenSSF model-signing).

A signature is the file `model.sig` beside the others, as `model_signing sign key` writes it, and `model_signing verify
key` takes it too. Keys are elliptic curve keys in PEM files. https://github.com/sigstore/model-transparency
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

from ..endings.temporary import of_temporary, temporary
from ..errors import DamagedCheckpoint, OutputError, SourceError, brief
from .contents import NOT_OURS, SIGNATURE
from .copying import sha256_of
from .disk import replacing
from .manifest import MANIFEST

MOST_KEY, MOST_SIGNATURE = 64 << 10, 64 << 20  # bytes; both are a small part of it
MISSING = "signatures need model-signing, which is not installed: pip install 'checkpoint-surgery[sign]'."
# What the library says of files that differ -> what became of the first of them.
_DIFFERENCES = {
    "Hash mismatch for '([^']*)'": "is not the file that was signed",
    r"Extra files found in model '[^']*': ([^,\"]+)": "was added after it was signed",
    r"Missing files in model '[^']*': ([^,\"]+)": "was removed after it was signed",
}
MADE = "openssl ecparam -name prime256v1 -genkey -noout -out KEY"


def manifest_digest(root: Path) -> str:
    """The SHA-256 of surgery.json, as "sha256:...". That names every file by hash, so it stands for all of them."""
    return f"sha256:{sha256_of(root / MANIFEST)}"


def parse_digest(text: str) -> str:
    """The digest as `manifest_digest` writes it; SourceError for what is none."""
    digest = text.strip().lower().removeprefix("sha256:")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise SourceError(f"--digest {text[:80]!r} is not sha256: and 64 hexadecimal digits, as run prints it.")
    return f"sha256:{digest}"


class Signer:
    """A private key that was read, and what it signs. SourceError, naming the file, where there is none to read."""

    def __init__(self, key: Path) -> None:
        signing, _, _ = _library()
        _require_small(key, "--sign", MOST_KEY)
        try:
            self._signing = signing.Config().use_elliptic_key_signer(private_key=key)
        except Exception as error:  # cryptography has many, and a TypeError for a key with a password
            locked = "a password protects it" in _reason(error)
            way_out = "write it without: openssl ec -in KEY -out PLAIN" if locked else f"make one: {MADE}"
            raise SourceError(f"--sign {key}: {_reason(error)}; {way_out}.") from error

    def sign(self, root: Path) -> str:
        """Write `model.sig`, the signature of every other file in `root`; returns the fingerprint of the key.

        Whole or not at all. SourceError where a file cannot be signed, OutputError where it cannot be written.
        """
        try:
            with temporary() as scratch:  # what is signed must not hold what is being written
                made = scratch / SIGNATURE
                try:
                    self._signing.set_hashing_config(_hashing((SIGNATURE, *NOT_OURS))).sign(root, made)
                except OSError as error:
                    raise of_temporary(error, made) or error from error
                with replacing(root / SIGNATURE) as partial:
                    partial.write_bytes(made.read_bytes())
        except OSError as error:
            raise OutputError(f"{root / SIGNATURE} cannot be written ({error.strerror}); check the disk.") from error
        except ValueError as error:
            raise SourceError(f"{root} cannot be signed ({brief(error)}); sign a directory of plain files.") from error
        fingerprint = signed_by(root)
        assert fingerprint is not None
        return fingerprint


def signed_by(root: Path) -> str | None:
    """The fingerprint of the key that the signature in `root` names, unchecked; None without a signature."""
    if not (root / SIGNATURE).is_file():
        return None
    try:
        _require_small(root / SIGNATURE, "", MOST_SIGNATURE)
        hint = json.loads((root / SIGNATURE).read_bytes())["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, LookupError, TypeError, RecursionError, SourceError, OSError):
        return "unknown"
    return f"sha256:{hint}" if re.fullmatch("[0-9a-f]{64}", str(hint)) else "unknown"


class PublicKey:
    """A public key that was read, and what it checks. SourceError, naming the file, where there is none to read."""

    def __init__(self, key: Path) -> None:
        _, self._verifying, serialization = _library()
        _require_small(key, "--public-key", MOST_KEY)
        self._path = key
        try:
            self._verifying.Config().use_elliptic_key_verifier(public_key=key)  # of a curve that is supported
            public: Any = serialization.load_pem_public_key(key.read_bytes())
        except Exception as error:  # cryptography has many
            made = "openssl ec -in PRIVATE -pubout -out PUBLIC"
            raise SourceError(f"--public-key {key}: {_reason(error)}; give the public half: {made}.") from error
        pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.fingerprint = f"sha256:{hashlib.sha256(pem).hexdigest()}"

    def check(self, root: Path) -> None:
        """DamagedCheckpoint unless `model.sig` is this key's signature of every other file in `root`, as they are."""
        if not (root / SIGNATURE).is_file():
            raise DamagedCheckpoint(f"{root} is not signed: it has no {SIGNATURE}; get it from who signs, or sign it.")
        _require_small(root / SIGNATURE, "", MOST_SIGNATURE)
        if (by := signed_by(root)) not in (self.fingerprint, "unknown"):
            raise DamagedCheckpoint(f"{SIGNATURE} is of another key ({by}), not of {self._path} ({self.fingerprint}).")
        verifier = self._verifying.Config().use_elliptic_key_verifier(public_key=self._path)
        verifier.set_hashing_config(_hashing((SIGNATURE, *NOT_OURS), checking=True))
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the library prints advice on old signatures
                verifier.verify(root, root / SIGNATURE)
        except Exception as error:  # whatever a signature that anyone may have written makes of the library
            raise DamagedCheckpoint(_why(error)) from error


def _why(error: Exception) -> str:
    """What the library found, in a sentence."""
    again = "if that is meant to be, sign again: surgery seal OUT --sign KEY."
    for pattern, what in _DIFFERENCES.items():
        if found := re.search(pattern, str(error)):
            return f"{found[1][:80]} {what}; {again}"
    kind = type(error).__name__
    return f"{SIGNATURE} is no signature of this checkpoint by this key ({kind}); {again}"


def _hashing(ignored: tuple[str, ...], checking: bool = False) -> Any:
    """How files are hashed. While checking, whatever a signature says is to be left out is not."""
    from model_signing import hashing

    class Everything(hashing.Config):
        def add_ignored_paths(self, **left_out: Any) -> None:
            """Nothing more is left out."""

    kind: Any = Everything if checking else hashing.Config
    # In the hub's cache files are links; where those lead is another check's.
    return kind().set_ignored_paths(paths=ignored, ignore_git_paths=True).set_allow_symlinks(checking)


def _library() -> tuple[Any, Any, Any]:
    """`model_signing.signing`, `model_signing.verifying` and cryptography's `serialization`."""
    try:
        from cryptography.hazmat.primitives import serialization
        from model_signing import signing, verifying
    except ImportError as error:
        raise SourceError(MISSING) from error
    return signing, verifying, serialization


def _require_small(path: Path, option: str, most: int) -> None:
    """SourceError unless `path` is a plain file of at most `most` bytes that can be opened."""
    told = f"{option} {path}".strip()
    try:
        if not path.is_file():
            raise SourceError(f"{told} is no file; give a key in PEM." if path.exists() else f"{told} does not exist.")
        with path.open("rb") as file:
            if file.seek(0, io.SEEK_END) > most:
                raise SourceError(f"{told} is larger than any such file; check the path.")
    except OSError as error:
        raise SourceError(f"{told} cannot be read ({error.strerror}); check the path.") from error


def _reason(error: Exception) -> str:
    """Why a key was not taken, in words."""
    if isinstance(error, TypeError) and "password" in str(error).lower():
        return "a password protects it"
    if isinstance(error, AttributeError):  # the library asks any key for its curve
        return "not an elliptic curve key"
    if "Unsupported key for curve" in str(error):
        return "a curve that signatures do not take (P-256, P-384, P-521)"
    return "no key of that kind in PEM"
