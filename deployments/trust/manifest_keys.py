"""Keys that sign manifests, and which of them are believed for which zones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError, field_validator

from deployments.claims.model import StrictModel
from deployments.trust.key_files import KeyFileError, create_file, read_key_file, replace_file
from engine.zone import Zone, ZoneKind

MAX_KEYS = 1000
MAX_KEY_FILE_BYTES = 1 << 20


def is_shareable_kind(zone: Zone) -> bool:
    """True for the zones that manifests are for: public and a plan's."""
    return zone.kind in (ZoneKind.PUBLIC, ZoneKind.PLAN)


def key_id_of(key: Ed25519PublicKey) -> str:
    """The first 16 bytes (hex) of the SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A public key and the zones that it may sign for: `public`, `tenant/T/plan/P`, or `tenant/T/plan/*`."""

    key: Ed25519PublicKey
    zones: tuple[str, ...]

    def may_sign_for(self, zone: Zone) -> bool:
        return zone.path in self.zones or (zone.kind is ZoneKind.PLAN and f"tenant/{zone.tenant}/plan/*" in self.zones)


def check_zone_pattern(pattern: str) -> str:
    """The pattern itself.

    Raises:
        ValueError: It is none of the three forms that a `TrustedKey` knows.
    """
    literal = pattern[:-1] + "any" if pattern.endswith("/plan/*") else pattern
    if not is_shareable_kind(Zone.parse(literal)):
        raise ValueError("a key signs for public, tenant/T/plan/P or tenant/T/plan/*")
    return pattern


class _KeyEntry(StrictModel):
    public_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    zones: list[str] = Field(min_length=1, max_length=MAX_KEYS)

    @field_validator("zones")
    @classmethod
    def _are_patterns(cls, zones: list[str]) -> list[str]:
        return [check_zone_pattern(zone) for zone in zones]


class _KeyFile(StrictModel):
    keys: list[_KeyEntry] = Field(max_length=MAX_KEYS)


class TrustedKeys:
    """The public keys whose signatures count."""

    def __init__(self, keys: Iterable[TrustedKey] = ()) -> None:
        self._by_id = {key_id_of(trusted.key): trusted for trusted in keys}

    @staticmethod
    def from_file(path: Path) -> TrustedKeys:
        """Keys of a YAML file: `keys: [{public_key: HEX, zones: [public, tenant/T/plan/*]}]`.

        Raises:
            KeyFileError: Missing, too large, not YAML, an unknown field, no such key or zone, or a key listed twice.
        """
        entries = _read_key_entries(path)
        listed = [entry.public_key for entry in entries]
        if len(set(listed)) != len(listed):
            raise KeyFileError(f"{path}: the same key is listed twice")
        return TrustedKeys(
            TrustedKey(Ed25519PublicKey.from_public_bytes(bytes.fromhex(entry.public_key)), tuple(entry.zones))
            for entry in entries
        )

    def get(self, key_id: str) -> TrustedKey | None:
        return self._by_id.get(key_id)

    def may_sign_for(self, key_id: str, zone: Zone) -> bool:
        trusted = self.get(key_id)
        return trusted is not None and trusted.may_sign_for(zone)


def _read_key_entries(path: Path) -> list[_KeyEntry]:
    document = read_key_file(
        path, _KeyFile, max_bytes=MAX_KEY_FILE_BYTES, describe=lambda error: first_fault(error, _KEY_FIELDS)
    )
    return document.keys


def trust(path: Path, key: Ed25519PublicKey, zones: Sequence[str]) -> None:
    """Add a key to a file of trusted keys, made where it is missing. One that it has gets these zones instead.

    Raises:
        KeyFileError: The file cannot be used. ValueError: One of `zones` is no pattern.
    """
    public_key = key.public_bytes_raw().hex()
    present = _read_key_entries(path) if path.exists() else []
    kept = [entry.model_dump() for entry in present if entry.public_key != public_key]
    added = {"public_key": public_key, "zones": [check_zone_pattern(zone) for zone in zones]}
    replace_file(path, yaml.safe_dump({"keys": [*kept, added]}, sort_keys=False).encode())


def create_signing_key(path: Path) -> Ed25519PrivateKey:
    """A new key, kept as PKCS #8 PEM that its owner alone can read.

    Raises:
        KeyFileError: The file exists, or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        create_file(path, pem, mode=0o600)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from error
    return key


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """The key of a PEM file.

    Raises:
        KeyFileError: Missing, readable by others than its owner, or no Ed25519 private key without a passphrase.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise KeyFileError(f"{path}: a signing key must be readable by its owner only (chmod 600)")
            pem = file.read(MAX_KEY_FILE_BYTES)
        key = serialization.load_pem_private_key(pem, password=None)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path}: not an Ed25519 private key in PEM, or one with a passphrase") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path}: not an Ed25519 private key")
    return key


_KEY_FIELDS = frozenset(_KeyFile.model_fields) | frozenset(_KeyEntry.model_fields)


def first_fault(error: ValidationError, fields: frozenset[str]) -> str:
    """Where the first fault is. A name that is not a field of ours is the file's own content and is not repeated."""
    fault = error.errors(include_input=False, include_context=False, include_url=False)[0]
    known = ".".join(str(part) for part in fault["loc"] if isinstance(part, int) or part in fields)
    return f"{known or 'top level'}: unknown field" if fault["type"] == "extra_forbidden" else known or "top level"
