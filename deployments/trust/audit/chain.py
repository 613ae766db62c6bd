"""Seals each record to the one before it, and finds where that does not hold. Pure: no files, no clock.

A record's `hash` is SHA-256 over its canonical form without `hash` and `mac`; `prev` is the hash of the record before
it, so the chain can be checked by anyone. `mac` is HMAC-SHA256 of the hash under a key derived from the master key,
so only its holders can write one. `stream` names the writing process: records of two logs do not fit each other.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from deployments.trust.audit.record import MAX_RECORD_BYTES, AuditEvent, Value, canonical, parse_canonical
from engine.block_hash import derive_key

CHAIN_KEY_INFO = b"audit-chain"  # what a chain's key is derived for
STREAM_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KIND = re.compile(r"[a-z.]{1,64}")
_RECORD_KEYS = {"event", "fields", "hash", "mac", "prev", "seq", "stream", "time_ms"}
_ANCHOR_KEYS = {"hash", "mac", "seq", "stream"}
_UNKNOWN = ""


@dataclass(frozen=True, slots=True)
class Head:
    """A chain's last record: the number of records so far and the last one's hash."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @staticmethod
    def parse(text: str) -> Head:
        """Of `SEQ:HASH`.

        Raises:
            ValueError: Not that.
        """
        seq, _, digest = text.partition(":")
        if not (seq.isascii() and seq.isdigit() and len(seq) <= 16 and _DIGEST.fullmatch(digest)):
            raise ValueError("an anchor is SEQ:HASH, a number and 64 hex digits")
        return Head(int(seq), digest)


GENESIS = Head(0, "0" * 64)


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it stands in a log; whether it is true is another question."""

    stream: str
    seq: int
    time_ms: int
    event: str
    fields: dict[str, Value]
    prev: str
    hash: str
    mac: str

    @property
    def head(self) -> Head:
        return Head(self.seq, self.hash)

    def body(self) -> dict[str, object]:
        return {
            "event": self.event,
            "fields": self.fields,
            "prev": self.prev,
            "seq": self.seq,
            "stream": self.stream,
            "time_ms": self.time_ms,
        }

    def line(self) -> bytes:
        """Its canonical form, with the line's end."""
        return canonical({**self.body(), "hash": self.hash, "mac": self.mac}) + b"\n"

    @staticmethod
    def parse(line: bytes) -> Record:
        """
        Raises:
            ValueError: Not exactly the line of a record; the message repeats nothing of it.
        """
        if not line.endswith(b"\n") or len(line) > MAX_RECORD_BYTES:
            raise ValueError("not a whole line")
        document = parse_canonical(line[:-1])
        if document.keys() != _RECORD_KEYS:
            raise ValueError("not the keys of a record")
        match document:
            case {
                "event": str(event),
                "fields": dict(fields),
                "hash": str(digest),
                "mac": str(mac),
                "prev": str(prev),
                "seq": int(seq),
                "stream": str(stream),
                "time_ms": int(time_ms),
            } if (
                seq > 0
                and _KIND.fullmatch(event)
                and all(map(_DIGEST.fullmatch, (digest, mac, prev)))
                and all(isinstance(value, (str, int)) for value in fields.values())
            ):
                return Record(stream, seq, time_ms, event, fields, prev, digest, mac)
        raise ValueError("not the values of a record")


def chain_key(master_key: bytes) -> bytes:
    return derive_key(master_key, CHAIN_KEY_INFO)


def seal(event: AuditEvent, *, stream: str, time_ms: int, head: Head, key: bytes) -> Record:
    """The record of `event` that follows `head`."""
    open_record = Record(stream, head.seq + 1, time_ms, event.kind, dict(event.fields), head.hash, "", "")
    digest = hashlib.sha256(canonical(open_record.body())).digest()
    mac = hmac.digest(key, digest, "sha256").hex()
    return Record(stream, head.seq + 1, time_ms, event.kind, open_record.fields, head.hash, hash=digest.hex(), mac=mac)


def holds_hash(record: Record) -> bool:
    return hashlib.sha256(canonical(record.body())).hexdigest() == record.hash


def holds_mac(record: Record, key: bytes) -> bool:
    expected = hmac.digest(key, bytes.fromhex(record.hash), "sha256")
    return hmac.compare_digest(expected, bytes.fromhex(record.mac))


def seal_anchor(head: Head, *, stream: str, key: bytes) -> bytes:
    """What the anchor file of a stream holds."""
    body: dict[str, object] = {"hash": head.hash, "seq": head.seq, "stream": stream}
    return canonical({**body, "mac": _anchor_mac(body, key)}) + b"\n"


