"""Notifications between their arrival and the moment somebody takes them. Bounded; safe between threads.

A waiter is only woken; it takes the message itself, so a message that arrives as its waiter gives up stays here
for the next one.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from transfer.protocol import MAX_NOTIFICATION_BYTES, NONCE_BYTES, ConnectorClosed, TransferError

MAX_NONCES = 4096  # nonces with a message or a waiter
MAX_MESSAGES_PER_NONCE = 8
MAX_FORGOTTEN_NONCES = 65_536
HEARTBEAT = b"\0"  # proves a connection; no message


@dataclass(slots=True)
class _Box:
    """Messages of one nonce. `seen` keeps what was ever delivered, to know repeats by."""

    seen: set[bytes] = field(default_factory=set)
    unread: deque[bytes] = field(default_factory=deque)
    waiter: asyncio.Future[None] | None = None
    is_expected: bool = False


@dataclass(slots=True)
class InboxCounts:
    received: int = 0
    early: int = 0
    duplicate: int = 0
    late: int = 0
    refused: int = 0


class NotificationInbox:
    """Keyed by the first `NONCE_BYTES` of a message."""

    def __init__(self, max_nonces: int = MAX_NONCES) -> None:
        self._max_nonces = max_nonces
        self._lock = threading.Lock()
        self._boxes: OrderedDict[bytes, _Box] = OrderedDict()
        self._forgotten: OrderedDict[bytes, None] = OrderedDict()
        self._num_waiters = 0
        self._is_closed = False
        self.counts = InboxCounts()

    @property
    def has_waiters(self) -> bool:
        return self._num_waiters > 0

    def deliver(self, message: bytes) -> None:
        """Take in one message, from any thread; never raises for what a peer sent."""
        if message == HEARTBEAT:
            return
        with self._lock:
            self.counts.received += 1
            if not NONCE_BYTES <= len(message) <= MAX_NOTIFICATION_BYTES:
                self.counts.refused += 1
                return
            nonce = message[:NONCE_BYTES]
            if nonce in self._forgotten:
                self.counts.late += 1
                return
            box = self._boxes.get(nonce) or self._open(nonce)
            if box is None:
                self.counts.refused += 1
                return
            self._store(box, message)

    async def take(self, nonce: bytes) -> bytes:
        """The next unread message of `nonce`, waiting for it without a limit of its own.

        Raises:
            ConnectorClosed: The inbox closed meanwhile.
            TransferError: The nonce was forgotten, before or meanwhile.
            ValueError: Somebody else waits for this nonce, or it is not a nonce.
        """
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
        while True:
            waiter = self._take_or_wait(nonce)
            if isinstance(waiter, bytes):
                return waiter
            try:
                await waiter
            finally:
                self._stop_waiting(nonce, waiter)

    def forget(self, nonce: bytes) -> None:
        with self._lock:
            box = self._boxes.pop(nonce, None)
            if box is not None and box.waiter is not None:
                _wake(box.waiter)
            self._forgotten[nonce] = None
            self._forgotten.move_to_end(nonce)
            while len(self._forgotten) > MAX_FORGOTTEN_NONCES:
                self._forgotten.popitem(last=False)

    def close(self) -> None:
        """Waiters raise ConnectorClosed."""
        with self._lock:
            self._is_closed = True
            for box in self._boxes.values():
                if box.waiter is not None:
                    _wake(box.waiter)

    def _store(self, box: _Box, message: bytes) -> None:
        if message in box.seen:
            self.counts.duplicate += 1
            return
        if len(box.seen) >= MAX_MESSAGES_PER_NONCE:
            self.counts.refused += 1
            return
        if not box.is_expected:
            self.counts.early += 1
        box.seen.add(message)
        box.unread.append(message)
        if box.waiter is not None:
            _wake(box.waiter)

    def _open(self, nonce: bytes) -> _Box | None:
        """A box for a nonce; where the table is full the oldest that nobody expects makes room."""
        if len(self._boxes) >= self._max_nonces:
            victim = next((key for key, box in self._boxes.items() if not box.is_expected), None)
            if victim is None:
                return None
            del self._boxes[victim]
            self.counts.refused += 1
        return self._boxes.setdefault(nonce, _Box())

    def _take_or_wait(self, nonce: bytes) -> bytes | asyncio.Future[None]:
        with self._lock:
            if self._is_closed:
                raise ConnectorClosed("closed while waiting for a notification")
            if nonce in self._forgotten:
                raise TransferError("this nonce has been forgotten")
            box = self._boxes.get(nonce) or self._open(nonce)
            if box is None:
                raise ValueError(f"more than {self._max_nonces} nonces are expected")
            box.is_expected = True
            if box.unread:
                return box.unread.popleft()
            if box.waiter is not None:
                raise ValueError("this nonce has a waiter already")
            box.waiter = asyncio.get_running_loop().create_future()
            self._num_waiters += 1
            return box.waiter

    def _stop_waiting(self, nonce: bytes, waiter: asyncio.Future[None]) -> None:
        with self._lock:
            self._num_waiters -= 1
            box = self._boxes.get(nonce)
            if box is not None and box.waiter is waiter:
                box.waiter = None


def _wake(waiter: asyncio.Future[None]) -> None:
    loop = waiter.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(_resolve, waiter)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
