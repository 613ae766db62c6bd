"""Manifests: what a signature covers, who may sign for what, and a folder of them over time and under faults."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pydantic import ValidationError

from deployments.claims.model import canonical_json
from deployments.trust import manifest as manifest_module
from deployments.trust.key_files import KeyFileError
from deployments.trust.manifest import (
    MAX_KEPT_TEXT_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_REVISION,
    MAX_SEGMENTS,
    TEXTS_FOLDER,
    Manifest,
    ManifestError,
    Reason,
    SharedSegment,
    keep_texts,
    kept_text,
    next_revision,
    publish,
    read_bounded,
    rfc3339,
    sign,
    unix_time,
    verify,
)
from deployments.trust.manifest_keys import (
    MAX_KEY_FILE_BYTES,
    TrustedKey,
    TrustedKeys,
    create_signing_key,
    key_id_of,
    read_signing_key,
    trust,
)
from deployments.trust.manifest_set import Floor, ManifestSet, Refusal
from engine.zone import PUBLIC, Zone
from tests.deployments.support import Clock

ACME, OTHER = Ed25519PrivateKey.from_private_bytes(b"a" * 32), Ed25519PrivateKey.from_private_bytes(b"o" * 32)
RELEASE = Ed25519PrivateKey.from_private_bytes(b"r" * 32)
TRUSTED = TrustedKeys(
    [
        TrustedKey(ACME.public_key(), ("tenant/acme/plan/*",)),
        TrustedKey(OTHER.public_key(), ("tenant/other/plan/gold",)),
        TrustedKey(RELEASE.public_key(), ("public",)),
    ]
)
GOLD, SILVER = Zone.parse("tenant/acme/plan/gold"), Zone.parse("tenant/acme/plan/silver")
NOW = unix_time("2026-11-24T12:00:00Z")


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def manifest(*texts: str, zone: str = GOLD.path, revision: int = 1, **changes: Any) -> Manifest:
    segments = tuple(
        SharedSegment(id=f"s{index}", sha256=digest_of(text), title=f"text {index}") for index, text in enumerate(texts)
    )
    values = {"approver": "Plan office", "effective": rfc3339(NOW - 60), "expires": rfc3339(NOW + 3600)}
    return Manifest(zone=zone, revision=revision, **(values | {"segments": segments} | changes))


def envelope(document: object, key: Ed25519PrivateKey = ACME, **changes: Any) -> bytes:
    """An envelope around any document, signed as `sign` would."""
    payload = canonical_json(document).encode()
    fields = {
        "key_id": key_id_of(key.public_key()),
        "signature": key.sign(b"zoneserve manifest 1\n" + payload).hex(),
        "manifest": document,
    }
    return json.dumps(fields | changes).encode()


def document(**changes: Any) -> dict[str, Any]:
    """A good manifest as JSON has it, with changes."""
    return manifest("a", "b").model_dump(mode="json") | changes


def reason_of(data: bytes, trusted: TrustedKeys = TRUSTED) -> tuple[Reason, str]:
    with pytest.raises(ManifestError) as refusal:
        verify(data, trusted)
    return refusal.value.reason, refusal.value.detail


# --- one manifest ---


def test_signed_manifest_is_verified_and_says_what_it_shares() -> None:
    signed = verify(sign(manifest("a", "b"), ACME), TRUSTED)
    assert signed.zone == GOLD
    assert signed.manifest == manifest("a", "b")
    assert signed.content_digests == {digest_of("a"), digest_of("b")}
    assert signed.key_id == key_id_of(ACME.public_key())
    assert signed.sha256 == hashlib.sha256(canonical_json(document()).encode()).hexdigest()


def test_envelope_of_the_test_is_that_of_the_product() -> None:
    assert verify(envelope(document()), TRUSTED) == verify(sign(manifest("a", "b"), ACME), TRUSTED)


def test_the_same_manifest_is_signed_to_the_same_bytes() -> None:
    assert sign(manifest("a"), ACME) == sign(manifest("a"), ACME)
    assert sign(manifest("a"), ACME).endswith(b"}\n")


segments = st.lists(
    st.builds(
        SharedSegment,
        id=st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,63}", fullmatch=True),
        sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
        title=st.text(st.characters(categories=("L", "N")), min_size=1, max_size=120),
    ),
    unique_by=lambda segment: segment.id,
    max_size=5,
).map(tuple)


@given(segments, st.integers(1, MAX_REVISION), st.integers(0, 2**32), st.integers(1, 2**31))
def test_every_manifest_that_is_signed_comes_back_the_same(
    listed: tuple[SharedSegment, ...], revision: int, start: int, length: int
) -> None:
    made = manifest(revision=revision, segments=listed, effective=rfc3339(start), expires=rfc3339(start + length))
    signed = verify(sign(made, ACME), TRUSTED)
    assert signed.manifest == made
    assert (signed.effective, signed.expires) == (start, start + length)
    assert signed.state(start - 0.5) is Reason.NOT_YET_EFFECTIVE
    assert signed.state(start) is None
    assert signed.state(start + length - 0.5) is None
    assert signed.state(start + length) is Reason.EXPIRED


SIGNED = sign(manifest("a", "b"), ACME)


@given(st.integers(0, len(SIGNED) - 1), st.integers(1, 255))
@settings(max_examples=500)
def test_no_changed_byte_changes_what_is_shared(place: int, change: int) -> None:
    changed = bytearray(SIGNED)
    changed[place] ^= change
    try:
        verified = verify(bytes(changed), TRUSTED)
    except ManifestError:
        return
    assert verified == verify(SIGNED, TRUSTED)  # white space at the end


@pytest.mark.parametrize("length", range(0, len(SIGNED) - 2, 7))
def test_truncated_envelope_is_not_json(length: int) -> None:
    assert reason_of(SIGNED[:length])[0] is Reason.NOT_JSON


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        verify(data, TRUSTED)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values, st.sampled_from([*Manifest.model_fields, "segments.id", "segments.sha256", "segments.title"]))
def test_a_signed_field_of_any_content_is_taken_or_refused_by_name(value: object, name: str) -> None:
    changed = document()
    target = changed["segments"][0] if "." in name else changed
    target[name.rpartition(".")[2]] = value
    try:
        data = envelope(changed)
    except ValueError:
        return  # NaN, which canonical JSON does not have
    with suppress(ManifestError):  # and nothing else
        assert verify(data, TRUSTED).manifest.model_dump(mode="json") == changed


def test_a_field_at_fault_is_named_and_its_content_is_not() -> None:
    secret = "SSN 123-45-6789"
    cases: list[tuple[dict[str, Any], str]] = [
        (document(approver=secret * 20), "approver"),
        (document(zone=1), "zone"),
        (document(revision="1"), "revision"),
        (document(revision=True), "revision"),
        (document(revision=0), "revision"),
        (document(revision=MAX_REVISION + 1), "revision"),
        (document(revision=1.0), "revision"),
        (document(version=2), "version"),
        (document(effective=secret), "effective"),
        (document(expires="2027-02-30T00:00:00Z"), "expires"),
        (document(expires="2027-01-01T00:00:00+00:00"), "expires"),
        (document(expires="2027-01-01T00:00:00Z\n"), "expires"),
        (document(expires=document()["effective"]), "top level"),
        (document(approver=""), "approver"),
        (document(approver="a\nb"), "approver"),
        (document(approver=" a"), "approver"),
        (document(segments=None), "segments"),
        (document(segments=[{"id": "a", "sha256": "0" * 64}]), "segments.0.title"),
        (document(segments=[{"id": secret, "sha256": "0" * 64, "title": "t"}]), "segments.0.id"),
        (document(segments=[{"id": "a", "sha256": "0" * 63, "title": "t"}]), "segments.0.sha256"),
        (document(segments=[{"id": "a", "sha256": "A" * 64, "title": "t"}]), "segments.0.sha256"),
        (document(segments=[{"id": "a", "sha256": "0" * 64, "title": "t" * 121}]), "segments.0.title"),
        (document(segments=[{"id": "a", "sha256": "0" * 64, "title": "t", secret: 1}]), "segments.0: unknown field"),
        (document(**{secret: 1}), "top level: unknown field"),
        ({key: value for key, value in document().items() if key != "expires"}, "expires"),
    ]
    for changed, where in cases:
        assert reason_of(envelope(changed)) == (Reason.MALFORMED, where)


@pytest.mark.parametrize(
    "zone",
    [
        "",
        "tenant/acme/plan/..",
        "tenant/acme/plan/",
        "tenant//plan/gold",
        "tenant/acme/plan/gold/",
        "tenant/acme/plan/*",
        "tenant/" + "a" * 10_000 + "/plan/gold",
        "tenant/acme/plan/" + "/" * 10_000,
        "tenant/аcme/plan/gold",
        "tenant/ａcme/plan/gold",
        "Public",
        "public\x00",
    ],
)
def test_zone_that_is_no_path_is_malformed(zone: str) -> None:
    assert reason_of(envelope(document(zone=zone))) == (Reason.MALFORMED, "zone")


@pytest.mark.parametrize("zone", ["tenant/acme/case/c", "tenant/acme/mixed", "ephemeral"])
def test_zone_that_nobody_publishes_into_is_refused(zone: str) -> None:
    assert reason_of(envelope(document(zone=zone)))[0] is Reason.NOT_SHAREABLE
    with pytest.raises(ManifestError, match="not_shareable"):
        sign(manifest("a", zone=zone), ACME)


def test_two_segments_of_one_id_are_refused() -> None:
    twice = document()["segments"][:1] * 2
    assert reason_of(envelope(document(segments=twice)))[0] is Reason.DUPLICATE_ID
    with pytest.raises(ManifestError, match="duplicate_id"):
        sign(manifest(segments=manifest("a").segments * 2), ACME)


@pytest.mark.parametrize(
    ("zone", "key"),
    [
        ("tenant/other/plan/gold", ACME),
        ("tenant/acme/plan/gold", OTHER),
        ("tenant/other/plan/silver", OTHER),
        ("public", ACME),
        ("tenant/acme/plan/gold", RELEASE),
    ],
)
def test_key_that_signs_for_a_zone_that_is_not_its_own_is_refused(zone: str, key: Ed25519PrivateKey) -> None:
    assert reason_of(sign(manifest("a", zone=zone), key))[0] is Reason.FOREIGN_ZONE


@pytest.mark.parametrize(
    ("zone", "key"), [("tenant/other/plan/gold", OTHER), ("tenant/acme/plan/x", ACME), ("public", RELEASE)]
)
def test_key_signs_for_its_own_zones(zone: str, key: Ed25519PrivateKey) -> None:
    assert verify(sign(manifest("a", zone=zone), key), TRUSTED).manifest.zone == zone


def test_signature_that_does_not_hold_is_refused_before_anything_is_read() -> None:
    other = envelope(document(), OTHER, key_id=key_id_of(ACME.public_key()))
    assert reason_of(other)[0] is Reason.BAD_SIGNATURE
    nonsense = json.loads(envelope({"zone": "tenant/x"}, OTHER, key_id=key_id_of(ACME.public_key())))
    assert reason_of(json.dumps(nonsense).encode())[0] is Reason.BAD_SIGNATURE
    assert reason_of(envelope(document(), signature="0" * 128))[0] is Reason.BAD_SIGNATURE
    swapped = json.loads(SIGNED) | {"manifest": document(revision=2)}
    assert reason_of(json.dumps(swapped).encode())[0] is Reason.BAD_SIGNATURE


def test_signature_over_the_bare_document_does_not_count() -> None:
    bare = ACME.sign(canonical_json(document()).encode()).hex()
    assert reason_of(envelope(document(), signature=bare))[0] is Reason.BAD_SIGNATURE


def test_key_that_is_not_trusted_is_refused() -> None:
    stranger = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
    assert reason_of(sign(manifest("a"), stranger))[0] is Reason.UNKNOWN_KEY
    assert reason_of(SIGNED, TrustedKeys())[0] is Reason.UNKNOWN_KEY


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.NOT_JSON),
        (b"\xff\xfe{}", Reason.NOT_JSON),
        (b"\xef\xbb\xbf" + SIGNED, Reason.NOT_JSON),
        (b"{" * 100_000, Reason.NOT_JSON),
        (b"[" * 100_000 + b"]" * 100_000, Reason.NOT_JSON),
        (b'{"key_id": NaN}', Reason.NOT_JSON),
        (b"1" * 10_000, Reason.NOT_JSON),
        (SIGNED + b"{}", Reason.NOT_JSON),
        (b" " * (MAX_MANIFEST_BYTES + 1), Reason.TOO_LARGE),
        (b"null", Reason.MALFORMED),
        (b"[]", Reason.MALFORMED),
        (b"{}", Reason.MALFORMED),
        (envelope(document(), extra=1), Reason.MALFORMED),
        (envelope(document(), signature="00"), Reason.MALFORMED),
        (envelope(document(), key_id=7), Reason.MALFORMED),
        (envelope([]), Reason.MALFORMED),
        (SIGNED.replace(b'{"key_id"', b'{"key_id":"","key_id"'), Reason.MALFORMED),
        (SIGNED.replace(b'"zone":', b'"zone":"public","zone":'), Reason.MALFORMED),
        (SIGNED.replace(b'"revision":1', b'"revision":1e400'), Reason.NOT_JSON),
    ],
    ids=lambda value: value.value if isinstance(value, Reason) else str(value[:24]),
)
def test_bytes_that_are_no_envelope_are_refused(data: bytes, reason: Reason) -> None:
    assert reason_of(data)[0] is reason


def test_largest_manifest_fits() -> None:
    most = [
        {"id": f"{'i' * 60}{n:04}", "sha256": digest_of(str(n)), "title": "t" * 120} for n in range(MAX_SEGMENTS + 1)
    ]
    assert len(verify(envelope(document(segments=most[:-1])), TRUSTED).manifest.segments) == MAX_SEGMENTS
    assert reason_of(envelope(document(segments=most))) == (Reason.MALFORMED, "segments")


def test_manifest_that_ends_before_it_begins_cannot_be_made() -> None:
    with pytest.raises(ValidationError, match="later than effective"):
        manifest(effective=rfc3339(NOW), expires=rfc3339(NOW))


# --- keys ---


def test_signing_key_is_its_owners_alone_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "signing.pem"
    made = create_signing_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key_id_of(read_signing_key(path).public_key()) == key_id_of(made.public_key())
    with pytest.raises(KeyFileError, match="File exists"):
        create_signing_key(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["signing.pem"]
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="owner only"):
        read_signing_key(path)


def test_signing_key_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    cases = [
        (b"", "not an Ed25519"),
        (b"secret", "not an Ed25519"),
        (ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, pkcs8, plain), "not an Ed25519"),
        (ACME.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"x")), "passphrase"),
    ]
    path = tmp_path / "key.pem"
    path.touch(mode=0o600)
    for content, fault in cases:
        path.write_bytes(content)
        with pytest.raises(KeyFileError, match=fault) as refusal:
            read_signing_key(path)
        assert "secret" not in str(refusal.value)
    with pytest.raises(KeyFileError, match="No such file"):
        read_signing_key(tmp_path / "none.pem")


def test_trusted_keys_are_added_and_replaced_in_their_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trusted.yaml"
    trust(path, ACME.public_key(), ["tenant/acme/plan/*"])
    trust(path, RELEASE.public_key(), ["public"])
    keys = TrustedKeys.from_file(path)
    assert keys.may_sign_for(key_id_of(ACME.public_key()), GOLD)
    assert not keys.may_sign_for(key_id_of(ACME.public_key()), PUBLIC)
    assert keys.may_sign_for(key_id_of(RELEASE.public_key()), PUBLIC)
    trust(path, ACME.public_key(), ["tenant/acme/plan/silver"])
    keys = TrustedKeys.from_file(path)
    assert not keys.may_sign_for(key_id_of(ACME.public_key()), GOLD)
    assert keys.may_sign_for(key_id_of(RELEASE.public_key()), PUBLIC)
    with pytest.raises(ValueError):
        trust(path, OTHER.public_key(), ["tenant/*/plan/*"])
    assert len(yaml.safe_load(path.read_text(encoding="utf-8"))["keys"]) == 2


PUBLIC_HEX = ACME.public_key().public_bytes_raw().hex()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("keys: [", "not YAML"),
        ("keys: !!python/name:os.system", "not YAML"),
        ("\xff", "not YAML"),
        ("[]", "top level"),
        ("keys: []\nnames: []", "top level: unknown field"),
        (f"keys: [{{public_key: {PUBLIC_HEX}}}]", "keys.0.zones"),
        (f"keys: [{{public_key: {PUBLIC_HEX}, zones: []}}]", "keys.0.zones"),
        (f"keys: [{{public_key: {PUBLIC_HEX[2:]}, zones: [public]}}]", "keys.0.public_key"),
        (f"keys: [{{public_key: {PUBLIC_HEX}, zones: ['*']}}]", "keys.0.zones"),
        (f"keys: [{{public_key: {PUBLIC_HEX}, zones: ['tenant/*/plan/gold']}}]", "keys.0.zones"),
        (f"keys: [{{public_key: {PUBLIC_HEX}, zones: ['tenant/acme/case/c']}}]", "keys.0.zones"),
        (f"keys: [{{public_key: {PUBLIC_HEX}, zones: ['ephemeral']}}]", "keys.0.zones"),
        ("keys: [" + f"{{public_key: {PUBLIC_HEX}, zones: [public]}}," * 2 + "]", "the same key is listed twice"),
        ("#" * (MAX_KEY_FILE_BYTES + 1), "larger than"),
    ],
    ids=lambda text: text[:40],
)
def test_file_of_trusted_keys_that_cannot_be_used_is_refused(content: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "trusted.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(KeyFileError) as refusal:
        TrustedKeys.from_file(path)
    assert str(refusal.value).startswith(f"{path}: {fault}")
    with pytest.raises(KeyFileError, match="No such file"):
        TrustedKeys.from_file(tmp_path / "none")


# --- a folder ---


class Folder:
    """A folder of manifests and the set that reads it."""

    def __init__(self, path: Path, floors: dict[Zone, Floor] | None = None) -> None:
        self.path = path
        self.clock = Clock(NOW)
        self.set = ManifestSet(path, TRUSTED, self.clock, floors=floors)

    def put(self, made: Manifest, key: Ed25519PrivateKey = ACME, name: str | None = None) -> None:
        (self.path / (name or f"{made.zone.replace('/', '-')}-{made.revision}.json")).write_bytes(sign(made, key))

    def reasons(self, trusted: TrustedKeys | None = None) -> dict[str, Reason]:
        return {refusal.file: refusal.reason for refusal in self.set.reload(trusted)}

    def shared(self, *texts: str, zone: Zone = GOLD) -> list[str]:
        return [text for text in texts if self.set.is_shareable(zone, digest_of(text))]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_only_listed_text_is_shared_and_only_in_its_zone(folder: Folder) -> None:
    folder.put(manifest("a", "b"))
    folder.put(manifest("p", zone="public"), RELEASE)
    assert folder.shared("a") == []  # nothing before it is loaded
    assert folder.reasons() == {}
    assert folder.shared("a", "b", "p", "A", "") == ["a", "b"]
    assert folder.shared("a", "p", zone=PUBLIC) == ["p"]
    assert folder.shared("a", "b", "p", zone=SILVER) == []
    assert not folder.set.is_shareable(GOLD, digest_of("a").upper())


def test_zone_of_a_text_depends_on_the_tenant(folder: Folder) -> None:
    folder.put(manifest("a", "both"))
    folder.put(manifest("a", "s", zone=SILVER.path))
    folder.put(manifest("a", zone="tenant/other/plan/gold"), OTHER)
    folder.put(manifest("both", zone="public"), RELEASE)
    assert folder.reasons() == {}
    zone_of = folder.set.zone_of
    assert zone_of(digest_of("a"), "acme") == GOLD
    assert zone_of(digest_of("s"), "acme") == SILVER
    assert zone_of(digest_of("a"), "other") == Zone.parse("tenant/other/plan/gold")
    assert zone_of(digest_of("s"), "other") is None
    assert zone_of(digest_of("both"), "acme") == PUBLIC
    assert zone_of(digest_of("both"), "nobody") == PUBLIC
    assert zone_of(digest_of("a"), "") is None


def test_manifest_holds_from_its_first_second_to_its_last_without_a_reload(folder: Folder) -> None:
    folder.put(manifest("a", effective=rfc3339(NOW + 10), expires=rfc3339(NOW + 20)))
    assert folder.reasons() == {}
    seen = []
    for now in (NOW, NOW + 9.9, NOW + 10, NOW + 19.9, NOW + 20, NOW + 10**9):
        folder.clock.now = now
        seen.append(folder.shared("a"))
    assert seen == [[], [], ["a"], ["a"], [], []]


def test_higher_revision_takes_the_whole_place_of_the_lower_when_it_takes_effect(folder: Folder) -> None:
    folder.put(manifest("a", "b"))
    folder.put(manifest("b", "c", revision=2, effective=rfc3339(NOW + 10), expires=rfc3339(NOW + 20)))
    assert folder.reasons() == {}
    assert folder.shared("a", "b", "c") == ["a", "b"]
    folder.clock.now = NOW + 10
    assert folder.shared("a", "b", "c") == ["b", "c"]
    folder.clock.now = NOW + 20  # the second has expired, the first would not have
    assert folder.shared("a", "b", "c") == []


def test_bad_manifest_is_refused_by_name_and_takes_no_other_with_it(folder: Folder) -> None:
    folder.put(manifest("a"))
    (folder.path / "truncated.json").write_bytes(SIGNED[:100])
    (folder.path / "huge.json").write_bytes(b" " * (MAX_MANIFEST_BYTES + 10))
    (folder.path / "unknown.json").write_bytes(envelope(document(more=1)))
    (folder.path / "tampered.json").write_bytes(SIGNED.replace(b'"revision":1', b'"revision":9'))
    (folder.path / "notes.txt").write_text("not a manifest")
    (folder.path / ".tenant-acme.json.0000.new").write_text("being written")
    (folder.path / "folder.json").mkdir()
    folder.put(manifest("x", zone="tenant/other/plan/gold"), ACME, "foreign.json")
    assert folder.reasons() == {
        "truncated.json": Reason.NOT_JSON,
        "huge.json": Reason.TOO_LARGE,
        "unknown.json": Reason.MALFORMED,
        "tampered.json": Reason.BAD_SIGNATURE,
        "foreign.json": Reason.FOREIGN_ZONE,
    }
    assert folder.set.refusals == folder.set.reload()
    assert folder.shared("a") == ["a"]
    assert folder.shared("x", zone=Zone.parse("tenant/other/plan/gold")) == []


def test_lower_revision_than_the_one_in_force_is_refused_and_changes_nothing(folder: Folder) -> None:
    folder.put(manifest("new", revision=2), name="m.json")
    folder.reasons()
    folder.put(manifest("old", revision=1), name="m.json")
    assert folder.reasons() == {"m.json": Reason.ROLLED_BACK}
    assert folder.shared("new", "old") == ["new"]
    folder.put(manifest("newest", revision=3), name="m.json")
    assert folder.reasons() == {}
    assert folder.shared("new", "old", "newest") == ["newest"]


def test_revision_that_came_into_force_between_two_loads_cannot_be_rolled_back(folder: Folder) -> None:
    folder.put(manifest("a"))
    folder.put(manifest("b", revision=2, effective=rfc3339(NOW + 10)))
    folder.reasons()
    folder.clock.now = NOW + 10
    (folder.path / "tenant-acme-plan-gold-2.json").unlink()
    assert folder.reasons() == {"tenant-acme-plan-gold-1.json": Reason.ROLLED_BACK}
    assert folder.shared("a", "b") == ["b"]


def test_older_revisions_may_lie_beside_the_one_in_force(folder: Folder) -> None:
    for revision in (1, 2, 3):
        folder.put(manifest(f"r{revision}", revision=revision))
        assert folder.reasons() == {}
    (folder.path / "tenant-acme-plan-gold-1.json").unlink()
    assert folder.reasons() == {}
    assert folder.shared("r1", "r2", "r3") == ["r3"]


def test_zone_whose_files_are_gone_shares_nothing_and_cannot_come_back_older(folder: Folder) -> None:
    folder.put(manifest("a", revision=5), name="m.json")
    folder.reasons()
    (folder.path / "m.json").unlink()
    assert folder.reasons() == {}
    assert folder.shared("a") == []
    folder.put(manifest("old", revision=4), name="m.json")
    assert folder.reasons() == {"m.json": Reason.ROLLED_BACK}
    folder.put(manifest("other", revision=5), name="m.json")
    assert folder.reasons() == {"m.json": Reason.CONFLICT}
    assert folder.shared("a", "old", "other") == []
    folder.put(manifest("a", revision=5), name="m.json")
    assert folder.reasons() == {}
    assert folder.shared("a") == ["a"]


def test_floor_of_an_earlier_process_stops_a_roll_back_over_a_restart(folder: Folder, tmp_path: Path) -> None:
    folder.put(manifest("new", revision=2), name="m.json")
    folder.reasons()
    floors = dict(folder.set.floors)
    assert floors[GOLD].revision == 2
    folder.put(manifest("old", revision=1), name="m.json")
    restarted = Folder(tmp_path, floors)
    assert restarted.reasons() == {"m.json": Reason.ROLLED_BACK}
    assert restarted.shared("new", "old") == []
    assert Folder(tmp_path).reasons() == {}


def test_the_same_revision_with_other_content_is_refused(folder: Folder) -> None:
    folder.put(manifest("a"), name="m.json")
    folder.reasons()
    folder.put(manifest("b"), name="n.json")
    assert folder.reasons() == {"n.json": Reason.CONFLICT}
    assert folder.shared("a", "b") == ["a"]
    folder.put(manifest("b"), name="m.json")
    assert folder.reasons() == {"m.json": Reason.CONFLICT, "n.json": Reason.CONFLICT}
    assert folder.shared("a", "b") == ["a"]


def test_two_contents_of_one_revision_are_both_refused_when_neither_was_loaded(folder: Folder) -> None:
    folder.put(manifest("z", zone=SILVER.path))
    folder.put(manifest("a"), name="m.json")
    folder.put(manifest("b"), name="n.json")
    assert folder.reasons() == {"m.json": Reason.CONFLICT, "n.json": Reason.CONFLICT}
    assert folder.shared("a", "b") == []
    assert folder.shared("z", zone=SILVER) == ["z"]


def test_two_files_of_one_content_are_one(folder: Folder) -> None:
    folder.put(manifest("a"), name="m.json")
    folder.put(manifest("a"), name="n.json")
    assert folder.reasons() == {}
    assert folder.shared("a") == ["a"]


def test_file_that_goes_bad_keeps_what_it_gave(folder: Folder) -> None:
    folder.put(manifest("a"), name="m.json")
    folder.put(manifest("s", zone=SILVER.path), name="n.json")
    folder.reasons()
    (folder.path / "m.json").write_bytes(SIGNED[:50])
    folder.put(manifest("s2", zone=SILVER.path, revision=2), name="n.json")
    assert folder.reasons() == {"m.json": Reason.NOT_JSON}
    assert folder.shared("a") == ["a"]
    assert folder.shared("s", "s2", zone=SILVER) == ["s2"]
    folder.clock.now = NOW + 3600
    assert folder.shared("a") == []  # kept is not for ever


def test_folder_that_cannot_be_read_keeps_what_was_loaded(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.put(manifest("a"))
    folder.reasons()
    away = folder.path.with_name("away")
    folder.path.rename(away)
    assert list(folder.reasons().values()) == [Reason.UNREADABLE]
    assert folder.shared("a") == ["a"]
    away.rename(folder.path)
    folder.put(manifest("b", revision=2))
    monkeypatch.setattr("deployments.trust.manifest.MAX_MANIFESTS", 1)
    assert list(folder.reasons().values()) == [Reason.TOO_MANY]
    assert folder.shared("a", "b") == ["a"]
    monkeypatch.undo()
    assert folder.reasons() == {}
    assert folder.shared("a", "b") == ["b"]


def test_file_that_cannot_be_read_is_refused_alone(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.put(manifest("a"))
    folder.put(manifest("s", zone=SILVER.path), name="n.json")

    def fail(path: Path) -> bytes:
        if path.name == "n.json":
            path = path.with_name("gone")
        return read_bounded(path)

    monkeypatch.setattr(
        "deployments.trust.manifest_set.read_bounded", fail
    )  # as if it had gone between the listing and the reading
    assert folder.reasons() == {"n.json": Reason.UNREADABLE}
    assert folder.shared("a") == ["a"]


def test_key_that_is_withdrawn_takes_with_it_all_that_it_signed(folder: Folder) -> None:
    folder.put(manifest("a", revision=MAX_REVISION))
    folder.put(manifest("p", zone="public"), RELEASE)
    folder.reasons()
    successor = Ed25519PrivateKey.from_private_bytes(b"n" * 32)
    now_trusted = TrustedKeys(
        [TrustedKey(successor.public_key(), ("tenant/acme/plan/*",)), TrustedKey(RELEASE.public_key(), ("public",))]
    )
    folder.put(manifest("b", revision=1), successor, "successor.json")
    assert list(folder.reasons(now_trusted).values()) == [Reason.UNKNOWN_KEY]
    assert folder.shared("a", "b") == ["b"]
    assert folder.shared("p", zone=PUBLIC) == ["p"]


def test_key_that_is_withdrawn_while_the_folder_has_a_fault_is_withdrawn(folder: Folder) -> None:
    folder.put(manifest("a"))
    folder.put(manifest("p", zone="public"), RELEASE)
    folder.reasons()
    folder.path.rename(folder.path.with_name("away"))
    folder.reasons(TrustedKeys([TrustedKey(RELEASE.public_key(), ("public",))]))
    assert folder.shared("a") == []
    assert folder.shared("p", zone=PUBLIC) == ["p"]
    folder.reasons(TrustedKeys())
    assert folder.set.in_force() == {}


def test_digest_of_the_set_names_what_is_in_force(folder: Folder, tmp_path: Path) -> None:
    folder.put(manifest("a"))
    folder.put(manifest("p", zone="public"), RELEASE)
    folder.reasons()
    first = folder.set.digest
    assert len(first) == 64
    again = Folder(tmp_path)
    again.reasons()
    assert again.set.digest == first
    (folder.path / "bad.json").write_text("{")
    folder.put(manifest("later", revision=2, effective=rfc3339(NOW + 10)))
    folder.reasons()
    assert folder.set.digest == first
    folder.clock.now = NOW + 10
    assert folder.set.digest != first


def test_refusal_repeats_nothing_of_the_file(folder: Folder) -> None:
    (folder.path / "m.json").write_bytes(envelope(document(**{"SSN 123-45-6789": 1})))
    assert folder.set.reload() == (Refusal("m.json", Reason.MALFORMED, "top level: unknown field"),)


# --- publication ---


def test_published_manifest_is_whole_and_named_after_zone_and_revision(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    assert next_revision(folder, GOLD) == 1
    path = publish(folder, manifest("a"), ACME)
    assert path.name == "tenant..acme..plan..gold.r1.json"
    assert path.read_bytes() == sign(manifest("a"), ACME)
    assert [entry.name for entry in folder.iterdir()] == [path.name]
    assert (next_revision(folder, GOLD), next_revision(folder, SILVER)) == (2, 1)


def test_published_revision_is_never_written_over(tmp_path: Path) -> None:
    path = publish(tmp_path, manifest("a"), ACME)
    with pytest.raises(FileExistsError):
        publish(tmp_path, manifest("b"), ACME)
    assert path.read_bytes() == sign(manifest("a"), ACME)
    assert list(tmp_path.iterdir()) == [path]


def test_publication_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deployments.trust.manifest_keys.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        publish(tmp_path, manifest("a"), ACME)
    assert list(tmp_path.iterdir()) == []


def test_next_revision_is_above_whatever_lies_there(tmp_path: Path) -> None:
    (tmp_path / "stranger.json").write_bytes(sign(manifest("a", revision=41), OTHER))
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text("")
    publish(tmp_path, manifest("a", revision=7), ACME)
    assert next_revision(tmp_path, GOLD) == 42
    (tmp_path / "last.json").write_bytes(sign(manifest("a", revision=MAX_REVISION), OTHER))
    with pytest.raises(ManifestError, match="revision"):
        next_revision(tmp_path, GOLD)


@given(st.lists(st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,5}", fullmatch=True), min_size=4, max_size=4))
def test_no_two_zones_share_a_file_name(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    zones = {f"tenant/{names[0]}/plan/{names[1]}", f"tenant/{names[2]}/plan/{names[3]}"}
    if any(".." in name for name in names):
        return
    folder = tmp_path_factory.mktemp("names")
    assert len({publish(folder, manifest("a", zone=zone), ACME) for zone in zones}) == len(zones)


# --- the texts beside the manifests ---


def texts_in(folder: Path) -> set[str]:
    place = folder / TEXTS_FOLDER
    return {path.name for path in place.iterdir()} if place.exists() else set()


def test_published_texts_lie_beside_their_manifest_byte_for_byte(tmp_path: Path) -> None:
    texts = ("Rubric.\r\nPay what is due.\n", "", "Überprüfung")
    publish(tmp_path, manifest(*texts), ACME, texts=texts)
    assert [kept_text(tmp_path, digest_of(text)) for text in texts] == list(texts)
    assert texts_in(tmp_path) == {digest_of(text) for text in texts}
    assert kept_text(tmp_path, digest_of("another")) is None
    assert kept_text(tmp_path / "none", digest_of("")) is None
    assert (next_revision(tmp_path, GOLD), Folder(tmp_path).reasons()) == (2, {})


@given(st.text(max_size=30), st.integers(0, 2**16), st.integers(1, 255), st.binary(max_size=2))
def test_no_changed_byte_of_a_kept_text_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, text: str, place: int, change: int, tail: bytes
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    keep_texts(folder, [text])
    path = folder / TEXTS_FOLDER / digest_of(text)
    data = bytearray(text.encode() + tail)
    if data:
        data[place % len(data)] ^= change
        path.write_bytes(data)
        assert kept_text(folder, path.name) is None
        path.write_bytes(data[:-1])
        assert kept_text(folder, path.name) in (None, text)
    keep_texts(folder, [text])  # what is damaged is kept again
    assert kept_text(folder, path.name) == text


def test_what_is_no_kept_text_is_none(tmp_path: Path) -> None:
    place = tmp_path / TEXTS_FOLDER
    place.mkdir()
    binary, large = b"\xff\xfe", b"x" * (MAX_KEPT_TEXT_BYTES + 1)
    for data in (binary, large):
        digest = hashlib.sha256(data).hexdigest()
        (place / digest).write_bytes(data)
        assert kept_text(tmp_path, digest) is None
    (place / digest_of("folder")).mkdir()
    os.mkfifo(place / digest_of("pipe"))  # opening it would wait for a writer
    assert [kept_text(tmp_path, digest_of(name)) for name in ("folder", "pipe")] == [None, None]


def test_text_that_the_manifest_does_not_list_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not in the manifest"):
        publish(tmp_path / "made", manifest("a"), ACME, texts=["a", "secret"])
    assert list(tmp_path.iterdir()) == []


def test_texts_beyond_the_bounds_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = "x" * (MAX_KEPT_TEXT_BYTES + 1)
    with pytest.raises(ManifestError, match="too_large"):
        publish(tmp_path, manifest("a", large), ACME, texts=["a", large])
    assert list(tmp_path.iterdir()) == []
    keep_texts(tmp_path, [large[1:]])
    monkeypatch.setattr(manifest_module, "MAX_KEPT_TEXTS", 3)
    publish(tmp_path, manifest("a", "b"), ACME, texts=["a", "b"])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ManifestError, match="too_many"):
        publish(tmp_path, manifest("a", "c", revision=2), ACME, texts=["a", "c"])
    assert sorted(tmp_path.rglob("*")) == before
    publish(tmp_path, manifest("b", "a", revision=2), ACME, texts=["b", "a"])  # those there need no room


def test_manifest_is_not_published_before_its_texts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest_module, "replace_file", full)
    with pytest.raises(OSError, match="No space"):
        publish(tmp_path, manifest("a"), ACME, texts=["a"])
    assert list(tmp_path.glob("*.json")) == []


# --- a random walk ---


class Walk(RuleBasedStateMachine):
    """Publish, withdraw, copy back, corrupt, let time pass, reload: what may never happen does not."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Folder(Path(self.temporary.name))
        self.history: list[tuple[str, bytes]] = []
        self.highest: dict[Zone, int] = {}
        self.in_force: dict[Zone, int] = {}
        self.floors: dict[Zone, int] = {}

    def teardown(self) -> None:
        self.temporary.cleanup()

    @rule(
        zone=st.sampled_from([GOLD, SILVER]),
        text=st.sampled_from("abc"),
        delay=st.integers(0, 20),
        length=st.integers(1, 200),
    )
    def publish_next(self, zone: Zone, text: str, delay: int, length: int) -> None:
        now = int(self.folder.clock.now)
        revision = self.highest.get(zone, 0) + 1
        self.highest[zone] = revision
        made = manifest(
            f"{text}{revision}",
            zone=zone.path,
            revision=revision,
            effective=rfc3339(now + delay),
            expires=rfc3339(now + delay + length),
        )
        name = f"{zone.name}-{revision}.json"
        self.folder.put(made, name=name)
        self.history.append((name, sign(made, ACME)))

    @precondition(lambda self: self.history)
    @rule(data=st.data(), as_other=st.booleans())
    def copy_back(self, data: st.DataObject, as_other: bool) -> None:
        name, content = data.draw(st.sampled_from(self.history))
        (self.folder.path / (f"copy-{name}" if as_other else name)).write_bytes(content)

    @precondition(lambda self: any(self.folder.path.iterdir()))
    @rule(data=st.data(), change=st.sampled_from(["delete", "truncate", "tamper"]))
    def harm(self, data: st.DataObject, change: str) -> None:
        path = data.draw(st.sampled_from(sorted(self.folder.path.iterdir())))
        if change == "delete":
            path.unlink()
        elif change == "truncate":
            path.write_bytes(path.read_bytes()[:-20])
        else:
            path.write_bytes(path.read_bytes().replace(b'"sha256":"', b'"sha256":"0', 1))

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.folder.clock.now += seconds

    @rule()
    def reload(self) -> None:
        self.folder.set.reload()

    @invariant()
    def revision_in_force_never_falls_and_is_one_that_was_signed(self) -> None:
        signed = {content for _, content in self.history}
        for zone, top in self.folder.set.in_force().items():
            assert top.state(self.folder.clock.now) is None
            assert sign(top.manifest, ACME) in signed
            assert top.manifest.revision >= self.in_force.get(zone, 0)
            self.in_force[zone] = top.manifest.revision

    @invariant()
    def floor_never_falls(self) -> None:
        for zone, floor in self.folder.set.floors.items():
            assert self.floors.get(zone, 0) <= floor.revision <= self.highest[zone]
            self.floors[zone] = floor.revision

    @invariant()
    def a_query_is_the_manifest_in_force_and_nothing_else(self) -> None:
        for zone in (GOLD, SILVER):
            top = self.folder.set.in_force().get(zone)
            for text in (f"{letter}{revision}" for letter in "abc" for revision in range(1, 5)):
                listed = top is not None and digest_of(text) in {segment.sha256 for segment in top.manifest.segments}
                assert self.folder.set.is_shareable(zone, digest_of(text)) is listed


Walk.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
TestWalk = Walk.TestCase
