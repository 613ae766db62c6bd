"""Which events are audited, which fields each may carry, and the one canonical form of a record.

Content cannot enter: every field has a type that holds an identifier, a digest, a zone path, a count or a reason, and
whatever else is refused where the event is made. Digests of content must be keyed by their maker (HMAC under a key of
the zone); a plain hash of a claim could be guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.zone import Zone

Value = str | int

MAX_COUNT = 2**53 - 1  # what every JSON reader holds exactly
MAX_IDENTIFIER_CHARS = 128
MAX_REASON_CHARS = 64
MAX_RECORD_BYTES = 8192


class AuditEvent:
    """One thing that happened: a kind of the closed list and its fields. Immutable.

    Raises:
        ValueError: No such kind, a field that the kind does not have, one that is missing, or a value that is not of
            the field's type. The message names the field and never the value.
    """

    __slots__ = ("fields", "kind")

    kind: str
    fields: Mapping[str, Value]

    def __init__(self, kind: str, /, **fields: Value) -> None:
        if kind not in EVENTS:
            raise ValueError("no such kind of audit event")
        required, optional = EVENTS[kind]
        for name in required - fields.keys():
            raise ValueError(f"{kind}: field {name} is missing")
        for name, value in fields.items():
            if name not in required and name not in optional:
                raise ValueError(f"{kind}: has no such field")
            if not FIELDS[name](value):
                raise ValueError(f"{kind}: field {name} has a value that it may not have")
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "fields", MappingProxyType(fields))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("an audit event does not change")

    def __repr__(self) -> str:
        return f"AuditEvent({self.kind!r})"


def canonical(document: dict[str, object]) -> bytes:
    """The one way to write a document: JSON, keys sorted, no spaces, printable ASCII. Two documents that differ differ
    in their bytes.

    Raises:
        ValueError: A key or value that is not printable ASCII text, an integer of at most 53 bits, or one mapping of
            such.
    """
    _require_plain(document, depth=0)
    return _ENCODE(document).encode("ascii")


def _require_plain(value: object, depth: int) -> None:
    match value:
        case str():
            if not (value.isascii() and value.isprintable()):
                raise ValueError("text that is not printable ASCII")
        case bool():
            raise ValueError("neither text nor an integer")
        case int():
            if not -MAX_COUNT <= value <= MAX_COUNT:
                raise ValueError("an integer of more than 53 bits")
        case dict() if depth < 2:
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError("a key that is not text")
                _require_plain(key, depth + 1)
                _require_plain(item, depth + 1)
        case _:
            raise ValueError("neither text nor an integer")


def parse_canonical(data: bytes) -> dict[str, object]:
    """The document whose canonical form is exactly `data`.

    Raises:
        ValueError: There is none.
    """
    try:
        document = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON in ASCII") from error
    if not isinstance(document, dict) or canonical(document) != data:
        raise ValueError("not in canonical form")
    return document


_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


def _matches(pattern: str) -> Callable[[Value], bool]:
    compiled = re.compile(pattern, re.ASCII)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def _is_count(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _is_zone(value: Value) -> bool:
    try:
        return isinstance(value, str) and Zone.parse(value).path == value
    except ValueError:
        return False


# No white space, so that no sentence fits.
_is_identifier = _matches(rf"[A-Za-z0-9][A-Za-z0-9_.:/-]{{0,{MAX_IDENTIFIER_CHARS - 1}}}")
_is_arithmetic = _matches(rf"[A-Za-z0-9][A-Za-z0-9_.:/+-]{{0,{MAX_IDENTIFIER_CHARS - 1}}}")  # `+` joins a pool's kinds
_is_principal = _matches(rf"[A-Za-z0-9][A-Za-z0-9_.:@|/-]{{0,{MAX_IDENTIFIER_CHARS - 1}}}")
_is_digest = _matches(r"[0-9a-f]{16,64}")
_is_reason = _matches(rf"[a-z][a-z0-9_.-]{{0,{MAX_REASON_CHARS - 1}}}")

_FIELDS_BY_TYPE: dict[Callable[[Value], bool], str] = {
    _is_identifier: "request_id review_id segment_id rule plan tenant tool peer profile model",
    _is_arithmetic: "arithmetic",
    _is_principal: "principal approver",
    _is_zone: "zone requester_zone",
    _is_digest: (
        "policy_digest refused_digest manifest_digest schema_digest model_digest prompt_digest claim_digest "
        "rules_digest output_digest input_digest content_digest receipt_digest ticket_digest profile_digest "
        "torn_digest head"
    ),
    _is_count: (
        "num_rules num_segments num_shared num_tokens num_blocks num_entries num_replicas num_bytes num_findings "
        "num_prompt_tokens num_output_tokens max_tokens num_lost torn_bytes count revision epoch"
    ),
    _is_reason: "reason verb role detector action outcome tier",
}
FIELDS: Mapping[str, Callable[[Value], bool]] = {
    name: is_valid for is_valid, names in _FIELDS_BY_TYPE.items() for name in names.split()
}


def _kind(required: str, optional: str = "") -> tuple[frozenset[str], frozenset[str]]:
    return frozenset(required.split()), frozenset(optional.split())


_TRANSFER = _kind("request_id zone num_blocks", "epoch peer ticket_digest num_bytes num_tokens")
EVENTS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "policy.load": _kind("policy_digest", "num_rules"),
    "policy.refuse": _kind("reason", "policy_digest refused_digest"),
    "zone.resolve": _kind("request_id principal zone", "tenant role verb rule policy_digest"),
    "zone.deny": _kind("reason", "request_id principal tenant zone verb rule policy_digest"),
    "segment.label": _kind(
        "request_id zone num_segments", "num_shared num_tokens content_digest manifest_digest policy_digest"
    ),
    "segment.deny": _kind(
        "zone reason", "request_id principal segment_id content_digest manifest_digest detector num_findings"
    ),
    "manifest.load": _kind("zone manifest_digest revision", "num_segments approver principal"),
    "manifest.refuse": _kind("reason", "zone manifest_digest revision principal"),
    "cache.hit": _kind("request_id zone num_blocks", "num_tokens epoch tier"),
    "cache.store": _kind("zone num_blocks", "request_id num_tokens epoch tier"),
    "cache.evict": _kind("zone num_blocks reason", "request_id requester_zone epoch tier"),
    "cache.scrub": _kind("zone num_blocks", "request_id reason epoch tier"),
    "zone.purge": _kind("zone epoch", "principal num_entries num_blocks num_replicas receipt_digest reason"),
    "transfer.send": _TRANSFER,
    "transfer.recv": _TRANSFER,
    "transfer.deny": _kind("reason", "request_id zone epoch peer ticket_digest"),
    "quant.profile.activate": _kind("profile profile_digest", "model_digest"),
    "quant.gate.fail": _kind("profile reason", "profile_digest model_digest"),
    "review.complete": _kind(
        "review_id zone outcome output_digest",
        "request_id principal tenant plan action model arithmetic claim_digest prompt_digest model_digest "
        "policy_digest manifest_digest schema_digest rules_digest num_prompt_tokens num_output_tokens max_tokens",
    ),
    "tool.call": _kind("review_id tool zone outcome", "request_id input_digest output_digest num_bytes reason"),
    "auth.deny": _kind("reason", "request_id principal role"),
    "audit.open": _kind("reason", "torn_bytes torn_digest num_lost"),
    "audit.anchor": _kind("count head"),
    "audit.rotate": _kind("reason count head"),
}
