"""Receipts: what was signed is what is believed, and nothing in them is content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.claims.model import canonical_json
from deployments.trust.audit.record import AuditEvent
from deployments.trust.key_files import KeyFileError
from deployments.trust.keyring import Keyring
from deployments.trust.receipts import (
    MAX_RECEIPT_BYTES,
    Outcome,
    PoolPurge,
    Receipt,
    ReceiptError,
    ReceiptSigner,
    ReplicaPurge,
    SignedReceipt,
    is_complete,
    read_receipt_keys,
    read_unverified,
    receipt_keys,
    verify_receipt,
)

OLD, NEW = Keyring((b"o" * 32,)), Keyring((b"n" * 32, b"o" * 32))
DECODE = PoolPurge(
    pool="decode",
    replicas=(
        ReplicaPurge(replica="abc123", num_findable=3, num_scrubbed=2, num_in_use=1, num_pinned=4),
        ReplicaPurge(replica="def456", num_findable=1),
    ),
)
SILENT = PoolPurge(pool="prefill", replicas=(ReplicaPurge(replica="*", outcome=Outcome.SILENT),))


def receipt(*pools: PoolPurge, **changes: Any) -> Receipt:
    fields: dict[str, Any] = {
        "zone": "tenant/acme/plan/gold",
        "epoch": 2,
        "principal": "ann",
        "started_ms": 1_795_000_000_000,
        "finished_ms": 1_795_000_000_250,
        "pools": pools or (DECODE,),
        "complete": is_complete(pools or (DECODE,)),
    }
    return Receipt(**fields | changes)


SIGNED = ReceiptSigner(OLD).sign(receipt(DECODE, SILENT))


def envelope(**changes: Any) -> bytes:
    return json.dumps(json.loads(SIGNED.data) | changes).encode()


def test_receipt_holds_under_the_key_that_signed_it_and_survives_another_layout() -> None:
    for data in (SIGNED.data, json.dumps(json.loads(SIGNED.data), indent=2).encode()):
        found = verify_receipt(data, receipt_keys(OLD))
        assert found.receipt == SIGNED.receipt == receipt(DECODE, SILENT)
        assert found.key_id == SIGNED.key_id


def test_receipt_of_before_a_rotation_holds_by_the_ring_and_new_ones_are_under_the_new_key() -> None:
    assert verify_receipt(SIGNED.data, receipt_keys(NEW)).receipt == SIGNED.receipt
    signer = ReceiptSigner(OLD)
    signer.set_keyring(NEW)
    rotated = signer.sign(receipt())
    assert rotated.key_id != SIGNED.key_id
    assert verify_receipt(rotated.data, receipt_keys(NEW)[:1])
    with pytest.raises(ReceiptError, match="not among"):
        verify_receipt(rotated.data, receipt_keys(OLD))
    with pytest.raises(ReceiptError, match="not among"):
        verify_receipt(rotated.data, ())


def test_every_leaf_is_covered_by_the_signature() -> None:
    other: dict[type, Any] = {str: "other", int: 7, bool: True}

    def changed(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [value | {key: new} for key, item in value.items() for new in changed(item)]
        if isinstance(value, list):
            return [[*value[:at], new, *value[at + 1 :]] for at, item in enumerate(value) for new in changed(item)]
        return [other[type(value)]]

    variants = changed(json.loads(SIGNED.data)["receipt"])
    assert len(variants) > 20
    for variant in variants:
        with pytest.raises(ReceiptError, match="signature does not hold"):
            verify_receipt(envelope(receipt=variant), receipt_keys(OLD))


@given(st.integers(0, len(SIGNED.data) - 2), st.integers(1, 255))
def test_a_changed_byte_makes_no_other_receipt(at: int, change: int) -> None:
    data = bytearray(SIGNED.data)
    data[at] ^= change
    try:
        found = verify_receipt(bytes(data), receipt_keys(OLD))
    except ReceiptError:
        return
    assert found.receipt == SIGNED.receipt  # an upper-case digit of an escape, for example


@pytest.mark.parametrize(
    "data",
    [
        b"",
        SIGNED.data[:-20],
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        envelope(key_id="A" * 32),
        envelope(signature="00"),
        envelope(receipt=[]),
        envelope(receipt={"a": float("nan")}),
        envelope(more=1),
        b" " * (MAX_RECEIPT_BYTES + 1),
    ],
)
def test_what_is_no_receipt_is_refused_and_not_repeated(data: bytes) -> None:
    for read in (lambda: verify_receipt(data, receipt_keys(OLD)), lambda: read_unverified(data)):
        with pytest.raises(ReceiptError) as refusal:
            read()
        assert len(str(refusal.value)) < 60


def test_signature_of_something_else_is_none_of_a_receipt() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    document = json.loads(SIGNED.data)["receipt"]
    key = Ed25519PrivateKey.from_private_bytes(OLD.derive(b"purge-receipt")[0])
    bare = key.sign(canonical_json(document).encode()).hex()
    with pytest.raises(ReceiptError, match="signature does not hold"):
        verify_receipt(envelope(signature=bare), receipt_keys(OLD))


def test_unverified_reading_takes_the_form_alone() -> None:
    assert read_unverified(SIGNED.data).receipt == SIGNED.receipt
    lie = json.loads(SIGNED.data)["receipt"] | {"complete": True}
    with pytest.raises(ReceiptError):
        read_unverified(envelope(receipt=lie))


@pytest.mark.parametrize(
    "changes",
    [
        {"complete": False},
        {"zone": "tenant/../plan/p"},
        {"zone": "Public"},
        {"epoch": 0},
        {"epoch": True},
        {"principal": ""},
        {"principal": "Ann Smith, 1 Main Street"},
        {"started_ms": -1},
        {"finished_ms": 10**15},
        {"pools": ()},
        {"prompt": "text"},
    ],
)
def test_receipt_with_a_field_that_it_may_not_have_is_not_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        receipt(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"replica": ""}, {"replica": "two words"}, {"replica": "a" * 129}, {"num_findable": -1}, {"num_in_use": 1.0}],
)
def test_replica_entry_that_is_none_is_not_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ReplicaPurge(**{"replica": "abc"} | changes)


def test_audit_record_takes_its_fields() -> None:
    for signed in (SIGNED, ReceiptSigner(OLD).sign(receipt())):
        event = AuditEvent("zone.purge", **signed.audit_fields())
        assert event.fields["receipt_digest"] == signed.digest
        assert event.fields["num_entries"] == 3 + 4 + 1
        assert (event.fields["num_blocks"], event.fields["num_replicas"]) == (2, 2)
    assert SIGNED.audit_fields()["reason"] == "incomplete"
    assert ReceiptSigner(OLD).sign(receipt()).audit_fields()["reason"] == "complete"


def test_digest_is_of_what_the_client_got() -> None:
    import hashlib

    assert SIGNED.digest == hashlib.sha256(SIGNED.data).hexdigest()
    assert SignedReceipt(SIGNED.receipt, SIGNED.key_id, SIGNED.data + b" ").digest != SIGNED.digest


def test_public_keys_of_a_file_are_read_and_bad_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "receipt.pub"
    keys = receipt_keys(NEW)
    path.write_text("".join(f"{key.public_bytes_raw().hex()}  # one\n" for key in keys))
    assert read_receipt_keys(path) == keys
    for content in ("", "# none", "ab" * 31, "xyz", f"{'ab' * 32}\n" * 9, "#" * (1 << 15)):
        path.write_text(content)
        with pytest.raises(KeyFileError, match=r"receipt\.pub: "):
            read_receipt_keys(path)
    with pytest.raises(KeyFileError, match="No such file"):
        read_receipt_keys(tmp_path / "none")
