"""The audit log as an ingress replica keeps it: a stream of its own, or none where none is configured."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from deployments.config import AuditSection
from deployments.errors import AuditUnavailable
from deployments.trust.audit import AuditEvent, AuditWriter
from deployments.trust.audit.log import AuditCounts
from deployments.trust.audit.record import Value

MAX_AUTH_DENIALS_PER_S = 10  # records: whoever has no credential must not fill the disk. The metric counts them all.


class AuditTrail:
    """Takes events and drops them where there is no log. Safe to call from any thread."""

    def __init__(self, writer: AuditWriter | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._writer = writer
        self._clock = clock
        self._second = 0
        self._num_in_second = 0

    @staticmethod
    def open(section: AuditSection | None, stream: str, master_key: bytes) -> AuditTrail:
        """
        Raises:
            AuditError: The log cannot be opened or made.
        """
        if section is None:
            return AuditTrail(None)
        return AuditTrail(AuditWriter(section.dir, stream, master_key, section.options()))

    def require_writable(self) -> None:
        """Asked before private work is taken on. Raises AuditUnavailable."""
        if self._writer is not None:
            self._writer.require_writable()

    def record(self, kind: str, /, **fields: Value | None) -> None:
        """Hand an event over; fields that are None are left out.

        Raises:
            AuditUnavailable: It cannot be taken, and the log refuses then.
        """
        if self._writer is not None:
            self._writer.append(_event(kind, fields))

    async def record_durable(self, kind: str, /, **fields: Value | None) -> None:
        """As `record`, and returns once the record is on the medium."""
        if self._writer is not None:
            await self._writer.append_durable(_event(kind, fields))

    def note(self, kind: str, /, **fields: Value | None) -> None:
        """As `record`, for what happens whether or not it can be recorded; the writer counts what is lost."""
        with suppress(AuditUnavailable):
            self.record(kind, **fields)

    def note_auth_denial(self, reason: str) -> None:
        """One `auth.deny`, unless this second has had its share of them."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._num_in_second = second, 0
        self._num_in_second += 1
        if self._num_in_second <= MAX_AUTH_DENIALS_PER_S:
            self.note("auth.deny", reason=reason)

    @property
    def failure(self) -> str | None:
        """As `AuditWriter.failure`."""
        return None if self._writer is None else self._writer.failure

    def counts(self) -> AuditCounts | None:
        """None where there is no log."""
        return None if self._writer is None else self._writer.counts()

    def close(self) -> None:
        """Write what waits, and an anchor. Idempotent."""
        if self._writer is not None:
            self._writer.close()


def _event(kind: str, fields: dict[str, Value | None]) -> AuditEvent:
    return AuditEvent(kind, **{name: value for name, value in fields.items() if value is not None})
