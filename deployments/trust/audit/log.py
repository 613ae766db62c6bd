"""One process's chain on disk: records are added in memory, committed together, rotated, anchored, resumed.

Synchronous, for one thread. What is committed is on the medium; what is not stays in memory and is written again by the
next commit, so that a full disk costs no record and leaves no half line behind.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deployments.trust.audit.chain import GENESIS, STREAM_PATTERN, Head, Record, holds_hash, holds_mac, seal
from deployments.trust.audit.files import AuditDirectory, AuditError, first_seq_of, log_name
from deployments.trust.audit.record import AuditEvent


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """Limits of a log and its writer, and what happens where it cannot be written."""

    on_failure: Literal["refuse", "continue"] = "refuse"
    max_queue: int = 10_000  # records that wait for the writer
    fsync_records: int = 256  # a commit has at most so many, and
    fsync_ms: int = 20  # the first of them waits at most so long
    anchor_records: int = 1000
    anchor_s: int = 60
    rotate_bytes: int = 64 << 20  # a file that has reached it is closed; one batch may lie above
    rotate_s: int = 86_400  # since this process opened it
    probe_s: float = 1.0  # between two tries while the log cannot be written
    durable_timeout_s: float = 5.0


@dataclass(slots=True)
class AuditCounts:
    """What a log and its writer have done since they were opened."""

    appended: int = 0  # records that reached the medium
    fsyncs: int = 0
    rotations: int = 0
    anchors: int = 0
    failures: int = 0  # commits that failed, and outages for a full queue
    refused: int = 0  # callers that met AuditUnavailable
    lost: int = 0  # events that no record was written of; the log itself says how many


class AuditLog:
    """The newest file of one stream, open for append.

    Attributes:
        head: The last record added. committed: The last one on the medium.
        counts: Kept by this and by the writer above it.
    """

    def __init__(self, path: Path, stream: str, key: bytes, options: AuditOptions, clock_ms: Callable[[], int]) -> None:
        """Opens or makes the stream's log in the directory `path`, puts a torn last line aside, and commits an
        `audit.open`. `clock_ms`: Unix time in milliseconds.

        Raises:
            AuditError: The directory or a file cannot be used or written, another process has the stream, or the log
                is not what its anchor says that it was. Nothing of the log has changed then.
        """
        if not re.fullmatch(STREAM_PATTERN, stream):
            raise AuditError("a log's name is 1 to 64 of letters, digits, _ and -")
        self._stream, self._key, self._options, self._clock_ms = stream, key, options, clock_ms
        self.counts = AuditCounts()
        self._unsynced: list[bytes] = []
        self._is_suspect = False  # part of `_unsynced` may be in the file
        self._needs_anchor_file = False
        self._committed_bytes = 0
        self._first_seq = 1
        self._opened_ms = self._anchored_ms = clock_ms()
        self.head: Head = GENESIS
        self.committed: Head = GENESIS
        self._anchor: Head = GENESIS
        self._directory = AuditDirectory(path, create=True)
        self._fd = -1
        self._lock = -1
        try:
            self._lock = self._directory.lock(stream)
            self._open()
        except OSError as error:
            self.close()
            raise AuditError(f"{path}: the log {stream} cannot be opened: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def num_uncommitted(self) -> int:
        return len(self._unsynced)

    def add(self, events: Iterable[tuple[AuditEvent, int]], *, anchor: bool = False) -> None:
        """Seals events, each with its time in ms, in memory; then an anchor where one is due, or asked for and not
        there."""
        for event, time_ms in events:
            self._seal(event, time_ms)
        now = self._clock_ms()
        since = self.head.seq - self._anchor.seq
        is_due = since >= self._options.anchor_records or now - self._anchored_ms >= self._options.anchor_s * 1000
        if since and (is_due or anchor):
            self._seal(AuditEvent("audit.anchor", count=self.head.seq, head=self.head.hash), now)
            self._anchor, self._anchored_ms = self.head, now
            self._needs_anchor_file = True
            self.counts.anchors += 1

    def commit(self) -> None:
        """Puts everything added on the medium, then the anchor file and the next file where they are due. Without
        anything to do, does nothing.

        Raises:
            OSError: Part of it was not done; the next commit does that part again.
        """
        self._write()
        if self._needs_anchor_file:
            self._directory.write_anchor(self._stream, self.committed, self._key)
            self._needs_anchor_file = False
        if reason := self._rotation_reason():
            self._rotate(reason)
            self._write()

    def close(self) -> None:
        """Closes the files; idempotent. What is not committed is lost."""
        for opened in (self._fd, self._lock):
            if opened >= 0:
                os.close(opened)
        self._directory.close()
        self._fd = self._lock = -1

    # -- records

    def _seal(self, event: AuditEvent, time_ms: int) -> None:
        record = seal(event, stream=self._stream, time_ms=time_ms, head=self.head, key=self._key)
        self.head = record.head
        self._unsynced.append(record.line())

    def _write(self) -> None:
        """A write or fsync that failed leaves it unknown what is on the medium: the file is then cut back to what is
        known, and all the rest, none of which has been called durable, is written again."""
        if not self._unsynced:
            return
        if self._is_suspect:
            os.ftruncate(self._fd, self._committed_bytes)
        self._is_suspect = True
        data = memoryview(b"".join(self._unsynced))
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)
        self._is_suspect = False
        self._committed_bytes = os.fstat(self._fd).st_size
        self.counts.fsyncs += 1
        self.counts.appended += len(self._unsynced)
        self._unsynced.clear()
        self.committed = self.head

    # -- files

    def _rotation_reason(self) -> str | None:
        if self.committed.seq - self._first_seq < 1:  # one record: it says that the file was begun
            return None
        if self._committed_bytes >= self._options.rotate_bytes:
            return "size"
        return "age" if self._clock_ms() - self._opened_ms >= self._options.rotate_s * 1000 else None

    def _rotate(self, reason: str) -> None:
        before = self._fd
        self._open_file(log_name(self._stream, self.head.seq + 1), os.O_CREAT)
        os.close(before)
        self._seal(
            AuditEvent("audit.rotate", reason=reason, count=self.head.seq, head=self.head.hash), self._clock_ms()
        )
        self.counts.rotations += 1

    def _open_file(self, name: str, flags: int) -> None:
        """Raises OSError, and then the file before it is still the one in use."""
        opened = self._directory.open(name, os.O_RDWR | os.O_APPEND | flags)
        try:
            size = os.fstat(opened).st_size
            if flags & os.O_CREAT and size:
                raise OSError(f"{name}: is there already")
            self._directory.sync()
        except OSError:
            os.close(opened)
            raise
        self._fd = opened
        self._committed_bytes = size
        self._first_seq = first_seq_of(name)
        self._opened_ms = self._clock_ms()

    # -- start

    def _open(self) -> None:
        try:
            anchor = self._directory.read_anchor(self._stream, self._key)
        except ValueError as error:
            raise self._damaged(f"its anchor file cannot be believed: {error}") from error
        names = self._directory.logs(self._stream)
        if not names:
            if anchor is not None and anchor != GENESIS:
                raise self._damaged(f"its files are gone; its anchor is at record {anchor.seq}")
            # Before the first record, so that there is no moment with records and no anchor.
            self._directory.write_anchor(self._stream, GENESIS, self._key)
            self._open_file(log_name(self._stream, 1), os.O_CREAT)
            anchor = GENESIS
            opening = AuditEvent("audit.open", reason="new")
        elif anchor is None:
            raise self._damaged("it has no anchor file")
        else:
            opening = self._resume(names, anchor)
        self.committed = self.head
        self._anchor = anchor
        self._seal(opening, self._clock_ms())
        self.commit()

    def _resume(self, names: list[str], anchor: Head) -> AuditEvent:
        """Opens the last file behind its last whole record; what stands after that is put aside."""
        self._open_file(names[-1], 0)
        end, last = _last_line(self._fd)
        if last is None and len(names) > 1:  # begun, but nothing whole was written to it
            before = self._directory.open(names[-2], os.O_RDONLY)
            try:
                end_before, last = _last_line(before)
                if os.fstat(before).st_size != end_before:
                    raise self._damaged(f"{names[-2]} ends in half a line and is not its last file")
            finally:
                os.close(before)
        self.head = GENESIS if last is None else self._believed(last).head
        if end == 0 and self._first_seq != self.head.seq + 1:
            raise self._damaged(f"record {self.head.seq} is its last; {names[-1]} has another number")
        if anchor.seq > self.head.seq or (anchor.seq == self.head.seq and anchor != self.head):
            raise self._damaged(f"it ends at record {self.head.seq}; its anchor is at {anchor.seq}")
        size = self._committed_bytes
        if end == size:
            return AuditEvent("audit.open", reason="resumed")
        torn = os.pread(self._fd, size - end, end)
        digest = self._directory.keep_torn(self._stream, self.head.seq + 1, torn)
        os.ftruncate(self._fd, end)
        os.fsync(self._fd)
        self._committed_bytes = end
        return AuditEvent("audit.open", reason="torn", torn_bytes=len(torn), torn_digest=digest)

    def _believed(self, line: bytes) -> Record:
        try:
            record = Record.parse(line)
        except ValueError as error:
            raise self._damaged(f"its last line is no record: {error}") from error
        if not (holds_hash(record) and holds_mac(record, self._key) and record.stream == self._stream):
            raise self._damaged("its last record cannot be believed: edited, of another log, or of another key")
        return record

    def _damaged(self, what: str) -> AuditError:
        return AuditError(
            f"{self._directory.path}: the log {self._stream} is damaged: {what}. Nothing is added to it; "
            "verify it, and move its files aside to start another"
        )


def _last_line(opened: int) -> tuple[int, bytes | None]:
    """End of the last whole line of a file, and that line; 0 and None where there is none."""
    if os.fstat(opened).st_size == 0:
        return 0, None
    with mmap.mmap(opened, 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1
        return end, (data[data.rfind(b"\n", 0, end - 1) + 1 : end] if end else None)
