"""Who calls: principals, and the bearer keys of a file that name one. Keys are stored as SHA-256 only."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from deployments.trust.key_files import KeyFileError, read_key_file, replace_file
from engine.zone import Zone, ZoneKind, is_zone_name

MAX_KEYS = 10_000
MAX_KEY_FILE_BYTES = 8 << 20
MAX_ROLES = 32  # of one principal
MAX_CASES = 256  # that one principal owns
MAX_BEARER_CHARS = 512
KEY_PREFIX = "zs-"
LOCAL_PRINCIPAL = "local-reviewer"
LOCAL_TENANT = "local"
LOCAL_ROLES = ("zone-admin", "operator")  # of the shipped policy


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller.

    `zone` is where its unlabelled prompts go: ephemeral or a case that it owns. `cases` are the further case zones that
    it owns. Both lie in its tenant.
    """

    name: str
    tenant: str
    zone: Zone
    roles: frozenset[str] = frozenset()
    cases: frozenset[Zone] = frozenset()

    def owns(self, zone: Zone) -> bool:
        """True for a case of this principal's."""
        return zone.kind is ZoneKind.CASE and zone.tenant == self.tenant and (zone == self.zone or zone in self.cases)


def require_name(name: str) -> str:
    """The name itself, if it may stand in a zone path: principals, tenants, roles and cases are all named so.

    Raises:
        ValueError: It may not. The message does not repeat it.
    """
    if not is_zone_name(name):
        raise ValueError("a name is 1 to 64 of a-z, 0-9, '_', '.' and '-', begins with a letter or digit, has no '..'")
    return name


Name = Annotated[str, AfterValidator(require_name)]


def case_zones(tenant: str, cases: list[str]) -> frozenset[Zone]:
    """Zones of a tenant's cases by name; both were checked."""
    return frozenset(Zone(ZoneKind.CASE, tenant, case) for case in cases)


class _KeyEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    principal: Name
    tenant: Name
    zone: str = "ephemeral"
    roles: list[Name] = Field(default=[], max_length=MAX_ROLES)
    cases: list[Name] = Field(default=[], max_length=MAX_CASES)

    @field_validator("zone")
    @classmethod
    def _is_private_zone(cls, path: str) -> str:
        if Zone.parse(path).kind not in (ZoneKind.CASE, ZoneKind.EPHEMERAL):
            raise ValueError("a key's zone must be a case of its tenant or ephemeral")
        return path


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: list[_KeyEntry] = Field(max_length=MAX_KEYS)


class Principals:
    """The keys that may enter."""

    def __init__(self, by_digest: dict[bytes, Principal]) -> None:
        self._by_digest = by_digest

    @staticmethod
    def from_file(path: Path) -> Principals:
        """
        Raises:
            KeyFileError: Missing, not YAML, unknown key, a zone of another tenant, or a key named twice.
        """
        by_digest: dict[bytes, Principal] = {}
        for entry in _read_entries(path):
            zone = Zone.parse(entry.zone)
            if zone.kind is ZoneKind.CASE and zone.tenant != entry.tenant:
                raise KeyFileError(f"{path}: {entry.principal}: its zone belongs to another tenant")
            digest = bytes.fromhex(entry.sha256)
            if digest in by_digest:
                raise KeyFileError(f"{path}: {entry.principal}: the same key is listed twice")
            cases = case_zones(entry.tenant, entry.cases)
            by_digest[digest] = Principal(entry.principal, entry.tenant, zone, frozenset(entry.roles), cases)
        return Principals(by_digest)

    @property
    def tenants(self) -> list[str]:
        """Of all keys, each once, by name."""
        return sorted({principal.tenant for principal in self._by_digest.values()})

    def authenticate(self, authorization: str | None) -> Principal | None:
        """Principal of an `Authorization` header; None where there is none or it is wrong."""
        key = bearer_credential(authorization)
        return self.find(key) if key is not None else None

    def find(self, key: str) -> Principal | None:
        """Principal of a key; None for one that is not listed, or is too long to be.

        The presented key is hashed first, so what a timing could show is a digest, not a key; all
        digests are compared in constant time.
        """
        if len(key) > MAX_BEARER_CHARS:
            return None
        presented = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for digest, principal in self._by_digest.items():
            if hmac.compare_digest(digest, presented):
                found = principal
        return found


def bearer_credential(authorization: str | None) -> str | None:
    """What follows `Bearer` in an `Authorization` header; None where there is nothing or another scheme."""
    scheme, _, credential = (authorization or "").partition(" ")
    credential = credential.strip()
    return credential if scheme.lower() == "bearer" and credential else None


def _read_entries(path: Path) -> list[_KeyEntry]:
    return read_key_file(path, _KeyFile, max_bytes=MAX_KEY_FILE_BYTES, describe=_first_fault).keys


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    where = ".".join(map(str, fault["loc"])) or "top level"
    return f"{where}: {fault['msg']}"


def create_missing_keys(keys_file: Path, master_key_file: Path, client_key_file: Path) -> None:
    """Make the three secrets of a one-machine deployment where they are missing, readable by the owner only.

    A client key that is lost is replaced; other principals' entries in the keys file stay. The local principal may pin
    and purge: where its entry names no role, as those of earlier versions, it gets them.
    """
    if not master_key_file.exists():
        _write_secret(master_key_file, secrets.token_hex(32))
    present = _read_entries(keys_file) if keys_file.exists() else []
    if not keys_file.exists() or not client_key_file.exists():
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        digest = hashlib.sha256(key.encode()).hexdigest()
        entry = _KeyEntry(sha256=digest, principal=LOCAL_PRINCIPAL, tenant=LOCAL_TENANT, roles=list(LOCAL_ROLES))
        _write_entries(keys_file, [*(other for other in present if not _is_local(other)), entry])
        _write_secret(client_key_file, key)
    elif any(_is_local(entry) and not entry.roles for entry in present):
        _write_entries(keys_file, [_with_local_roles(entry) for entry in present])


def _is_local(entry: _KeyEntry) -> bool:
    return (entry.principal, entry.tenant) == (LOCAL_PRINCIPAL, LOCAL_TENANT)


def _with_local_roles(entry: _KeyEntry) -> _KeyEntry:
    is_without = _is_local(entry) and not entry.roles
    return entry.model_copy(update={"roles": list(LOCAL_ROLES)}) if is_without else entry


def _write_entries(path: Path, entries: list[_KeyEntry]) -> None:
    _write_secret(path, yaml.safe_dump({"keys": [entry.model_dump() for entry in entries]}, sort_keys=False))


def _write_secret(path: Path, text: str) -> None:
    replace_file(path, f"{text}\n".encode(), mode=0o600)
