"""Signed manifests: which texts may be shared in which zone. What no manifest in force lists is shared with nobody.

A manifest covers one zone whole: the highest revision that has come into effect holds, alone, until it expires. It
names texts by the SHA-256 of their exact UTF-8 bytes; the texts themselves may be kept beside it under that name, and
are read back only while it is theirs. Nothing here reads a clock or a prompt.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError, field_validator, model_validator

from deployments.claims.model import StrictModel, canonical_json, text_sha256
from deployments.trust.key_files import create_file, replace_file
from deployments.trust.manifest_keys import TrustedKeys, first_fault, is_shareable_kind, key_id_of
from engine.zone import Zone

MAX_MANIFEST_BYTES = 1 << 20
MAX_MANIFESTS = 1000  # files in a folder
MAX_SEGMENTS = 1000
MAX_REVISION = 2**31 - 1
MAX_TEXT_CHARS = 120  # title, approver
MAX_KEPT_TEXT_BYTES = 1 << 20
MAX_KEPT_TEXTS = 10_000  # in a folder
TEXTS_FOLDER = "texts"

_SIGNED_AS = b"zoneserve manifest 1\n"  # so that the signature can stand for nothing else
_RFC3339_UTC = "%Y-%m-%dT%H:%M:%SZ"


class Reason(StrEnum):
    """Why a manifest is refused, or gives nothing now."""

    UNREADABLE = "unreadable"
    TOO_LARGE = "too_large"
    TOO_MANY = "too_many"  # more files than a folder may have; none is read
    NOT_JSON = "not_json"
    MALFORMED = "malformed"
    DUPLICATE_ID = "duplicate_id"
    UNKNOWN_KEY = "unknown_key"
    BAD_SIGNATURE = "bad_signature"
    NOT_SHAREABLE = "not_shareable"  # a zone that nobody may publish into
    FOREIGN_ZONE = "foreign_zone"  # the key may not sign for the zone
    ROLLED_BACK = "rolled_back"
    CONFLICT = "conflict"  # the same revision with other content
    EXPIRED = "expired"
    NOT_YET_EFFECTIVE = "not_yet_effective"


class ManifestError(Exception):
    """A manifest that is refused. `detail` names a field, never what stands in it."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail


def _is_printable(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError("must be printable, without space at its ends")
    return text


_Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]