def open_anchor(data: bytes, *, stream: str, key: bytes) -> Head:
    """
    Raises:
        ValueError: Not an anchor of this stream under this key.
    """
    document = parse_canonical(data.removesuffix(b"\n"))
    match document:
        case {"hash": str(digest), "mac": str(mac), "seq": int(seq), "stream": str(named)} if (
            document.keys() == _ANCHOR_KEYS and data.endswith(b"\n")
        ):
            body: dict[str, object] = {"hash": digest, "seq": seq, "stream": named}
            if not hmac.compare_digest(_anchor_mac(body, key), mac):
                raise ValueError("its MAC does not hold under this key")
            if named != stream:
                raise ValueError("it is the anchor of another log")
            return Head(seq, digest)
    raise ValueError("not an anchor")


def _anchor_mac(body: dict[str, object], key: bytes) -> str:
    return hmac.digest(key, b"anchor|" + canonical(body), "sha256").hex()


class Fault(Enum):
    """What can be wrong with a log."""

    MALFORMED = "malformed"  # a line that is no record
    TORN = "torn"  # a last line without its end: a writer that was killed, or one that is still at it
    EDITED = "edited"  # a record that is not what its hash says
    UNSIGNED = "unsigned"  # a record that is what its hash says, but not written with this key
    FOREIGN = "foreign"  # a record of another log
    GAP = "gap"  # records are missing before this one
    MISPLACED = "misplaced"  # a record that stands after a later one, or twice
    SPLICED = "spliced"  # the number follows, the record before is another
    HEAD_CUT = "head_cut"  # the log does not begin at its beginning
    TAIL_CUT = "tail_cut"  # the log ends before a record that it is known to have had
    ANCHOR = "anchor"  # an anchor that is missing, broken, or contradicted
    UNREADABLE = "unreadable"  # a file that cannot be read, or is not a plain file


@dataclass(frozen=True, slots=True)
class LineFault:
    fault: Fault
    seq: int
    what: str


class ChainVerifier:
    """Takes the lines of one stream in order and says what is wrong with each. Constant memory.

    Attributes:
        head: The last record that follows from all before it; `hash` is empty after a line that cannot be trusted.
        first_seq: Number of the first record, 0 before it.
    """

    def __init__(self, stream: str, key: bytes, *, admitted: Collection[Head] = ()) -> None:
        """`admitted`: heads that the log may begin after, where its older files are kept elsewhere."""
        self._stream = stream
        self._key = key
        self._admitted = frozenset(admitted)
        self.head = GENESIS
        self.first_seq = 0

    def check(self, line: bytes) -> tuple[Record | None, LineFault | None]:
        """The record on `line`, or None where it holds none, and what is wrong with it. After a fault the next record
        is judged by what it can still be judged by, so that one fault is told once."""
        expected = self.head.seq + 1
        try:
            record = Record.parse(line)
        except ValueError as error:
            self.head = Head(expected, _UNKNOWN)
            return None, LineFault(Fault.MALFORMED, expected, str(error))
        fault = self._judge_alone(record)
        if fault is not None:  # nothing that it claims is believed, its number included
            self.head = Head(expected, _UNKNOWN)
        else:
            fault = self._judge_place(record)
            if record.seq >= expected:
                self.head = record.head
        self.first_seq = self.first_seq or record.seq
        return record, fault

    def _judge_alone(self, record: Record) -> LineFault | None:
        if not holds_hash(record):
            return LineFault(Fault.EDITED, record.seq, "the record is not what its hash says")
        if not holds_mac(record, self._key):
            what = "the MAC does not hold: another key, or written by someone without it"
            return LineFault(Fault.UNSIGNED, record.seq, what)
        if record.stream != self._stream:
            return LineFault(Fault.FOREIGN, record.seq, f"a record of the log {record.stream}")
        return None

    def _judge_place(self, record: Record) -> LineFault | None:
        expected = self.head.seq + 1
        if record.seq < expected:
            what = "repeats the record before it" if record.hash == self.head.hash else "moved or repeated"
            return LineFault(Fault.MISPLACED, record.seq, f"{what}: {expected} was expected")
        if record.seq > expected:
            if self.head != GENESIS:
                num_missing = record.seq - expected
                return LineFault(Fault.GAP, record.seq, f"{num_missing} missing: {expected} was expected")
            if Head(record.seq - 1, record.prev) not in self._admitted:
                return LineFault(Fault.HEAD_CUT, record.seq, f"the log begins at {record.seq}")
        elif self.head.hash not in (record.prev, _UNKNOWN):
            return LineFault(Fault.SPLICED, record.seq, "follows another record than the one before it")
        return None
