"""The directory of audit logs: names, modes, locks. No symbolic link is followed, nothing but plain files is opened.

`STREAM.SEQ.jsonl` records from number SEQ on; `STREAM.anchor` the head at its last anchor; `STREAM.lock` held by the
process that writes; `STREAM.SEQ.DIGEST.torn` what a crash left of an unfinished line before record SEQ.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from deployments.trust.audit.chain import STREAM_PATTERN, Head, open_anchor, seal_anchor
from deployments.trust.audit.record import MAX_RECORD_BYTES

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
MAX_ANCHOR_BYTES = 1024
LINES_PER_READ = 512
_LOG_NAME = re.compile(rf"({STREAM_PATTERN})\.([0-9]{{16}})\.jsonl")
_ANCHOR_NAME = re.compile(rf"({STREAM_PATTERN})\.anchor")


class AuditError(Exception):
    """An audit log that cannot be opened or read; the message names the file and the fault."""


class AuditDirectory:
    """One directory of logs, held open; a later exchange of its path changes nothing."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """`create`: make it where it is missing, and insist that it is this user's alone.

        Raises:
            AuditError: Not a directory, a symbolic link, or, with `create`, open to others.
        """
        self.path = path
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise AuditError(f"{path}: {error.strerror}") from error
        found = os.fstat(self._fd)
        if create and (stat.S_IMODE(found.st_mode) & 0o077 or found.st_uid != os.geteuid()):
            os.close(self._fd)
            raise AuditError(f"{path}: the audit directory must be its writer's own, mode 0700")

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def open(self, name: str, flags: int) -> int:
        """File descriptor of a plain file.

        Raises:
            OSError: Not there, a symbolic link, or not a plain file.
        """
        opened = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, FILE_MODE, dir_fd=self._fd)
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            os.close(opened)
            raise OSError(f"{name}: not a plain file")
        return opened

    def sync(self) -> None:
        """Makes new and renamed files last."""
        os.fsync(self._fd)

    def streams(self) -> list[str]:
        """Every stream that has a log or an anchor."""
        found = (_LOG_NAME.fullmatch(name) or _ANCHOR_NAME.fullmatch(name) for name in os.listdir(self._fd))
        return sorted({match[1] for match in found if match})

    def logs(self, stream: str) -> list[str]:
        """Names of a stream's log files, oldest first."""
        found = (_LOG_NAME.fullmatch(name) for name in os.listdir(self._fd))
        return sorted(match[0] for match in found if match and match[1] == stream)

    def lines(self, name: str) -> Iterator[bytes]:
        """The lines of a file with their ends, each at most `MAX_RECORD_BYTES` + 1 long. The file is open only while
        a batch of them is read, so that any number of logs can be read side by side.

        Raises:
            OSError: As `open`, and while reading.
        """
        offset = 0
        while True:
            with os.fdopen(self.open(name, os.O_RDONLY), "rb") as file:
                file.seek(offset)
                lines = [file.readline(MAX_RECORD_BYTES + 1) for _ in range(LINES_PER_READ)]
                offset = file.tell()
            for line in lines:
                if not line:
                    return
                yield line

    def lock(self, stream: str) -> int:
        """Descriptor that keeps other processes out of the stream until it is closed or its process ends.

        Raises:
            AuditError: Another process has the stream.
        """
        opened = self.open(f"{stream}.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(opened)
            raise AuditError(f"{self.path}: another process writes the log {stream}") from error
        return opened

    def read_anchor(self, stream: str, key: bytes) -> Head | None:
        """The stream's anchor; None where there is none.

        Raises:
            ValueError: Not an anchor of this stream under this key. OSError: As `open`.
        """
        try:
            opened = self.open(f"{stream}.anchor", os.O_RDONLY)
        except FileNotFoundError:
            return None
        with os.fdopen(opened, "rb") as file:
            return open_anchor(file.read(MAX_ANCHOR_BYTES), stream=stream, key=key)

    def write_anchor(self, stream: str, head: Head, key: bytes) -> None:
        """Whole or not at all. Raises OSError, and then the anchor before it stands."""
        staged = f"{stream}.anchor.new"
        with os.fdopen(self.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
            file.write(seal_anchor(head, stream=stream, key=key))
            file.flush()
            os.fsync(file.fileno())
        os.rename(staged, f"{stream}.anchor", src_dir_fd=self._fd, dst_dir_fd=self._fd)
        self.sync()

    def keep_torn(self, stream: str, next_seq: int, torn: bytes) -> str:
        """Puts aside what a crash left of a line; returns its SHA-256 (hex). Raises OSError."""
        digest = hashlib.sha256(torn).hexdigest()
        name = f"{stream}.{next_seq:016d}.{digest[:16]}.torn"
        with os.fdopen(self.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
            file.write(torn)
            file.flush()
            os.fsync(file.fileno())
        self.sync()
        return digest


def log_name(stream: str, first_seq: int) -> str:
    return f"{stream}.{first_seq:016d}.jsonl"


def first_seq_of(name: str) -> int:
    """Number of the first record, as a log file's name has it."""
    match = _LOG_NAME.fullmatch(name)
    assert match is not None
    return int(match[2])
