"""The connector over NIXL (UCX): DRAM or VRAM, one host or many. The only module that imports nixl.

One owner thread makes every NIXL call, because NIXL promises nothing to several; asyncio gets futures. It polls
every 50 us while a write is live, every 1 ms soon after an `expect`, every 20 ms when nothing is awaited. An idle agent
costs 1.4 % of a core: 0.3 this thread, 1.1 NIXL's own.

What NIXL does and we must live with: releasing a handle in progress does not cancel it (the bytes land later), so
a handle is released only after its fence; a peer that stalls stays in progress for ever, so deadlines are ours; a
dead peer shows as an exception from any call that concerns it, so peers somebody watches are sent heartbeats; a
forked child hangs: start processes by spawn.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import logging
import logging.config
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from transfer.handshake import Handshake, new_agent_name
from transfer.inbox import HEARTBEAT, NotificationInbox
from transfer.protocol import (
    MAX_LIVE_WRITES,
    MAX_PEERS,
    ConnectorClosed,
    ConnectorStats,
    Fence,
    HandshakeRefused,
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

logger = logging.getLogger(__name__)

LIVE_POLL_S = 50e-6
EXPECTING_POLL_S = 1e-3
IDLE_POLL_S = 20e-3
EXPECTING_HOT_S = 2.0  # how long after an `expect` its notification is polled for at EXPECTING_POLL_S
PROGRESS_DELAY_US = 100  # NIXL's own thread wakes at this interval, or as a socket has something; at 0 it spins
START_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 30.0
HEARTBEAT_INTERVAL_S = 0.5
# After a disconnect is seen, bytes already in our own socket buffers may still be copied into the pool by the
# progress thread: so long, and so many of our own turns, until the peer counts as gone.
PEER_SETTLE_S = 0.25
PEER_SETTLE_TURNS = 50
MAX_GONE_PEERS = 4096
MAX_COMMANDS_IN_TURN = 256
EXIT_DRAIN_S = 2.0

# Read by UCX when the agent is made. Without the first two a host that falls silent is not noticed for 100 s and
# more. An operator's own setting wins.
_TRANSPORT_SETTINGS = {
    "UCX_TCP_USER_TIMEOUT": "5s",
    "UCX_KEEPALIVE_INTERVAL": "2s",
    "UCX_LOG_LEVEL": "fatal",
    "NIXL_LOG_LEVEL": "FATAL",
}


_T = TypeVar("_T")


class NixlConnector:
    """`KVConnector` over NIXL. Construction starts the agent and registers the pool; it takes about a second."""

    def __init__(self, role: str, pool: KVPool, *, compatibility: Mapping[str, str] | None = None) -> None:
        """
        Args:
            role: First part of the agent's name.
            pool: Registered once; must outlive the process, or at least a `close` that returned True.
            compatibility: Named facts which a peer must share, besides the layout.

        Raises:
            TransferError: NIXL cannot be imported, or the agent cannot be made.
        """
        self._name = new_agent_name(role)
        self._pool = pool
        self._inbox = NotificationInbox()
        self._owner = _Owner(self._name, pool, self._inbox)
        metadata = self._owner.start()
        self._handshake = Handshake.of(self._name, pool, compatibility or {}, metadata)
        self._closing: asyncio.Task[bool] | None = None

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
        if theirs.name == self._name:
            raise HandshakeRefused("this is our own handshake")
        self._handshake.require_compatible(theirs)
        return await self._call(lambda: self._owner.connect(theirs), CONNECT_TIMEOUT_S)

    async def disconnect(self, peer: str) -> None:
        if self._closing is not None:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._owner.commands.put(lambda: self._owner.disconnect(peer, future))
        await future

    def is_peer_alive(self, peer: str) -> bool:
        return self._owner.num_blocks_of(peer) is not None

    def peer_gone(self, peer: str) -> asyncio.Future[None]:
        self._require_open()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._owner.is_gone(peer):
            future.set_result(None)
        elif not self._owner.knows(peer):
            raise PeerDown(f"{peer} was never connected")
        else:
            self._owner.commands.put(lambda: self._owner.watch(peer, future))
        return future

    def declare_gone(self, peer: str) -> None:
        self._owner.commands.put(lambda: self._owner.lose(peer))

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
        num_remote_blocks = self._owner.num_blocks_of(peer)
        if num_remote_blocks is None:
            raise PeerDown(f"{peer} is not connected")
        local, remote = tuple(local_blocks), tuple(remote_blocks)
        check_write(self._pool, num_remote_blocks, local, remote, notification)
        if self._owner.num_live >= MAX_LIVE_WRITES:
            raise LimitReached(f"{MAX_LIVE_WRITES} writes are live")
        order = _Order(
            peer=peer,
            local=local,
            remote=remote,
            notification=notification,
            deadline_s=time.monotonic() + timeout_s,
            pending=PendingWrite.create(asyncio.get_running_loop()),
        )
        self._owner.commands.put(lambda: self._owner.post(order))
        return order.pending

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
        check_notification(notification)
        await self._call(lambda: self._owner.notify(peer, notification), CONNECT_TIMEOUT_S)

    async def expect(self, nonce: bytes, *, timeout_s: float) -> bytes:
        self._require_open()
        self._owner.commands.put(self._owner.expect_soon)
        async with asyncio.timeout(timeout_s):
            return await self._inbox.take(nonce)

    def forget(self, nonce: bytes) -> None:
        self._inbox.forget(nonce)

    async def close(self, *, timeout_s: float = 5.0) -> bool:
        if self._closing is None:
            self._inbox.close()
            self._closing = asyncio.ensure_future(asyncio.to_thread(self._owner.stop, timeout_s))
        return await asyncio.shield(self._closing)

    def stats(self) -> ConnectorStats:
        return self._owner.stats()

    def _require_open(self) -> None:
        if self._closing is not None:
            raise ConnectorClosed(f"{self._name} is closed")
        if self._owner.failure is not None:
            raise self._owner.failure

    async def _call(self, action: Callable[[], _T], timeout_s: float) -> _T:
        """Run `action` on the owner thread."""
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._owner.commands.put(lambda: _answer(future, action))
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise TransferError(f"the transport did not answer within {timeout_s} s") from None


@dataclass(frozen=True, slots=True)
class _Order:
    """A write as asked for, before NIXL knows of it."""

    peer: str
    local: tuple[int, ...]
    remote: tuple[int, ...]
    notification: bytes
    deadline_s: float
    pending: PendingWrite


@dataclass(slots=True, eq=False)
class _LiveWrite:
    """A posted write; `handle` is released only after its fence."""

    order: _Order
    handle: int
    started_s: float
    is_overdue: bool = False
    error: TransferError | None = None  # raised when it was posted; the fence may still be to come


@dataclass(slots=True, eq=False)
class _Peer:
    name: str
    num_blocks: int
    targets: int  # prepared descriptors of all its blocks
    watchers: list[asyncio.Future[None]] = field(default_factory=list)
    leavers: list[asyncio.Future[None]] = field(default_factory=list)  # `disconnect` calls
    next_heartbeat_s: float = 0.0
    lost_s: float | None = None
    turns_since_lost: int = 0

    @property
    def takes_writes(self) -> bool:
        return self.lost_s is None and not self.leavers


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
    heartbeats_sent: int = 0
    peers_lost: int = 0


def _import_bindings() -> Any:
    """`nixl._bindings`. When first imported, nixl configures logging, and that closes every handler of the process:
    Ray Serve's would drop each later line without a word. So it finds nothing to configure with."""
    configure, raises = logging.config.dictConfig, logging.raiseExceptions
    logging.config.dictConfig = lambda config: None
    try:
        import nixl._bindings as bindings
    finally:
        logging.config.dictConfig = configure
        logging.raiseExceptions = raises
    return bindings


