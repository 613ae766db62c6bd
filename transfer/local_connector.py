"""A connector inside one process, with faults on demand: for tests and simulations, never for serving.

All connectors of one `LocalFabric` see each other. Events happen in the order of their time, then of their
creation; with a clock of the caller's they happen only inside `pump`, so a run repeats exactly.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count

from transfer.handshake import Handshake, new_agent_name
from transfer.inbox import NotificationInbox
from transfer.protocol import (
    MAX_LIVE_WRITES,
    MAX_PEERS,
    ConnectorClosed,
    ConnectorStats,
    Fence,
    KVPool,
    LimitReached,
    PeerDown,
    PendingWrite,
    TransferError,
    TransferReceipt,
    TransferTimeout,
    check_notification,
    check_write,
    count_extents,
)


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one write. `corrupt_block`: position in the write whose first byte is flipped."""

    delay_s: float = 0.0
    notification_delay_s: float = 0.0
    drops_notification: bool = False
    duplicates_notification: bool = False
    corrupt_block: int | None = None
    fails: bool = False  # the transport raises; nothing lands


NO_FAULT = Fault()


@dataclass(slots=True, eq=False)
class _Flight:
    """One write between its submission and its fence."""

    sender: LocalConnector
    peer: str
    local: tuple[int, ...]
    remote: tuple[int, ...]
    notification: bytes
    fault: Fault
    pending: PendingWrite
    started_s: float
    is_overdue: bool = False
    is_over: bool = False


