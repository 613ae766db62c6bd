"""The audit thread of a process: callers hand events over without waiting, it commits them in batches.

Where it cannot write it says so: with `on_failure: refuse` callers meet `AuditUnavailable`, so that private work is
refused rather than done unseen, until a try to write succeeds. Events taken meanwhile are written then.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from deployments.errors import AuditUnavailable
from deployments.trust.audit.chain import chain_key
from deployments.trust.audit.log import AuditCounts, AuditLog, AuditOptions
from deployments.trust.audit.record import AuditEvent

logger = logging.getLogger("ray.serve.zoneserve.audit")

CLOSE_TIMEOUT_S = 10.0
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(slots=True)
class _Waiter:
    """A coroutine that waits for its record to be durable."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[bool]

    def tell(self, is_durable: bool) -> None:
        with suppress(RuntimeError):  # its loop has ended, and nobody waits
            self.loop.call_soon_threadsafe(self._set, is_durable)

    def _set(self, is_durable: bool) -> None:
        if not self.future.done():
            self.future.set_result(is_durable)


@dataclass(slots=True)
class _Entry:
    event: AuditEvent
    time_ms: int
    waiter: _Waiter | None


class AuditWriter:
    """One stream's log and the thread that writes it. Safe to call from any thread and any event loop."""

    def __init__(
        self,
        directory: Path,
        stream: str,
        master_key: bytes,
        options: AuditOptions | None = None,
        *,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """Opens the log and starts the thread. `stream`: names this process, for example by its replica's id.

        Raises:
            AuditError: As `AuditLog`.
        """
        self._options = options or AuditOptions()
        self._clock_ms = clock_ms
        self._log = AuditLog(directory, stream, chain_key(master_key), self._options, clock_ms)
        self._counts = self._log.counts
        self._changed = threading.Condition()  # guards everything below
        self._queue: deque[_Entry] = deque()
        self._num_lost_untold = 0
        self._failure: str | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=f"audit-{stream}", daemon=True)
        self._thread.start()

    # -- callers

    def append(self, event: AuditEvent) -> None:
        """Hands an event over; it is on the medium about `fsync_ms` later.

        Raises:
            AuditUnavailable: `on_failure` is `refuse`, and no room is left or the writer is closed. Counted.
        """
        self._enqueue(event, None)

    async def append_durable(self, event: AuditEvent) -> None:
        """Returns once the record is on the medium, or, with `on_failure: continue`, is known not to be.

        Raises:
            AuditUnavailable: `on_failure` is `refuse`, and the record is not on the medium within
                `durable_timeout_s`. It may still be written later. Counted.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop, loop.create_future())
        self._enqueue(event, waiter)
        is_durable = False
        with suppress(TimeoutError):
            async with asyncio.timeout(self._options.durable_timeout_s):
                is_durable = await waiter.future
        if not is_durable:
            self._refuse()

    def require_writable(self) -> None:
        """Asked before private work is taken on.

        Raises:
            AuditUnavailable: `on_failure` is `refuse`, and the log cannot be written at present. Counted.
        """
        if self._failure is not None:
            self._refuse()

    @property
    def failure(self) -> str | None:
        """Why the log cannot be written: `disk_full`, `write_error`, `queue_full`, `stopped`, `closed`; None where it
        can."""
        return self._failure

    def counts(self) -> AuditCounts:
        """A copy."""
        return replace(self._counts)

    def close(self) -> None:
        """Writes what waits, an anchor at its end, and closes the files. Idempotent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _enqueue(self, event: AuditEvent, waiter: _Waiter | None) -> None:
        with self._changed:
            is_full = len(self._queue) >= self._options.max_queue
            is_taken = not is_full and not self._is_closing
            if is_taken:
                self._queue.append(_Entry(event, self._clock_ms(), waiter))
                if len(self._queue) in (1, self._options.fsync_records):  # the two lengths that the thread waits for
                    self._changed.notify()
            else:
                self._counts.lost += 1
                self._num_lost_untold += 1
                if self._failure is None:
                    self._fail("closed" if self._is_closing else "queue_full")
            if waiter is not None and self._failure is not None:
                waiter.tell(is_durable=False)
        if not is_taken:
            self._refuse()

    def _refuse(self) -> None:
        if self._options.on_failure == "continue":
            return
        with self._changed:
            self._counts.refused += 1
        raise AuditUnavailable("the audit log cannot be written", retry_after_s=self._options.probe_s)

    # -- the thread

    def _run(self) -> None:
        try:
            while (batch := self._take()) is not None:
                self._log.add((entry.event, entry.time_ms) for entry in batch)
                if not self._commit_until_done(batch):
                    break
            else:
                self._log.add((), anchor=True)
                self._commit([])
            end = "closed"
        except Exception:
            logger.exception("the audit thread has stopped")
            end = "stopped"
        with self._changed:
            self._failure = end
            self._is_closing = True
            num_left = len(self._queue) + self._log.num_uncommitted
            self._counts.lost += num_left
            self._release(list(self._queue), is_durable=False)
        if num_left:
            logger.error("the audit log ended with %d events unwritten", num_left)
        self._log.close()

    def _take(self) -> list[_Entry] | None:
        """The next batch; an empty one now and then, for anchors; None at the end."""
        with self._changed:
            if not self._queue and not self._is_closing:
                self._changed.wait(self._options.anchor_s)
            if not self._queue:
                return None if self._is_closing else []
            self._changed.wait_for(
                lambda: len(self._queue) >= self._options.fsync_records or self._is_closing,
                self._options.fsync_ms / 1000,
            )
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._options.fsync_records))]
            if self._num_lost_untold:
                told = AuditEvent("audit.open", reason="gap", num_lost=self._num_lost_untold)
                batch.append(_Entry(told, self._clock_ms(), None))
                self._num_lost_untold = 0
            return batch

    def _commit_until_done(self, batch: list[_Entry]) -> bool:
        """Tries every `probe_s`; False when the writer is closed before it has succeeded."""
        while not self._commit(batch):
            with self._changed:
                if self._changed.wait_for(lambda: self._is_closing, self._options.probe_s):
                    return self._commit(batch)
        return True

    def _commit(self, batch: list[_Entry]) -> bool:
        error: OSError | None = None
        try:
            self._log.commit()
        except OSError as raised:
            error = raised
        is_durable = self._log.num_uncommitted == 0
        with self._changed:
            self._release(batch, is_durable)
            if error is not None:
                self._fail("disk_full" if error.errno in _FULL else "write_error", error.strerror)
                self._release(list(self._queue), is_durable=False)
            elif self._failure is not None:
                logger.warning("the audit log can be written again")
                self._failure = None
        return error is None

    def _fail(self, reason: str, detail: str | None = None) -> None:
        self._counts.failures += 1
        if self._failure != reason:
            logger.error("the audit log cannot be written: %s %s", reason, detail or "")
        self._failure = reason

    @staticmethod
    def _release(entries: list[_Entry], is_durable: bool) -> None:
        for entry in entries:
            if entry.waiter is not None:
                entry.waiter.tell(is_durable)
                entry.waiter = None
