"""One handoff, from both ends. `PushSession`: prefill writes its blocks. `Landing`: decode lets nothing in unseen.

Decode issues a `Landing`; its sealed ticket travels to prefill, which opens it into a `PushSession`, pushes
blocks as they are finished, and ends with a signed notice in its last write. Decode accepts what landed only if
nonce, count, generations and keyed digest all hold. Anything else is refused with a reason, and the blocks stay
in quarantine until a fence.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from transfer.digest import BlockDigest
from transfer.notice import AbortReason, ForgedNotice, Notice, NoticeKind
from transfer.protocol import (
    NONCE_BYTES,
    Fence,
    KVConnector,
    KVPool,
    PendingWrite,
    TransferError,
)
from transfer.quarantine import FenceKind, HandoffFault, QuarantineStats, ReservationLedger
from transfer.ticket import (
    Expectation,
    RefusalReason,
    SealedTicket,
    Ticket,
    TicketRefused,
    TicketSealer,
    TicketVerifier,
)

_T = TypeVar("_T")

WRITE_TIMEOUT_S = 10.0
NOTICE_TIMEOUT_S = 5.0
FENCE_WAIT_S = 30.0  # one turn of a wait that repeats until the fence
OFFLOAD_BYTES = 2 * 2**20  # digests of more than this run off the event loop


class PushFailed(TransferError):
    """The session cannot go on; `abort` it. The cause says why."""


class LandingRefused(TransferError):
    """What was promised did not land. `is_fenced`: nothing of it can land any more."""

    def __init__(self, fault: HandoffFault, detail: str, *, is_fenced: bool) -> None:
        super().__init__(f"handoff refused: {fault}{': ' if detail else ''}{detail}")
        self.fault = fault
        self.is_fenced = is_fenced


@dataclass(frozen=True, slots=True)
class PushReceipt:
    """A finished push. `seconds`: from the first push to the fence of the last write."""

    num_bytes: int = 0
    num_blocks: int = 0
    num_descriptors: int = 0
    num_writes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LandingReceipt:
    """A verified landing. `wait_s`: until the notice came; `verify_s`: the checks after it."""

    num_bytes: int
    num_blocks: int
    wait_s: float
    verify_s: float


@dataclass(frozen=True, slots=True)
class SenderStats:
    """Counts since the start; refusals and aborts by reason."""

    sessions: int
    finished: int
    bytes_pushed: int
    blocks_pushed: int
    refused: Mapping[str, int]
    aborted: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ReceiverStats:
    """Counts since the start, and the ledger's."""

    landed_bytes: int
    landed_blocks: int
    forged_notices: int
    sender_aborts: Mapping[str, int]
    ledger: QuarantineStats