class LocalFabric:
    """The network: who is alive, who is stalled, what is in flight, what goes wrong next.

    `faults` are used up, one a write, in order of submission. Without a `clock` the fabric runs in real time on
    the running loop; with one, call `pump` after moving it.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or time.monotonic
        self._is_manual = clock is not None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = count()
        self._connectors: dict[str, LocalConnector] = {}
        self._dead: set[str] = set()
        self._stalled: set[str] = set()
        self._parked: list[_Flight] = []
        self._flights: set[_Flight] = set()
        self.faults: deque[Fault] = deque()

    @property
    def now_s(self) -> float:
        return self._clock()

    def schedule(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._sequence), action))
        if not self._is_manual:
            asyncio.get_running_loop().call_later(delay_s, self.pump)

    def pump(self) -> None:
        """Run what is due, including what that makes due."""
        while self._events and self._events[0][0] <= self.now_s:
            heapq.heappop(self._events)[2]()

    def stall(self, name: str) -> None:
        """Writes into `name` stay under way and its notifications stay away, until `resume`."""
        self._stalled.add(name)

    def resume(self, name: str) -> None:
        self._stalled.discard(name)
        parked, self._parked = self._parked, []
        for flight in parked:
            self._land(flight)

    def kill(self, name: str) -> None:
        """The process of `name` ends: what it was sending never lands, what is sent to it fails."""
        self._dead.add(name)
        for flight in [item for item in self._flights if name in (item.sender.name, item.peer)]:
            self._lose(flight)
        for connector in self._connectors.values():
            connector.lose_peer(name)

    def is_dead(self, name: str) -> bool:
        return name in self._dead

    def may_write(self, receiver: str) -> set[int]:
        """Blocks of `receiver` into which a write is under way: the ground truth of every test of fences."""
        return {block for flight in self._flights if flight.peer == receiver for block in flight.remote}

    def add(self, connector: LocalConnector) -> None:
        self._connectors[connector.name] = connector

    def find(self, name: str) -> LocalConnector | None:
        return None if name in self._dead else self._connectors.get(name)

    def launch(self, flight: _Flight, timeout_s: float) -> None:
        flight.fault = self.faults.popleft() if self.faults else NO_FAULT
        self._flights.add(flight)
        self.schedule(flight.fault.delay_s, lambda: self._land(flight))
        self.schedule(timeout_s, lambda: flight.sender.expire(flight))

    def deliver(self, receiver: str, message: bytes) -> None:
        target = self.find(receiver)
        if target is not None:
            target.inbox.deliver(message)

    def _land(self, flight: _Flight) -> None:
        if flight.is_over:
            return
        if flight.peer in self._stalled:
            self._parked.append(flight)
            return
        self._flights.discard(flight)
        if flight.fault.fails:
            flight.sender.finish(flight, Fence.FAILED)
            return
        target = self._connectors[flight.peer]
        for position, (source, goal) in enumerate(zip(flight.local, flight.remote, strict=True)):
            landed = target.pool.block(goal)
            landed[:] = flight.sender.pool.block(source)
            if position == flight.fault.corrupt_block:
                landed[0] ^= 1
        flight.sender.finish(flight, Fence.DONE)
        self._notify(flight)

    def _notify(self, flight: _Flight) -> None:
        if not flight.notification or flight.fault.drops_notification:
            return
        for _ in range(2 if flight.fault.duplicates_notification else 1):
            self.schedule(flight.fault.notification_delay_s, lambda: self.deliver(flight.peer, flight.notification))

    def _lose(self, flight: _Flight) -> None:
        self._flights.discard(flight)
        flight.sender.finish(flight, Fence.PEER_GONE)


@dataclass(slots=True)
class _Counts:
    writes_posted: int = 0
    writes_done: int = 0
    writes_failed: int = 0
    writes_timed_out: int = 0
    late_fences: int = 0
    bytes_written: int = 0
    blocks_written: int = 0
    descriptors_written: int = 0
    peers_lost: int = 0


class LocalConnector:
    """`KVConnector` over a `LocalFabric`."""

    def __init__(
        self,
        role: str,
        pool: KVPool,
        fabric: LocalFabric,
        *,
        compatibility: Mapping[str, str] | None = None,
    ) -> None:
        self._name = new_agent_name(role)
        self._pool = pool
        self._fabric = fabric
        self._handshake = Handshake.of(self._name, pool, compatibility or {}, b"local")
        self._peers: dict[str, int] = {}  # name -> num_blocks
        self._gone: set[str] = set()
        self._live: set[_Flight] = set()
        self._watchers: dict[str, list[asyncio.Future[None]]] = {}
        self._counts = _Counts()
        self._is_closed = False
        self.inbox = NotificationInbox()
        fabric.add(self)

    @property
    def name(self) -> str:
        return self._name

    @property
    def pool(self) -> KVPool:
        return self._pool

    def handshake(self) -> bytes:
        return self._handshake.encode()

    async def connect(self, handshake: bytes) -> str:
        self._require_open()
        theirs = Handshake.decode(handshake)
        self._handshake.require_compatible(theirs)
        if theirs.name in self._gone or self._fabric.find(theirs.name) is None:
            raise PeerDown(f"{theirs.name} is gone")
        if theirs.name not in self._peers and len(self._peers) >= MAX_PEERS:
            raise LimitReached(f"{MAX_PEERS} peers are connected")
        self._peers[theirs.name] = theirs.num_blocks
        return theirs.name

    async def disconnect(self, peer: str) -> None:
        if self._peers.pop(peer, None) is None:
            return
        fences = [flight.pending.fence for flight in self._live if flight.peer == peer]
        if fences:
            await asyncio.wait(fences)
        for future in self._watchers.pop(peer, []):
            if not future.done():
                future.set_exception(PeerDown(f"{peer} has been disconnected"))

    def is_peer_alive(self, peer: str) -> bool:
        return peer in self._peers

    def peer_gone(self, peer: str) -> asyncio.Future[None]:
        self._require_open()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if peer in self._gone:
            future.set_result(None)
        elif peer in self._peers:
            self._watchers.setdefault(peer, []).append(future)
        else:
            raise PeerDown(f"{peer} was never connected")
        return future

    def declare_gone(self, peer: str) -> None:
        self.lose_peer(peer)

    def submit(
        self,
        peer: str,
        local_blocks: Sequence[int],
        remote_blocks: Sequence[int],
        *,
        notification: bytes = b"",
        timeout_s: float,
    ) -> PendingWrite:
        self._require_open()
        num_remote_blocks = self._require_peer(peer)
        local, remote = tuple(local_blocks), tuple(remote_blocks)
        check_write(self._pool, num_remote_blocks, local, remote, notification)
        if len(self._live) >= MAX_LIVE_WRITES:
            raise LimitReached(f"{MAX_LIVE_WRITES} writes are live")
        pending = PendingWrite.create(asyncio.get_running_loop())
        flight = _Flight(self, peer, local, remote, notification, NO_FAULT, pending, started_s=self._fabric.now_s)
        self._live.add(flight)
        self._counts.writes_posted += 1
        self._fabric.launch(flight, timeout_s)
        return pending

    async def write(
        self,
        peer: str,
        local_blocks: Sequence[int],
        remote_blocks: Sequence[int],
        *,
        notification: bytes = b"",
        timeout_s: float,
    ) -> TransferReceipt:
        pending = self.submit(peer, local_blocks, remote_blocks, notification=notification, timeout_s=timeout_s)
        return await pending.done

    async def notify(self, peer: str, notification: bytes) -> None:
        self._require_open()
        self._require_peer(peer)
        check_notification(notification)
        self._fabric.schedule(0.0, lambda: self._fabric.deliver(peer, notification))

    async def expect(self, nonce: bytes, *, timeout_s: float) -> bytes:
        self._require_open()
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as scope:
            self._fabric.schedule(timeout_s, lambda: _expire(scope, loop))
            return await self.inbox.take(nonce)

    def forget(self, nonce: bytes) -> None:
        self.inbox.forget(nonce)

    async def close(self, *, timeout_s: float = 5.0) -> bool:
        self._is_closed = True
        self.inbox.close()
        for future in chain.from_iterable(self._watchers.values()):
            if not future.done():
                future.set_exception(ConnectorClosed(f"{self._name} is closed"))
        fences = [flight.pending.fence for flight in self._live]
        if fences:
            await asyncio.wait(fences, timeout=timeout_s)
        return not self._live

    def stats(self) -> ConnectorStats:
        counts, inbox = self._counts, self.inbox.counts
        return ConnectorStats(
            writes_posted=counts.writes_posted,
            writes_done=counts.writes_done,
            writes_failed=counts.writes_failed,
            writes_timed_out=counts.writes_timed_out,
            late_fences=counts.late_fences,
            bytes_written=counts.bytes_written,
            blocks_written=counts.blocks_written,
            descriptors_written=counts.descriptors_written,
            notifications=inbox.received,
            notifications_early=inbox.early,
            notifications_duplicate=inbox.duplicate,
            notifications_late=inbox.late,
            notifications_refused=inbox.refused,
            peers_lost=counts.peers_lost,
            peers=len(self._peers),
            live_writes=len(self._live),
            overdue_writes=sum(flight.is_overdue for flight in self._live),
        )

    # Called by the fabric.

    def finish(self, flight: _Flight, fence: Fence) -> None:
        flight.is_over = True
        self._live.discard(flight)
        self._counts.late_fences += flight.is_overdue
        if fence is Fence.DONE:
            self._count_done(flight)
        else:
            self._counts.writes_failed += 1
            kind = PeerDown if fence is Fence.PEER_GONE else TransferError
            _fail(flight.pending.done, kind(f"{flight.peer}: the write ended as {fence}"))
        if not flight.pending.fence.done():
            flight.pending.fence.set_result(fence)

    def expire(self, flight: _Flight) -> None:
        if flight.is_over:
            return
        flight.is_overdue = True
        self._counts.writes_timed_out += 1
        _fail(flight.pending.done, TransferTimeout(f"{flight.peer} is stalled", flight.pending.fence))

    def lose_peer(self, peer: str) -> None:
        if self._peers.pop(peer, None) is None:
            return
        self._counts.peers_lost += 1
        self._gone.add(peer)
        for future in self._watchers.pop(peer, []):
            if not future.done():
                future.set_result(None)

    def _count_done(self, flight: _Flight) -> None:
        receipt = TransferReceipt(
            num_bytes=len(flight.local) * self._pool.layout.block_bytes,
            num_blocks=len(flight.local),
            num_descriptors=count_extents(flight.local, flight.remote),
            seconds=self._fabric.now_s - flight.started_s,
        )
        self._counts.writes_done += 1
        self._counts.bytes_written += receipt.num_bytes
        self._counts.blocks_written += receipt.num_blocks
        self._counts.descriptors_written += receipt.num_descriptors
        if not flight.pending.done.done():
            flight.pending.done.set_result(receipt)

    def _require_open(self) -> None:
        if self._is_closed:
            raise ConnectorClosed(f"{self._name} is closed")

    def _require_peer(self, peer: str) -> int:
        if self._fabric.is_dead(self._name):
            raise PeerDown(f"{self._name} itself is dead")
        if peer not in self._peers:
            raise PeerDown(f"{peer} is not connected")
        return self._peers[peer]


def _fail(future: asyncio.Future[TransferReceipt], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _expire(scope: asyncio.Timeout, loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(RuntimeError):  # the wait is over already
        scope.reschedule(loop.time())
