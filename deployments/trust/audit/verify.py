"""Checks and reads a directory of audit logs as a stream: constant memory, whatever their length."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from deployments.trust.audit.chain import GENESIS, ChainVerifier, Fault, Head, Record, holds_mac
from deployments.trust.audit.files import AuditDirectory, first_seq_of
from deployments.trust.audit.record import MAX_RECORD_BYTES

MAX_FINDINGS = 100  # kept in full; all are counted


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault. `line` counts from 1, 0 where the whole file is meant; `seq` is the record's number, or the one
    expected there."""

    fault: Fault
    stream: str
    file: str
    line: int
    seq: int
    what: str


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """What was read of one stream. `first_seq` 0: no record."""

    stream: str
    num_files: int
    num_records: int
    first_seq: int
    head: Head


@dataclass(slots=True)
class Verification:
    """What was found.

    Attributes:
        findings: The first `MAX_FINDINGS`. counts: All of them, by fault.
    """

    streams: list[StreamSummary] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[Fault] = field(default_factory=Counter)

    @property
    def is_intact(self) -> bool:
        return not self.counts

    @property
    def num_records(self) -> int:
        return sum(stream.num_records for stream in self.streams)

    def add(self, finding: Finding) -> None:
        self.counts[finding.fault] += 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)


def verify(directory: AuditDirectory, keys: Sequence[bytes], anchors: Sequence[Head] = ()) -> Verification:
    """Checks every stream against itself, its anchor file, and the operator's own `anchors`.

    Each of `anchors` must be met by some log. A log may begin after one of them: its older files are kept elsewhere.

    Args:
        keys: Chain keys, newest first, at least one. A process writes its whole stream under the key it started with,
            so a stream is held against the one key that opens its anchor, and never against two.
    """
    result = Verification()
    unmet = set(anchors) - {GENESIS}
    for stream in directory.streams():
        key = _key_that_opens(directory, stream, keys)
        result.streams.append(_verify_stream(directory, stream, key, unmet, result))
    for anchor in sorted(unmet, key=str):
        what = f"no log holds record {anchor.seq} with the hash of the anchor given: cut, or replaced"
        result.add(Finding(Fault.TAIL_CUT, "", "", 0, anchor.seq, what))
    return result


def _key_that_opens(directory: AuditDirectory, stream: str, keys: Sequence[bytes]) -> bytes:
    """The key of the stream's anchor; where that opens under none, of its first record; else the newest."""
    for key in keys:
        with suppress(ValueError, OSError):
            if directory.read_anchor(stream, key) is not None:
                return key
    with suppress(ValueError, OSError, IndexError, StopIteration):  # no file, no line, no record, none of these keys
        first = Record.parse(next(directory.lines(directory.logs(stream)[0])))
        return next(key for key in keys if holds_mac(first, key))
    return keys[0]


def _verify_stream(
    directory: AuditDirectory, stream: str, key: bytes, unmet: set[Head], result: Verification
) -> StreamSummary:
    def tell(fault: Fault, file: str, line: int, seq: int, what: str) -> None:
        result.add(Finding(fault, stream, file, line, seq, what))

    # Before the files, which may grow meanwhile: they are then at or past it.
    anchor = _read_anchor(directory, stream, key, result)
    is_anchor_met = anchor in (None, GENESIS)
    verifier = ChainVerifier(stream, key, admitted=unmet)
    names = directory.logs(stream)
    num_records = 0
    for name in names:
        first_seq = None
        try:
            for number, line in enumerate(directory.lines(name), start=1):
                expected = verifier.head.seq + 1
                if name == names[-1] and not line.endswith(b"\n") and len(line) <= MAX_RECORD_BYTES:
                    what = f"{len(line)} bytes without a line's end: the writer was killed, or is still writing"
                    tell(Fault.TORN, name, number, expected, what)
                    continue
                record, fault = verifier.check(line)
                if fault is not None:
                    tell(fault.fault, name, number, fault.seq, fault.what)
                if record is None:
                    continue
                num_records += 1
                first_seq = first_seq or record.seq
                if fault is None:
                    is_anchor_met = is_anchor_met or record.head == anchor
                    unmet -= {record.head, Head(record.seq - 1, record.prev)}
        except OSError as error:
            tell(Fault.UNREADABLE, name, 0, verifier.head.seq + 1, str(error.strerror or error))
        if (first_seq or verifier.head.seq + 1) != first_seq_of(name):
            tell(Fault.MISPLACED, name, 0, first_seq_of(name), "the file's name is not that of its first record")
    if anchor is not None and not is_anchor_met:
        is_cut = verifier.head.seq < anchor.seq
        what = f"the log ends at record {verifier.head.seq}" if is_cut else "the record is not the one of its anchor"
        tell(Fault.TAIL_CUT if is_cut else Fault.ANCHOR, names[-1] if names else "", 0, anchor.seq, what)
    return StreamSummary(stream, len(names), num_records, verifier.first_seq, verifier.head)


def _read_anchor(directory: AuditDirectory, stream: str, key: bytes, result: Verification) -> Head | None:
    fault, what = Fault.ANCHOR, "missing: it would not be seen where the log was cut"
    try:
        anchor = directory.read_anchor(stream, key)
        if anchor is not None:
            return anchor
    except ValueError as error:
        what = str(error)
    except OSError as error:
        fault, what = Fault.UNREADABLE, str(error.strerror or error)
    result.add(Finding(fault, stream, f"{stream}.anchor", 0, 0, what))
    return None


def merged(directory: AuditDirectory, verification: Verification) -> Iterator[Record]:
    """The records of all streams, as far as they were verified, by time; within one in the order of its chain. Lines
    that hold no record are left out; `verification` has them."""
    return heapq.merge(
        *(_records(directory, summary) for summary in verification.streams),
        key=lambda record: (record.time_ms, record.stream, record.seq),
    )


def _records(directory: AuditDirectory, summary: StreamSummary) -> Iterator[Record]:
    num_left = summary.num_records
    for name in directory.logs(summary.stream):
        try:
            for line in directory.lines(name):
                if num_left == 0:
                    return
                try:
                    record = Record.parse(line)
                except ValueError:
                    continue
                num_left -= 1
                yield record
        except OSError:
            continue