class _Agent:
    """The calls of NIXL that we use, by its bindings: its own wrapper fixes the progress thread to a busy loop,
    and releases handles when they are garbage-collected, whatever their state. Handles here are plain integers.
    """

    def __init__(self, name: str) -> None:
        for key, value in _TRANSPORT_SETTINGS.items():
            os.environ.setdefault(key, value)
        bindings = _import_bindings()
        logging.getLogger("nixl").setLevel(logging.ERROR)  # where somebody had imported it before us
        self._bindings: Any = bindings
        self._kinds = {"DRAM": bindings.DRAM_SEG, "VRAM": bindings.VRAM_SEG}
        self.disconnect_error: type[Exception] = bindings.nixlRemoteDisconnectError
        config = bindings.nixlAgentConfig()
        config.useProgThread = True  # at both ends, or the peer's writes stay in progress
        config.useListenThread = False
        config.pthrDelay = PROGRESS_DELAY_US
        config.captureTelemetry = True  # descriptors of each transfer; not the exporter, which listens
        config.syncMode = bindings.NIXL_THREAD_SYNC_NONE
        self._agent: Any = bindings.nixlAgent(name, config)
        self._agent.createBackend("UCX", {})

    def register(self, address: int, num_bytes: int, device_id: int, memory: str) -> object:
        region = self._bindings.nixlRegDList(self._kinds[memory], [(address, num_bytes, device_id, "")])
        self._agent.registerMem(region, [])
        return region

    def deregister(self, region: object) -> None:
        self._agent.deregisterMem(region, [])

    def metadata(self) -> bytes:
        return bytes(self._agent.getLocalMD())

    def add_peer(self, metadata: bytes) -> str:
        return bytes(self._agent.loadRemoteMD(metadata)).decode()

    def remove_peer(self, name: str) -> None:
        self._agent.invalidateRemoteMD(name)

    def prepare(self, agent_name: str, rows: NDArray[np.uint64], memory: str) -> int:
        """`agent_name`: whose memory; empty means ours."""
        whose = agent_name or self._bindings.NIXL_INIT_AGENT
        return int(self._agent.prepXferDlist(whose, self._kinds[memory], rows, []))

    def release_prepared(self, prepared: int) -> None:
        self._agent.releasedDlistH(prepared)

    def make_write(
        self,
        sources: int,
        local: NDArray[np.int32],
        targets: int,
        remote: NDArray[np.int32],
        notification: bytes,
    ) -> int:
        operation = self._bindings.NIXL_WRITE
        return int(self._agent.makeXferReq(operation, sources, local, targets, remote, notification, [], False))

    def post(self, write: int) -> bool:
        """True where the write was done at once. With shared memory the bytes are copied inside this call."""
        return bool(self._agent.postXferReq(write, b"") == self._bindings.NIXL_SUCCESS)

    def is_done(self, write: int) -> bool:
        """Sends the write's notification as it finds the write done."""
        return bool(self._agent.getXferStatus(write) == self._bindings.NIXL_SUCCESS)

    def num_descriptors(self, write: int) -> int:
        return int(self._agent.getXferTelemetry(write).descCount)

    def release_write(self, write: int) -> None:
        self._agent.releaseXferReq(write)

    def notify(self, name: str, message: bytes) -> None:
        self._agent.genNotif(name, message)

    def new_notifications(self) -> list[bytes]:
        return [bytes(message) for messages in self._agent.getNotifs({}, []).values() for message in messages]


