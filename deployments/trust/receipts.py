"""Receipts of purges: what was done where, signed, so that whoever holds the public key can check it later.

A receipt holds no content and no digest of any: the zone, its epoch, counts, names, times and the key's id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError, field_validator, model_validator

from deployments.claims.model import StrictModel, canonical_json
from deployments.trust.epochs import MAX_EPOCH
from deployments.trust.key_files import KeyFileError
from deployments.trust.keyring import MAX_KEYS_IN_RING, Keyring, hex_lines
from deployments.trust.manifest_keys import key_id_of
from engine.zone import Zone

MAX_RECEIPT_BYTES = 1 << 20
MAX_REPLICAS = 1000  # in one receipt
MAX_PUBLIC_KEY_FILE_BYTES = 1 << 14
UNNAMED = "*"  # a replica that did not say its name, or all of a pool

_SIGNED_AS = b"zoneserve purge receipt 1\n"  # so that the signature can stand for nothing else
_KEY_INFO = b"purge-receipt"

_Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
_UnixMs = Annotated[int, Field(ge=0, lt=253_402_300_800_000)]  # to the year 9999
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9*][A-Za-z0-9_.:@#|/-]{0,127}$")]


class Outcome(StrEnum):
    """What became of a purge on one replica."""

    PURGED = "purged"
    FAILED = "failed"  # it answered, with an error
    SILENT = "silent"  # no answer within the limit, or the replica or the way to it is gone


class ReplicaPurge(StrictModel):
    """What one replica did; counts are of blocks, each of them once, and 0 where it did nothing.

    `num_findable` were in the index and not pinned, `num_scrubbed` zeroed at once, `num_in_use` are in use: no longer
    findable, scrubbed when they are freed. `num_pinned` were kept resident and are no more.
    """

    replica: _Name
    outcome: Outcome = Field(default=Outcome.PURGED, strict=False)  # JSON has no enumerations
    num_findable: _Count = 0
    num_scrubbed: _Count = 0
    num_in_use: _Count = 0
    num_pinned: _Count = 0


class PoolPurge(StrictModel):
    """The replicas of one pool."""

    pool: _Name
    replicas: tuple[ReplicaPurge, ...] = Field(min_length=1, max_length=MAX_REPLICAS, strict=False)


class Receipt(StrictModel):
    """One purge. Times are Unix milliseconds; `complete` means that every replica of every pool has purged."""

    version: Literal[1] = 1
    zone: str
    epoch: int = Field(ge=1, le=MAX_EPOCH)
    principal: str = Field(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")
    started_ms: _UnixMs
    finished_ms: _UnixMs
    pools: tuple[PoolPurge, ...] = Field(min_length=1, max_length=8, strict=False)
    complete: bool

    @field_validator("zone")
    @classmethod
    def _is_a_zone(cls, path: str) -> str:
        return Zone.parse(path).path

    @model_validator(mode="after")
    def _says_what_its_parts_say(self) -> Self:
        if self.complete != is_complete(self.pools):
            raise ValueError("complete contradicts the replicas")
        return self

    @property
    def replicas(self) -> tuple[ReplicaPurge, ...]:
        return tuple(replica for pool in self.pools for replica in pool.replicas)


def is_complete(pools: Sequence[PoolPurge]) -> bool:
    """True where every replica has purged."""
    return all(replica.outcome is Outcome.PURGED for pool in pools for replica in pool.replicas)


class ReceiptError(Exception):
    """A receipt that is not to be believed; the message says why and repeats nothing of it."""


class _Envelope(StrictModel):
    key_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")
    receipt: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """A receipt, the id of the key that signed it, and `data`, the JSON of both as the client gets it."""

    receipt: Receipt
    key_id: str
    data: bytes

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `data`."""
        return hashlib.sha256(self.data).hexdigest()

    def audit_fields(self) -> dict[str, str | int]:
        """Of the audit event `zone.purge`."""
        receipt = self.receipt
        return {
            "zone": receipt.zone,
            "epoch": receipt.epoch,
            "principal": receipt.principal,
            "num_entries": sum(replica.num_findable + replica.num_pinned for replica in receipt.replicas),
            "num_blocks": sum(replica.num_scrubbed for replica in receipt.replicas),
            "num_replicas": sum(replica.outcome is Outcome.PURGED for replica in receipt.replicas),
            "receipt_digest": self.digest,
            "reason": "complete" if receipt.complete else "incomplete",
        }


