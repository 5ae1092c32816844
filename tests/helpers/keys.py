"""Keys to sign checkpoints with, as openssl writes them."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa


def save_private(path: Path, key, password: bytes | None = None) -> Path:
    lock = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))
    return path


def save_public(path: Path, key) -> Path:
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    path.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, kind))
    return path


def key_pair(root: Path, name: str = "key") -> tuple[Path, Path]:
    """(private, public) on P-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    return save_private(root / f"{name}.pem", key), save_public(root / f"{name}.pub", key)


def wrong_keys(root: Path) -> dict[str, Path]:
    """What is given for a private key, and is none to sign with."""
    (root / "garbage").write_bytes(b"\x00 no key")
    (root / "directory").mkdir()
    good = ec.generate_private_key(ec.SECP256R1())
    return {
        "missing": root / "nowhere",
        "a directory": root / "directory",
        "garbage": root / "garbage",
        "encrypted": save_private(root / "locked", good, b"secret"),
        "public": save_public(root / "public", good),
        "another curve": save_private(root / "curve", ec.generate_private_key(ec.SECP256K1())),
        "RSA": save_private(root / "rsa", rsa.generate_private_key(65537, 2048)),
    }