class _Owner:
    """The thread that owns the agent. Everything that touches NIXL runs on it, as a command or as a poll.

    Other threads put commands, and read the small facts at the end of the class.
    """

    def __init__(self, name: str, pool: KVPool, inbox: NotificationInbox) -> None:
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.failure: TransferError | None = None
        self._name = name
        self._pool = pool
        self._inbox = inbox
        self._live: list[_LiveWrite] = []
        self._peers: dict[str, _Peer] = {}
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._counts = _Counts()
        self._expecting_until_s = 0.0
        self._stop_by_s: float | None = None
        self._is_clean = False
        self._started: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"transfer-{name}", daemon=True)

    def start(self) -> bytes:
        """Returns the agent's metadata."""
        self._thread.start()
        try:
            outcome = self._started.get(timeout=START_TIMEOUT_S)
        except queue.Empty:
            raise TransferError(f"NIXL did not start within {START_TIMEOUT_S} s") from None
        if isinstance(outcome, BaseException):
            raise TransferError(f"NIXL cannot be used: {outcome}") from outcome
        atexit.register(self.stop, EXIT_DRAIN_S)
        return outcome

    def stop(self, timeout_s: float) -> bool:
        """Drain and release; blocks its caller. False where something had to be left alone."""
        atexit.unregister(self.stop)
        self.commands.put(lambda: self._begin_stop(timeout_s))
        self._thread.join()
        return self._is_clean

    # The thread.

    def _run(self) -> None:
        try:
            self._open_agent()
        except BaseException as error:
            self._started.put(error)
            return
        self._started.put(self._agent.metadata())
        try:
            while not self._may_stop():
                self._run_commands()
                self._poll()
            self._close_agent()
        except Exception as error:
            self._break(error)

    def _open_agent(self) -> None:
        self._agent = _Agent(self._name)
        self._disconnect_error = self._agent.disconnect_error
        pool = self._pool
        size = pool.num_blocks * pool.layout.block_bytes
        self._registration = self._agent.register(pool.address, size, pool.device_id, pool.memory)
        rows = _descriptor_row(pool.address, pool.layout.block_bytes, pool.device_id, pool.num_blocks)
        self._sources = self._agent.prepare("", rows, pool.memory)

    def _run_commands(self) -> None:
        """Wait for a command as long as a poll may wait; run what is there, up to a limit."""
        with contextlib.suppress(queue.Empty):
            self.commands.get(timeout=self._poll_interval_s())()
            for _ in range(MAX_COMMANDS_IN_TURN):
                self.commands.get_nowait()()

    def _poll_interval_s(self) -> float:
        if self._live:
            return LIVE_POLL_S
        is_hot = self._inbox.has_waiters and time.monotonic() < self._expecting_until_s
        is_settling = any(peer.lost_s is not None for peer in self._peers.values())
        return EXPECTING_POLL_S if is_hot or is_settling else IDLE_POLL_S

    def _poll(self) -> None:
        now_s = time.monotonic()
        for message in self._agent.new_notifications():
            self._inbox.deliver(message)
        for write in list(self._live):
            self._poll_write(write, now_s)
        for peer in list(self._peers.values()):
            self._poll_peer(peer, now_s)

    def _require_open(self) -> None:
        """
        Raises:
            ConnectorClosed, or the failure that broke the agent
        """
        if self.failure is not None:
            raise self.failure
        if self._stop_by_s is not None:
            raise ConnectorClosed(f"{self._name} is closed")

    def _may_stop(self) -> bool:
        return self._stop_by_s is not None and (not self._live or time.monotonic() > self._stop_by_s)

    def _break(self, error: Exception) -> None:
        """A defect of ours or of NIXL: fail closed. No fence resolves, since nobody can tell any more."""
        logger.exception("the transfer agent %s is broken", self._name)
        self.failure = TransferError(f"{self._name} is broken: {error!r}")
        self._inbox.close()
        for write in self._live:
            _settle(write.order.pending.done, error=self.failure)
        self._leave_everything(self.failure)
        while self._stop_by_s is None:
            self.commands.get()()

    def _leave_everything(self, error: TransferError) -> None:
        """Waiters hear why. What is live keeps its memory: no destructor of the agent runs."""
        for peer in self._peers.values():
            for future in (*peer.watchers, *peer.leavers):
                _settle(future, error=error)
        for item in (self._agent, self._registration, self._pool):
            _make_immortal(item)

    def _begin_stop(self, timeout_s: float) -> None:
        if self._stop_by_s is None:
            self._stop_by_s = time.monotonic() + timeout_s

    def _close_agent(self) -> None:
        closed = ConnectorClosed(f"{self._name} is closed")
        if self._live:
            self._leave_everything(closed)
            return
        for peer in list(self._peers.values()):
            for future in (*peer.watchers, *peer.leavers):
                _settle(future, error=closed)
            self._drop(peer)
        with contextlib.suppress(Exception):
            self._agent.release_prepared(self._sources)
            self._agent.deregister(self._registration)
        del self._agent, self._registration
        self._is_clean = True

    # Commands.

    def connect(self, theirs: Handshake) -> str:
        """
        Raises:
            PeerDown, LimitReached, HandshakeRefused, ConnectorClosed
        """
        self._require_open()
        peer = self._peers.get(theirs.name)
        if theirs.name in self._gone or (peer is not None and peer.lost_s is not None):
            raise PeerDown(f"{theirs.name} is gone")
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                raise LimitReached(f"{MAX_PEERS} peers are connected")
            peer = self._add(theirs)
            self._peers[peer.name] = peer
        return peer.name

    def disconnect(self, name: str, future: asyncio.Future[None]) -> None:
        peer = self._peers.get(name)
        if peer is None or self.failure is not None:
            _settle(future, error=self.failure)
        else:
            peer.leavers.append(future)

    def watch(self, name: str, future: asyncio.Future[None]) -> None:
        peer = self._peers.get(name)
        if self.failure is not None:
            _settle(future, error=self.failure)
        elif peer is not None:
            peer.watchers.append(future)
        elif name in self._gone:
            _settle(future, None)
        else:
            _settle(future, error=PeerDown(f"{name} has been disconnected"))

    def lose(self, name: str) -> None:
        peer = self._peers.get(name)
        if peer is None:
            self._remember_gone(name)
        elif peer.lost_s is None:
            peer.lost_s = time.monotonic()
            self._counts.peers_lost += 1

    def notify(self, name: str, notification: bytes) -> None:
        """
        Raises:
            PeerDown, ConnectorClosed
        """
        self._require_open()
        peer = self._peers.get(name)
        if peer is None or peer.lost_s is not None:
            raise PeerDown(f"{name} is not connected")
        try:
            self._agent.notify(name, notification)
        except self._disconnect_error:
            self.lose(name)
            raise PeerDown(f"{name} is gone") from None

    def expect_soon(self) -> None:
        self._expecting_until_s = time.monotonic() + EXPECTING_HOT_S

    def post(self, order: _Order) -> None:
        peer = self._peers.get(order.peer)
        try:
            self._require_open()
        except TransferError as error:
            self._refuse(order, error)
            return
        if peer is None or not peer.takes_writes:
            self._refuse(order, PeerDown(f"{order.peer} is not connected"))
            return
        # In order of the local id, so that NIXL sees every pair of neighbours as such and merges it.
        indices = np.array(sorted(zip(order.local, order.remote, strict=True)), dtype=np.int32)
        local, remote = np.ascontiguousarray(indices[:, 0]), np.ascontiguousarray(indices[:, 1])
        try:
            handle = self._agent.make_write(self._sources, local, peer.targets, remote, order.notification)
        except Exception as error:
            if isinstance(error, self._disconnect_error):
                self.lose(order.peer)
            self._refuse(order, self._translate(order.peer, error))
            return
        self._start(_LiveWrite(order, handle, time.monotonic()))

    # Writes.

    def _start(self, write: _LiveWrite) -> None:
        self._counts.writes_posted += 1
        self._live.append(write)
        try:
            is_done = self._agent.post(write.handle)
        except Exception as error:
            # Some of its descriptors may be under way: only the polled state says when they are not.
            write.error = self._translate(write.order.peer, error)
            _settle(write.order.pending.done, error=write.error)
            return
        if is_done:
            self._finish(write, Fence.DONE)

    def _poll_write(self, write: _LiveWrite, now_s: float) -> None:
        try:
            is_done = self._agent.is_done(write.handle)
        except Exception as error:
            write.error = write.error or self._translate(write.order.peer, error)
            self._finish(write, Fence.PEER_GONE if isinstance(write.error, PeerDown) else Fence.FAILED)
            return
        if is_done:
            self._finish(write, Fence.DONE if write.error is None else Fence.FAILED)
        else:
            self._check_deadline(write, now_s)

    def _check_deadline(self, write: _LiveWrite, now_s: float) -> None:
        if write.is_overdue or now_s < write.order.deadline_s:
            return
        write.is_overdue = True
        self._counts.writes_timed_out += 1
        pending = write.order.pending
        _settle(pending.done, error=TransferTimeout(f"{write.order.peer} is stalled", pending.fence))

    def _finish(self, write: _LiveWrite, fence: Fence) -> None:
        self._live.remove(write)
        self._counts.late_fences += write.is_overdue
        pending = write.order.pending
        if fence is Fence.DONE:
            _settle(pending.done, self._count_done(write))
        else:
            self._counts.writes_failed += 1
            failure = write.error or TransferError(f"{write.order.peer}: the write failed")
            _settle(pending.done, error=failure)
        if fence is Fence.PEER_GONE:
            self.lose(write.order.peer)
        _settle(pending.fence, fence)
        with contextlib.suppress(Exception):
            self._agent.release_write(write.handle)

    def _count_done(self, write: _LiveWrite) -> TransferReceipt:
        order = write.order
        try:
            num_descriptors = self._agent.num_descriptors(write.handle)
        except Exception:  # an operator may have turned telemetry off
            num_descriptors = count_extents(order.local, order.remote)
        receipt = TransferReceipt(
            num_bytes=len(order.local) * self._pool.layout.block_bytes,
            num_blocks=len(order.local),
            num_descriptors=num_descriptors,
            seconds=time.monotonic() - write.started_s,
        )
        self._counts.writes_done += 1
        self._counts.bytes_written += receipt.num_bytes
        self._counts.blocks_written += receipt.num_blocks
        self._counts.descriptors_written += receipt.num_descriptors
        return receipt

    def _refuse(self, order: _Order, error: TransferError) -> None:
        self._counts.writes_failed += 1
        _settle(order.pending.done, error=error)
        _settle(order.pending.fence, Fence.NEVER_POSTED)

    def _translate(self, peer: str, error: Exception) -> TransferError:
        if isinstance(error, self._disconnect_error):
            return PeerDown(f"{peer} is gone")
        return TransferError(f"{peer}: {type(error).__name__}: {error}")

    # Peers.

    def _add(self, theirs: Handshake) -> _Peer:
        try:
            its_name = self._agent.add_peer(theirs.metadata)
        except Exception as error:
            raise HandshakeRefused(f"NIXL refuses the metadata of {theirs.name}: {error}") from None
        try:
            if its_name != theirs.name:
                raise HandshakeRefused(f"the metadata of {theirs.name} names another agent")
            rows = _descriptor_row(theirs.address, theirs.layout.block_bytes, theirs.device_id, theirs.num_blocks)
            targets = self._agent.prepare(its_name, rows, theirs.memory)
            self._agent.notify(its_name, HEARTBEAT)  # connects now, not within the first handoff
        except Exception as error:
            if its_name not in self._peers:
                with contextlib.suppress(Exception):
                    self._agent.remove_peer(its_name)
            if isinstance(error, self._disconnect_error):
                raise PeerDown(f"{theirs.name} is gone") from None
            if isinstance(error, TransferError):
                raise
            raise HandshakeRefused(f"{theirs.name} has not registered what it offers: {error}") from None
        return _Peer(its_name, theirs.num_blocks, targets)

    def _poll_peer(self, peer: _Peer, now_s: float) -> None:
        peer.watchers = [future for future in peer.watchers if not future.done()]
        if peer.lost_s is not None:
            self._settle_lost(peer, peer.lost_s, now_s)
        elif peer.leavers and not self._has_live(peer):
            self._drop(peer)
        elif peer.watchers and now_s >= peer.next_heartbeat_s:
            self._send_heartbeat(peer, now_s)

    def _send_heartbeat(self, peer: _Peer, now_s: float) -> None:
        peer.next_heartbeat_s = now_s + HEARTBEAT_INTERVAL_S
        self._counts.heartbeats_sent += 1
        with contextlib.suppress(PeerDown):
            self.notify(peer.name, HEARTBEAT)

    def _settle_lost(self, peer: _Peer, lost_s: float, now_s: float) -> None:
        peer.turns_since_lost += 1
        has_settled = now_s >= lost_s + PEER_SETTLE_S and peer.turns_since_lost >= PEER_SETTLE_TURNS
        if has_settled and not self._has_live(peer):
            self._remember_gone(peer.name)
            self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        """Forget a peer without live writes."""
        del self._peers[peer.name]
        with contextlib.suppress(Exception):
            self._agent.release_prepared(peer.targets)
        with contextlib.suppress(Exception):
            self._agent.remove_peer(peer.name)
        for future in peer.leavers:
            _settle(future, None)
        for future in peer.watchers:
            if peer.lost_s is None:
                _settle(future, error=PeerDown(f"{peer.name} has been disconnected"))
            else:
                _settle(future, None)

    def _has_live(self, peer: _Peer) -> bool:
        return any(write.order.peer == peer.name for write in self._live)

    def _remember_gone(self, name: str) -> None:
        self._gone[name] = None
        while len(self._gone) > MAX_GONE_PEERS:
            self._gone.popitem(last=False)

    # Read from other threads: single reads of values which the owner replaces whole.

    @property
    def num_live(self) -> int:
        return len(self._live)

    def num_blocks_of(self, name: str) -> int | None:
        peer = self._peers.get(name)
        return peer.num_blocks if peer is not None and peer.takes_writes else None

    def knows(self, name: str) -> bool:
        return name in self._peers

    def is_gone(self, name: str) -> bool:
        return name in self._gone

    def stats(self) -> ConnectorStats:
        counts, inbox = self._counts, self._inbox.counts
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
            heartbeats_sent=counts.heartbeats_sent,
            peers_lost=counts.peers_lost,
            peers=len(self._peers),
            live_writes=len(self._live),
            overdue_writes=sum(write.is_overdue for write in self._live.copy()),
        )


def _descriptor_row(address: int, block_bytes: int, device_id: int, num_blocks: int) -> NDArray[np.uint64]:
    """One strided row (address, length, device, stride, count) which stands for every block of a pool."""
    return np.array([[address, block_bytes, device_id, block_bytes, num_blocks]], dtype=np.uint64)


def _settle(future: asyncio.Future[_T], value: _T | None = None, *, error: Exception | None = None) -> None:
    """Answer a future from the owner thread; one that is done, or whose loop has ended, stays as it is."""
    with contextlib.suppress(RuntimeError):  # the loop closed: nobody waits any more
        future.get_loop().call_soon_threadsafe(_settle_here, future, value, error)


def _settle_here(future: asyncio.Future[Any], value: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def _answer(future: asyncio.Future[_T], action: Callable[[], _T]) -> None:
    try:
        value = action()
    except TransferError as error:
        _settle(future, error=error)
    except Exception as error:
        _settle(future, error=TransferError(f"{type(error).__name__}: {error}"))
    else:
        _settle(future, value)


def _make_immortal(item: object) -> None:
    """No destructor of `item` runs, not even as the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))