class SharedSegment(StrictModel):
    """One text that may be shared."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    title: _Text

    _title_is_printable = field_validator("title")(_is_printable)


class Manifest(StrictModel):
    """What one zone shares. `effective` (inclusive) and `expires` (exclusive) are RFC 3339 in UTC, whole seconds."""

    version: Literal[1] = 1
    zone: str
    revision: int = Field(ge=1, le=MAX_REVISION)
    approver: _Text
    effective: str
    expires: str
    segments: tuple[SharedSegment, ...] = Field(max_length=MAX_SEGMENTS)

    _approver_is_printable = field_validator("approver")(_is_printable)

    @field_validator("effective", "expires")
    @classmethod
    def _is_a_time(cls, text: str) -> str:
        unix_time(text)
        return text

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if unix_time(self.effective) >= unix_time(self.expires):
            raise ValueError("expires must be later than effective")
        return self


def unix_time(rfc3339: str) -> int:
    """Unix time of `YYYY-MM-DDTHH:MM:SSZ`.

    Raises:
        ValueError: Not that form, or no such time.
    """
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", rfc3339):
        raise ValueError("a time is written YYYY-MM-DDTHH:MM:SSZ")
    return int(dt.datetime.strptime(rfc3339, _RFC3339_UTC).replace(tzinfo=dt.UTC).timestamp())


def rfc3339(time: float) -> str:
    """`YYYY-MM-DDTHH:MM:SSZ` of a unix time, fractions cut off."""
    return dt.datetime.fromtimestamp(int(time), dt.UTC).strftime(_RFC3339_UTC)


class _Envelope(StrictModel):
    key_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")
    manifest: dict[str, Any]


@dataclass(frozen=True)
class SignedManifest:
    """A manifest whose signature and signer were checked. `sha256` (hex) is of its canonical JSON."""

    manifest: Manifest
    key_id: str
    sha256: str

    @cached_property
    def zone(self) -> Zone:
        return Zone.parse(self.manifest.zone)

    @cached_property
    def effective(self) -> int:
        return unix_time(self.manifest.effective)

    @cached_property
    def expires(self) -> int:
        return unix_time(self.manifest.expires)

    @cached_property
    def content_digests(self) -> frozenset[str]:
        return frozenset(segment.sha256 for segment in self.manifest.segments)

    def state(self, now: float) -> Reason | None:
        """Why it gives nothing at unix time `now`, None where it does (a later revision may still stand above it)."""
        if now < self.effective:
            return Reason.NOT_YET_EFFECTIVE
        return Reason.EXPIRED if now >= self.expires else None


def sign(manifest: Manifest, key: Ed25519PrivateKey) -> bytes:
    """The envelope, canonical JSON. The same manifest and key give the same bytes.

    Raises:
        ManifestError: Nobody may publish into the zone, or two segments have one id.
    """
    _check(manifest)
    document = manifest.model_dump(mode="json")
    envelope = {
        "key_id": key_id_of(key.public_key()),
        "signature": key.sign(_SIGNED_AS + canonical_json(document).encode()).hex(),
        "manifest": document,
    }
    return canonical_json(envelope).encode() + b"\n"


def verify(data: bytes, trusted: TrustedKeys) -> SignedManifest:
    """The manifest of an envelope, if one of the trusted keys signed it and may sign for its zone.

    Nothing of the manifest is looked at before its signature holds; what is parsed then are the bytes that were signed.

    Raises:
        ManifestError: With the reason.
    """
    envelope = _envelope(data)
    signer = trusted.get(envelope.key_id)
    if signer is None:
        raise ManifestError(Reason.UNKNOWN_KEY)
    try:
        payload = canonical_json(envelope.manifest).encode()
    except (ValueError, RecursionError):
        raise ManifestError(Reason.NOT_JSON) from None
    try:
        signer.key.verify(bytes.fromhex(envelope.signature), _SIGNED_AS + payload)
    except InvalidSignature:
        raise ManifestError(Reason.BAD_SIGNATURE) from None
    manifest = _parse(payload)
    if not signer.may_sign_for(Zone.parse(manifest.zone)):
        raise ManifestError(Reason.FOREIGN_ZONE)
    return SignedManifest(manifest, envelope.key_id, hashlib.sha256(payload).hexdigest())


def _envelope(data: bytes) -> _Envelope:
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(Reason.TOO_LARGE, f"more than {MAX_MANIFEST_BYTES} bytes")
    try:
        document = json.loads(data.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except ManifestError:
        raise
    except (ValueError, RecursionError):
        raise ManifestError(Reason.NOT_JSON) from None
    try:
        return _Envelope.model_validate(document)
    except ValidationError as error:
        raise ManifestError(Reason.MALFORMED, first_fault(error, frozenset(_Envelope.model_fields))) from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ManifestError(Reason.MALFORMED, "a field stands twice")
    return document


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError("NaN and the infinities are not JSON")


def _parse(payload: bytes) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(payload)
    except ValidationError as error:
        raise ManifestError(Reason.MALFORMED, first_fault(error, _MANIFEST_FIELDS)) from None
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    try:
        zone = Zone.parse(manifest.zone)
    except ValueError:
        raise ManifestError(Reason.MALFORMED, "zone") from None
    if not is_shareable_kind(zone):
        raise ManifestError(Reason.NOT_SHAREABLE, zone.kind.name.lower())
    if max(Counter(segment.id for segment in manifest.segments).values(), default=1) > 1:
        raise ManifestError(Reason.DUPLICATE_ID, "segments")


_MANIFEST_FIELDS = frozenset(Manifest.model_fields) | frozenset(SharedSegment.model_fields)


def json_files(folder: Path) -> list[Path]:
    """The folder's JSON files by name.

    Raises:
        ManifestError: It cannot be read, or has more than `MAX_MANIFESTS`.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.name.endswith(".json") and path.is_file())
    except OSError as error:
        raise ManifestError(Reason.UNREADABLE, error.strerror or "") from None
    if len(paths) > MAX_MANIFESTS:
        raise ManifestError(Reason.TOO_MANY, f"more than {MAX_MANIFESTS} files")
    return paths