class ReceiptSigner:
    """Signs with the key that belongs to the ring's current master key."""

    def __init__(self, keyring: Keyring) -> None:
        self.set_keyring(keyring)

    def set_keyring(self, keyring: Keyring) -> None:
        """From the next receipt on."""
        self._key = _private_keys(keyring)[0]

    def sign(self, receipt: Receipt) -> SignedReceipt:
        key = self._key
        document = receipt.model_dump(mode="json")
        name = key_id_of(key.public_key())
        envelope = {
            "key_id": name,
            "signature": key.sign(_SIGNED_AS + canonical_json(document).encode()).hex(),
            "receipt": document,
        }
        return SignedReceipt(receipt, name, canonical_json(envelope).encode() + b"\n")


def verify_receipt(data: bytes, keys: Sequence[Ed25519PublicKey]) -> SignedReceipt:
    """The receipt of an envelope, if one of the keys signed it.

    Nothing of the receipt is looked at before its signature holds; what is parsed then are the bytes that were signed.

    Raises:
        ReceiptError: Malformed, of an unknown key, or not as it was signed.
    """
    envelope = _envelope(data)
    signer = next((key for key in keys if key_id_of(key) == envelope.key_id), None)
    if signer is None:
        raise ReceiptError("signed by a key that is not among the given ones")
    try:
        payload = canonical_json(envelope.receipt).encode()
        signer.verify(bytes.fromhex(envelope.signature), _SIGNED_AS + payload)
    except InvalidSignature:
        raise ReceiptError("the signature does not hold") from None
    except (ValueError, RecursionError):
        raise ReceiptError("not a receipt") from None
    return _signed(envelope, payload, data)


def read_unverified(data: bytes) -> SignedReceipt:
    """The receipt of an envelope on its sender's word alone.

    Raises:
        ReceiptError: Malformed.
    """
    envelope = _envelope(data)
    try:
        return _signed(envelope, canonical_json(envelope.receipt).encode(), data)
    except (ValueError, RecursionError):
        raise ReceiptError("not a receipt") from None


def _envelope(data: bytes) -> _Envelope:
    if len(data) > MAX_RECEIPT_BYTES:
        raise ReceiptError(f"larger than {MAX_RECEIPT_BYTES} bytes")
    try:
        return _Envelope.model_validate(json.loads(data))
    except (ValidationError, ValueError, RecursionError):
        raise ReceiptError("not a receipt") from None


def _signed(envelope: _Envelope, payload: bytes, data: bytes) -> SignedReceipt:
    try:
        return SignedReceipt(Receipt.model_validate(json.loads(payload)), envelope.key_id, data)
    except ValidationError:
        raise ReceiptError("not a receipt") from None


def receipt_keys(keyring: Keyring) -> tuple[Ed25519PublicKey, ...]:
    """What receipts are verified with, newest first; one of each master key in the ring."""
    return tuple(key.public_key() for key in _private_keys(keyring))


def read_receipt_keys(path: Path) -> tuple[Ed25519PublicKey, ...]:
    """Public keys of a file, one in hex a line, as `zoneserve zone receipt-key` prints them.

    Raises:
        KeyFileError: Missing, too large, none, too many, or not keys.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PUBLIC_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from error
    values = hex_lines(str(path), data)
    if not 1 <= len(values) <= MAX_KEYS_IN_RING or len(data) > MAX_PUBLIC_KEY_FILE_BYTES:
        raise KeyFileError(f"{path}: a file of receipt keys holds 1 to {MAX_KEYS_IN_RING}")
    try:
        return tuple(map(Ed25519PublicKey.from_public_bytes, values))
    except ValueError:
        raise KeyFileError(f"{path}: not Ed25519 public keys") from None


def _private_keys(keyring: Keyring) -> tuple[Ed25519PrivateKey, ...]:
    return tuple(map(Ed25519PrivateKey.from_private_bytes, keyring.derive(_KEY_INFO)))
