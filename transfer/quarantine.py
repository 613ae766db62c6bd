"""Which of our blocks a peer may still write into. Pure bookkeeping: no blocks move here, the clock is given.

An entry is one ticket. WRITING: a sender may be at work. LANDED: verified, the blocks belong to the request; the
entry is gone. QUARANTINED: given up, a write may still land. A fence ends either; a timer never does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from transfer.protocol import LimitReached, TransferError

MAX_OPEN_HANDOFFS = 1024


class HandoffFault(StrEnum):
    """Why a handoff did not land. Closed: each is a label of a counter."""

    TIMEOUT = "timeout"
    PEER_DOWN = "peer_down"
    ABORTED = "aborted"  # by the sender, after its fence
    COUNT_MISMATCH = "count_mismatch"
    STALE_GENERATION = "stale_generation"
    DIGEST_MISMATCH = "digest_mismatch"
    CANCELLED = "cancelled"  # by us: the client left, or the reservation was needed no more
    NOT_SENT = "not_sent"  # the sender refused the ticket or was never reached


class FenceKind(StrEnum):
    """What proved that no write is live any more."""

    NOTICE = "notice"  # a signed DONE or ABORTED
    PEER_GONE = "peer_gone"
    CONFIRMED = "confirmed"  # the sender said so over another trusted channel


@dataclass(slots=True)
class _Entry:
    request_id: str
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    since_s: float
    is_fenced: bool = False
    release: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class QuarantineStats:
    """Counts since the start by reason, and gauges of now. Ages in seconds."""

    opened: int
    landed: int
    released: int
    faults: Mapping[str, int]
    fences: Mapping[str, int]
    writing_handoffs: int
    writing_blocks: int
    quarantined_handoffs: int
    quarantined_blocks: int
    oldest_quarantine_s: float


class ReservationLedger:
    """Every ticket from its issue to its end. Each ends exactly once: landed, or released behind a fence."""

    def __init__(self, clock: Callable[[], float], max_open: int = MAX_OPEN_HANDOFFS) -> None:
        self._clock = clock
        self._max_open = max_open
        self._entries: dict[bytes, _Entry] = {}
        self._owner_of_block: dict[int, bytes] = {}
        self._counts: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._fences: Counter[str] = Counter()

    def open(self, nonce: bytes, request_id: str, block_ids: tuple[int, ...], generations: tuple[int, ...]) -> None:
        """A ticket for these blocks is about to be issued.

        Raises:
            LimitReached: Too many handoffs are open.
            TransferError: The nonce is in use, or a block is still open to another ticket's writer.
        """
        if len(self._entries) >= self._max_open:
            raise LimitReached(f"{self._max_open} handoffs are open")
        if nonce in self._entries:
            raise TransferError("the nonce is in use")
        for block_id in block_ids:
            if block_id in self._owner_of_block:
                raise TransferError(f"block {block_id} may still be written under another ticket")
        self._entries[nonce] = _Entry(request_id, block_ids, generations, self._clock())
        self._owner_of_block.update(dict.fromkeys(block_ids, nonce))
        self._counts["opened"] += 1

    def land(self, nonce: bytes) -> None:
        """Verified: the blocks belong to the request.

        Raises:
            TransferError: No such entry, or it has been given up.
        """
        if self._entry(nonce).release is not None:
            raise TransferError("the handoff has been given up")
        self._remove(nonce)
        self._counts["landed"] += 1

    def fault(self, fault: HandoffFault) -> None:
        self._faults[fault] += 1

    def quarantine(self, nonce: bytes, release: Callable[[], None]) -> None:
        """Given up: `release` runs once when a fence has passed, at once where it has already.

        Releases of one request run together, after the last of its fences, because its owner may free by request.

        Raises:
            TransferError: No such entry, or it was given up before.
        """
        entry = self._entry(nonce)
        if entry.release is not None:
            raise TransferError("the handoff has been given up already")
        entry.release = release
        entry.since_s = self._clock()
        self._release_request(entry.request_id)

    def fence(self, nonce: bytes, kind: FenceKind) -> bool:
        """No write under this ticket is live any more. False where that was known or the entry has ended."""
        entry = self._entries.get(nonce)
        if entry is None or entry.is_fenced:
            return False
        entry.is_fenced = True
        self._fences[kind] += 1
        self._release_request(entry.request_id)
        return True

    def is_fenced(self, nonce: bytes) -> bool:
        """True where nothing more can land under this ticket, also after its end."""
        entry = self._entries.get(nonce)
        return entry is None or entry.is_fenced

    def may_be_written(self, block_id: int) -> bool:
        nonce = self._owner_of_block.get(block_id)
        return nonce is not None and not self._entries[nonce].is_fenced

    def stats(self) -> QuarantineStats:
        quarantined = [entry for entry in self._entries.values() if entry.release is not None]
        writing = [entry for entry in self._entries.values() if entry.release is None]
        oldest_s = min((entry.since_s for entry in quarantined), default=None)
        return QuarantineStats(
            opened=self._counts["opened"],
            landed=self._counts["landed"],
            released=self._counts["released"],
            faults={str(fault): self._faults[fault] for fault in HandoffFault},
            fences={str(kind): self._fences[kind] for kind in FenceKind},
            writing_handoffs=len(writing),
            writing_blocks=sum(len(entry.block_ids) for entry in writing),
            quarantined_handoffs=len(quarantined),
            quarantined_blocks=sum(len(entry.block_ids) for entry in quarantined),
            oldest_quarantine_s=0.0 if oldest_s is None else self._clock() - oldest_s,
        )

    def check(self) -> None:
        """
        Raises:
            AssertionError: The table contradicts itself.
        """
        owned = {block: nonce for nonce, entry in self._entries.items() for block in entry.block_ids}
        assert owned == self._owner_of_block, "the index of blocks differs from the entries"
        ended = self._counts["landed"] + self._counts["released"]
        assert self._counts["opened"] == ended + len(self._entries), "an entry ended twice or never"

    def _release_request(self, request_id: str) -> None:
        given_up = {
            nonce: entry
            for nonce, entry in self._entries.items()
            if entry.request_id == request_id and entry.release is not None
        }
        if not all(entry.is_fenced for entry in given_up.values()):
            return
        for nonce, entry in given_up.items():
            self._remove(nonce)
            self._counts["released"] += 1
            assert entry.release is not None
            entry.release()

    def _entry(self, nonce: bytes) -> _Entry:
        entry = self._entries.get(nonce)
        if entry is None:
            raise TransferError("no open handoff has this nonce")
        return entry

    def _remove(self, nonce: bytes) -> None:
        for block_id in self._entries.pop(nonce).block_ids:
            del self._owner_of_block[block_id]