class HandoffSender:
    """Opens tickets into push sessions: one a prefill replica."""

    def __init__(
        self,
        connector: KVConnector,
        verifier: TicketVerifier,
        *,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: unix time in seconds, as the tickets' expiry."""
        self._connector = connector
        self._verifier = verifier
        self._write_timeout_s = write_timeout_s
        self._clock = clock
        self._sessions = 0
        self._finished: list[int] = [0, 0, 0]  # sessions, bytes, blocks
        self._refused: Counter[str] = Counter()
        self._aborted: Counter[str] = Counter()

    async def accept(self, sealed: bytes, handshake: bytes, expected: Expectation) -> PushSession:
        """Check the ticket, connect to its receiver. Nothing is written until the session is pushed.

        Raises:
            TicketRefused: With its reason, counted.
            TransferError: The receiver cannot be connected. The ticket is spent; no write has been posted.
        """
        try:
            opened = self._verifier.verify(sealed, expected)
            peer = await self._connector.connect(handshake)
            if peer != opened.ticket.receiver:
                raise TicketRefused(RefusalReason.WRONG_RECEIVER)
        except TicketRefused as refusal:
            self._refused[refusal.reason] += 1
            raise
        self._sessions += 1
        return PushSession(
            self._connector,
            opened,
            write_timeout_s=self._write_timeout_s,
            clock=self._clock,
            on_finished=self._count_finished,
            on_aborted=self._count_aborted,
        )

    def stats(self) -> SenderStats:
        finished, num_bytes, num_blocks = self._finished
        return SenderStats(
            sessions=self._sessions,
            finished=finished,
            bytes_pushed=num_bytes,
            blocks_pushed=num_blocks,
            refused={str(reason): self._refused[reason] for reason in RefusalReason},
            aborted={reason.name.lower(): self._aborted[reason.name] for reason in AbortReason},
        )

    def _count_finished(self, receipt: PushReceipt) -> None:
        self._finished[0] += 1
        self._finished[1] += receipt.num_bytes
        self._finished[2] += receipt.num_blocks

    def _count_aborted(self, reason: AbortReason) -> None:
        self._aborted[reason.name] += 1


class PushSession:
    """Writes the blocks of one ticket, in table order, while later ones are still being computed.

    Every block but the last chunk's is on its way when `push` returns. The last chunk's write waits until all
    others have landed, because its notice vouches for all. Source blocks must not change or be freed before
    `settled` returns. Use it from one event loop; end it with `finish` or `abort`.
    """

    def __init__(
        self,
        connector: KVConnector,
        opened: SealedTicket,
        *,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        clock: Callable[[], float] = time.time,
        on_finished: Callable[[PushReceipt], None] = lambda receipt: None,
        on_aborted: Callable[[AbortReason], None] = lambda reason: None,
    ) -> None:
        self.ticket = ticket = opened.ticket
        self._connector = connector
        self._key = opened.transfer_key
        self._write_timeout_s = write_timeout_s
        self._clock = clock
        self._on_finished = on_finished
        self._on_aborted = on_aborted
        pool = connector.pool
        self._digest = BlockDigest(self._key, ticket.nonce, ticket.binding(), pool.layout.block_bytes)
        self._num_pushed = 0
        self._writes: list[PendingWrite] = []
        self._hashing: asyncio.Task[None] | None = None
        self._last: asyncio.Task[None] | None = None
        self._final: PendingWrite | None = None  # the write that carries the notice
        self._aborting: asyncio.Task[bool] | None = None
        self._receipt: PushReceipt | None = None
        self._started_s = 0.0

    @property
    def num_missing(self) -> int:
        """Blocks still to be pushed."""
        return len(self.ticket.block_ids) - self._num_pushed

    def push(self, block_ids: Sequence[int]) -> None:
        """Send the next finished blocks: our ids, in table order; never waits. An empty list is no effect.

        Raises:
            ValueError: More blocks than the ticket has, or an id that is not ours.
            PushFailed: Aborted, or the ticket has expired; nothing of this call is written.
            PeerDown, LimitReached, ConnectorClosed: As `KVConnector.submit`.
        """
        if self._aborting is not None:
            raise PushFailed("the session has been aborted")
        if not block_ids:
            return
        num_blocks = self._connector.pool.num_blocks
        if not all(0 <= block_id < num_blocks for block_id in block_ids):
            raise ValueError(f"a block is not one of our {num_blocks}")
        if len(block_ids) > self.num_missing:
            raise ValueError(f"{len(block_ids)} blocks for a ticket that lacks {self.num_missing}")
        if self._clock() >= self.ticket.expires_at_s:
            raise PushFailed("the ticket expired during the push")
        for write in self._writes:
            if write.done.done() and (error := write.done.exception()) is not None:
                raise PushFailed(f"an earlier write failed: {error}") from error
        if not self._num_pushed:
            self._started_s = time.monotonic()
        local = tuple(block_ids)
        remote = self.ticket.block_ids[self._num_pushed : self._num_pushed + len(local)]
        is_last = len(local) == self.num_missing
        if not is_last:
            self._submit(local, remote)
        self._num_pushed += len(local)
        self._hashing = _start(self._hash(self._hashing, local))
        if is_last:
            self._last = _start(self._send_last(self._hashing, local, remote))

    async def finish(self) -> PushReceipt:
        """Wait until everything has landed and the notice is out; idempotent. A ticket without blocks has none.

        Raises:
            ValueError: Blocks are missing.
            PushFailed: A write did not land; its cause is PeerDown, TransferTimeout, ... Then `abort`.
        """
        if self.num_missing:
            raise ValueError(f"{self.num_missing} blocks have not been pushed")
        if self._last is not None:
            try:
                await asyncio.shield(self._last)
            except TransferError as error:
                raise PushFailed(f"the push failed: {error}") from error
            except asyncio.CancelledError:
                if self._last.cancelled():
                    raise PushFailed("the session has been aborted") from None
                raise
        if self._receipt is None:
            self._receipt = self._sum_up()
            self._on_finished(self._receipt)
        return self._receipt

    async def abort(self, reason: AbortReason) -> bool:
        """Stop; once no write is live, tell the receiver so. Idempotent; waits as long as the fences take.

        Returns:
            True where the receiver has been told, or knows by the notice of a push that was complete.
        """
        if self._aborting is None:
            self._aborting = asyncio.create_task(self._abort(reason))
        return await asyncio.shield(self._aborting)

    async def settled(self) -> None:
        """Returns when no write of this session is live: the source blocks may be reused. Has no limit of its own."""
        if self._last is not None:
            await asyncio.wait([self._last])  # it may be about to submit
        fences = [write.fence for write in self._writes]
        if fences:
            await asyncio.wait(fences)

    def _submit(self, local: tuple[int, ...], remote: tuple[int, ...], notification: bytes = b"") -> PendingWrite:
        pending = self._connector.submit(
            self.ticket.receiver, local, remote, notification=notification, timeout_s=self._write_timeout_s
        )
        self._writes.append(pending)
        return pending

    async def _hash(self, before: asyncio.Task[None] | None, block_ids: tuple[int, ...]) -> None:
        if before is not None:
            await before
        await _update_digest(self._digest, self._connector.pool, block_ids)

    async def _send_last(self, hashing: asyncio.Task[None], local: tuple[int, ...], remote: tuple[int, ...]) -> None:
        await hashing
        for write in self._writes:
            await asyncio.shield(write.done)
        notice = Notice(self.ticket.nonce, NoticeKind.DONE, len(self.ticket.block_ids), self._digest.finish())
        self._final = self._submit(local, remote, notice.sign(self._key))
        await asyncio.shield(self._final.done)

    async def _abort(self, reason: AbortReason) -> bool:
        tasks = [task for task in (self._hashing, self._last) if task is not None]
        for task in tasks:
            task.cancel()  # no effect on one that is done
        if tasks:
            await asyncio.wait(tasks)
        await self.settled()
        if self._final is not None and self._final.fence.result() is Fence.DONE:
            return True  # its notice went with it
        self._on_aborted(reason)
        notice = Notice(self.ticket.nonce, NoticeKind.ABORTED, reason=reason)
        try:
            async with asyncio.timeout(NOTICE_TIMEOUT_S):
                await self._connector.notify(self.ticket.receiver, notice.sign(self._key))
        except (TransferError, TimeoutError):
            return False
        return True

    def _sum_up(self) -> PushReceipt:
        receipts = [write.done.result() for write in self._writes]
        return PushReceipt(
            num_bytes=sum(receipt.num_bytes for receipt in receipts),
            num_blocks=sum(receipt.num_blocks for receipt in receipts),
            num_descriptors=sum(receipt.num_descriptors for receipt in receipts),
            num_writes=len(receipts),
            seconds=time.monotonic() - self._started_s if receipts else 0.0,
        )


class HandoffReceiver:
    """Issues landings and keeps the ledger of what may still be written: one a decode replica."""

    def __init__(
        self,
        connector: KVConnector,
        sealer: TicketSealer,
        *,
        weights_digest: str,
        generations_of: Callable[[tuple[int, ...]], tuple[int, ...]],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        nonces: Callable[[], bytes] = lambda: os.urandom(NONCE_BYTES),
    ) -> None:
        """
        Args:
            generations_of: Present generations of our blocks, in the order of the ids given.
            clock: Unix time in seconds, for the expiry; `monotonic` measures ages.
            nonces: Never the same twice under one transfer key, which the sealer holds.
        """
        self.connector = connector
        self.ledger = ReservationLedger(monotonic)
        self.generations_of = generations_of
        self._sealer = sealer
        self._weights_digest = weights_digest
        self._clock = clock
        self._nonces = nonces
        self._tasks: set[asyncio.Task[None]] = set()
        self._landed = [0, 0]  # bytes, blocks
        self._forged_notices = 0
        self._sender_aborts: Counter[str] = Counter()

    def issue(
        self,
        *,
        request_id: str,
        zone: str,
        epoch: int,
        block_ids: Sequence[int],
        generations: Sequence[int],
        first_missing_block: int,
        num_prompt_tokens: int,
        lifetime_s: float,
        sender: str = "",
    ) -> Landing:
        """Seal a ticket for reserved blocks: only those to be written, in table order.

        `sender`: agent name of the prefill replica, where it is known and connected. The ticket is then good for
        that incarnation only, and its death counts as a fence.

        Raises:
            ValueError: The parts do not make a ticket.
            LimitReached: Too many handoffs are open.
            TransferError: A block may still be written under an earlier ticket.
        """
        ticket = Ticket(
            request_id=request_id,
            zone=zone,
            epoch=epoch,
            receiver=self.connector.name,
            block_ids=tuple(block_ids),
            generations=tuple(generations),
            first_missing_block=first_missing_block,
            num_prompt_tokens=num_prompt_tokens,
            layout_fingerprint=self.connector.pool.layout.fingerprint(),
            weights_digest=self._weights_digest,
            nonce=self._nonces(),
            expires_at_s=self._clock() + lifetime_s,
            sender=sender,
        )
        self.ledger.open(ticket.nonce, request_id, ticket.block_ids, ticket.generations)
        return Landing(self, self._sealer.seal(ticket))

    def stats(self) -> ReceiverStats:
        landed_bytes, landed_blocks = self._landed
        return ReceiverStats(
            landed_bytes=landed_bytes,
            landed_blocks=landed_blocks,
            forged_notices=self._forged_notices,
            sender_aborts={reason.name.lower(): self._sender_aborts[reason.name] for reason in AbortReason},
            ledger=self.ledger.stats(),
        )

    async def close(self) -> None:
        """Stop waiting for fences; what is in quarantine stays there until the process ends."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # Called by landings.

    def run(self, job: Coroutine[Any, Any, None]) -> None:
        task = _start(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def count_landed(self, num_bytes: int, num_blocks: int) -> None:
        self._landed[0] += num_bytes
        self._landed[1] += num_blocks

    def count_forged(self) -> None:
        self._forged_notices += 1

    def count_abort(self, reason: AbortReason) -> None:
        self._sender_aborts[reason.name] += 1


class Landing:
    """One ticket as its issuer sees it. Ends in `landed` (verified), or in `release_when_fenced`."""

    def __init__(self, receiver: HandoffReceiver, sealed: SealedTicket) -> None:
        self.ticket = sealed.ticket
        self.sealed = sealed.sealed
        self._key = sealed.transfer_key
        self._receiver = receiver
        self._ledger = receiver.ledger
        self._connector = receiver.connector
        self._sender = sealed.ticket.sender

    @property
    def is_fenced(self) -> bool:
        """True where no write under this ticket can land any more."""
        return self._ledger.is_fenced(self.ticket.nonce)

    def set_sender(self, peer: str) -> None:
        """Whose death is a fence, where the ticket names nobody. Takes effect at the next wait."""
        self._sender = peer

    async def landed(self, timeout_s: float) -> LandingReceipt:
        """Wait for the notice, then verify. Only after this returns may the request decode.

        A ticket without blocks has landed at once. Cancelling the wait leaves the blocks in danger:
        `release_when_fenced` them.

        Raises:
            LandingRefused: With its fault, counted. Put the blocks into quarantine, then `release_when_fenced`.
            ConnectorClosed: Ours is closing; the blocks are in danger as after a cancel.
        """
        ticket = self.ticket
        if not ticket.block_ids:
            self._end()
            return LandingReceipt(0, 0, 0.0, 0.0)
        started_s = time.monotonic()
        try:
            notice = await self._next_end(timeout_s)
        except TimeoutError:
            raise self._refuse(HandoffFault.TIMEOUT, f"no notice within {timeout_s} s") from None
        if notice is None:
            raise self._refuse(HandoffFault.PEER_DOWN, self._sender)
        if notice.kind is NoticeKind.ABORTED:
            raise self._refuse(HandoffFault.ABORTED, notice.reason.name.lower())
        arrived_s = time.monotonic()
        await self._verify(notice)
        self._end()
        num_bytes = len(ticket.block_ids) * self._connector.pool.layout.block_bytes
        self._receiver.count_landed(num_bytes, len(ticket.block_ids))
        return LandingReceipt(num_bytes, len(ticket.block_ids), arrived_s - started_s, time.monotonic() - arrived_s)

    def release_when_fenced(self, release: Callable[[], None], fault: HandoffFault | None = None) -> None:
        """The blocks are in the engine's quarantine: run `release` once when no write can land in them.

        Runs it at once where that is so already. `fault`: why, where `landed` has not already said (CANCELLED,
        NOT_SENT).

        Raises:
            TransferError: The handoff has landed, or was given up before.
        """
        self._ledger.quarantine(self.ticket.nonce, self._releaser(release))
        if fault is not None:
            self._ledger.fault(fault)
        if not self.is_fenced:
            self._receiver.run(self._await_fence())

    def confirm_fence(self) -> None:
        """The sender said over a trusted channel that it has no write live and will post none. Idempotent.

        Also right where the ticket has verifiably never left, or was refused.
        """
        self._ledger.fence(self.ticket.nonce, FenceKind.CONFIRMED)

    async def _verify(self, notice: Notice) -> None:
        """
        Raises:
            LandingRefused
        """
        ticket = self.ticket
        if notice.num_blocks != len(ticket.block_ids):
            detail = f"{notice.num_blocks} of {len(ticket.block_ids)} blocks"
            raise self._refuse(HandoffFault.COUNT_MISMATCH, detail)
        self._require_generations()
        pool = self._connector.pool
        digest = BlockDigest(self._key, ticket.nonce, ticket.binding(), pool.layout.block_bytes)
        await _update_digest(digest, pool, ticket.block_ids)
        if not hmac.compare_digest(digest.finish(), notice.digest):
            raise self._refuse(HandoffFault.DIGEST_MISMATCH, "")
        self._require_generations()  # the digest may have run on another thread: still the same blocks

    def _require_generations(self) -> None:
        if tuple(self._receiver.generations_of(self.ticket.block_ids)) != self.ticket.generations:
            raise self._refuse(HandoffFault.STALE_GENERATION, "")

    def _refuse(self, fault: HandoffFault, detail: str) -> LandingRefused:
        self._ledger.fault(fault)
        return LandingRefused(fault, detail, is_fenced=self.is_fenced)

    def _end(self) -> None:
        self._connector.forget(self.ticket.nonce)
        self._ledger.land(self.ticket.nonce)

    def _releaser(self, release: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            self._connector.forget(self.ticket.nonce)
            release()

        return run

    async def _await_fence(self) -> None:
        while not self.is_fenced:
            with contextlib.suppress(TimeoutError):
                await self._next_end(FENCE_WAIT_S)

    async def _next_end(self, timeout_s: float) -> Notice | None:
        """What ends the sender's work: its notice, or None where its incarnation is gone. Either is a fence.

        Raises:
            TimeoutError: Neither came; the wait may be repeated.
        """
        notice = _start(self._next_notice(timeout_s))
        gone = self._watch_sender()
        try:
            waits: list[asyncio.Future[Any]] = [notice] if gone is None else [notice, gone]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            # A watch that fails (we disconnected, we are closing) says nothing about the peer: no fence.
            if gone is not None and _has_result(gone) and not _has_result(notice):
                self._ledger.fence(self.ticket.nonce, FenceKind.PEER_GONE)
                return None
            return await notice
        finally:
            notice.cancel()
            if gone is not None:
                gone.cancel()

    async def _next_notice(self, timeout_s: float) -> Notice:
        """The next authentic notice; others are counted and passed over. The fence is noted as it is read."""
        while True:
            message = await self._connector.expect(self.ticket.nonce, timeout_s=timeout_s)
            try:
                notice = Notice.open(self._key, self.ticket.nonce, message)
            except ForgedNotice:
                self._receiver.count_forged()
                continue
            if notice.kind is NoticeKind.ABORTED:
                self._receiver.count_abort(notice.reason)
            self._ledger.fence(self.ticket.nonce, FenceKind.NOTICE)
            return notice

    def _watch_sender(self) -> asyncio.Future[None] | None:
        if not self._sender:
            return None
        try:
            return self._connector.peer_gone(self._sender)
        except TransferError:
            return None  # never connected: only its notice can tell


def _has_result(future: asyncio.Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


async def _update_digest(digest: BlockDigest, pool: KVPool, block_ids: Sequence[int]) -> None:
    """Take blocks of a pool into a digest; off the event loop where they are many."""

    def update() -> None:
        digest.update(pool.block(block_id) for block_id in block_ids)

    if len(block_ids) * pool.layout.block_bytes > OFFLOAD_BYTES:
        await asyncio.to_thread(update)
    else:
        update()


def _start(job: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
    """A task whose failure is read from the task, or not at all."""
    task = asyncio.create_task(job)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task