def read_bounded(path: Path) -> bytes:
    """Content of a file, cut one byte past what a manifest may have.

    Raises:
        ManifestError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ManifestError(Reason.UNREADABLE, error.strerror or "") from None


def next_revision(folder: Path, zone: Zone) -> int:
    """One more than the highest revision of the zone in a folder, 1 where it has none.

    Signatures are not looked at: whoever signed it, a revision that is there is taken.

    Raises:
        ManifestError: The folder cannot be read, or holds the highest revision there may be.
    """
    highest = 0
    for path in json_files(folder) if folder.exists() else ():
        try:
            manifest = _parse(canonical_json(_envelope(read_bounded(path)).manifest).encode())
        except (ManifestError, ValueError, RecursionError):
            continue
        if manifest.zone == zone.path:
            highest = max(highest, manifest.revision)
    if highest >= MAX_REVISION:
        raise ManifestError(Reason.MALFORMED, "revision")
    return highest + 1


def publish(folder: Path, manifest: Manifest, key: Ed25519PrivateKey, *, texts: Iterable[str] = ()) -> Path:
    """Sign and write a manifest: whole or not at all, never over another file.

    Args:
        texts: Those that the manifest lists, to be kept beside it: what is in force is then never without them.

    Raises:
        ManifestError: As `sign` and `keep_texts`. ValueError: The manifest does not list a text.
        OSError: The folder cannot be written, FileExistsError: the revision is taken.
    """
    data = sign(manifest, key)
    kept = tuple(texts)
    if not {text_sha256(text) for text in kept} <= {segment.sha256 for segment in manifest.segments}:
        raise ValueError("a text is not in the manifest that it is kept for")
    folder.mkdir(parents=True, exist_ok=True)
    keep_texts(folder, kept)
    # No zone's part has two dots in a row or starts with one, so no two zones share a name.
    path = folder / f"{manifest.zone.replace('/', '..')}.r{manifest.revision}.json"
    create_file(path, data, mode=0o644)
    return path


def keep_texts(folder: Path, texts: Iterable[str]) -> None:
    """Keep texts in a folder of manifests, one a file named by its digest; one that is there whole is left alone.

    Raises:
        ManifestError: A text is too large, or the folder would have more than `MAX_KEPT_TEXTS`; nothing is written.
        OSError: The folder cannot be written.
    """
    missing = {digest: text.encode() for text in texts if kept_text(folder, digest := text_sha256(text)) is None}
    if not missing:
        return
    if max(map(len, missing.values())) > MAX_KEPT_TEXT_BYTES:
        raise ManifestError(Reason.TOO_LARGE, f"a text of more than {MAX_KEPT_TEXT_BYTES} bytes")
    place = folder / TEXTS_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    if sum(1 for _ in place.iterdir()) + len(missing) > MAX_KEPT_TEXTS:
        raise ManifestError(Reason.TOO_MANY, f"more than {MAX_KEPT_TEXTS} texts")
    for digest, data in missing.items():
        replace_file(place / digest, data)


def kept_text(folder: Path, digest: str) -> str | None:
    """The kept text with this SHA-256 (hex); None where there is none, or what lies there is another."""
    path = folder / TEXTS_FOLDER / digest
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            data = file.read(MAX_KEPT_TEXT_BYTES + 1)
        if len(data) > MAX_KEPT_TEXT_BYTES or hashlib.sha256(data).hexdigest() != digest:
            return None
        return data.decode()
    except (OSError, ValueError):
        return None
