"""What a connector promises: one-sided block writes, notifications, deadlines, fences. No transport.

TransferError
├── PeerDown             the peer's process or host is gone, or was never connected
├── PeerIncompatible     the two pools differ in a named field
├── HandshakeRefused     bytes that are not a handshake
├── TransferTimeout      a deadline passed; the write may still land until `.fence` resolves
├── ConnectorClosed      the connector takes no more work
├── LimitReached         a bounded table is full
├── TicketRefused        transfer/ticket.py
├── PushFailed           transfer/handoff.py
└── LandingRefused       transfer/handoff.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.kv_cache import KVCacheLayout

NONCE_BYTES = 16
MAX_NOTIFICATION_BYTES = 4096
MAX_PEERS = 256
MAX_LIVE_WRITES = 4096
MAX_BLOCKS_IN_WRITE = 65_536


class TransferError(Exception):
    """Base of what can go wrong between two pools."""


class PeerDown(TransferError):
    """The peer is gone or not connected. Nothing of the refused call has been written."""


class PeerIncompatible(TransferError):
    """The pools differ in `field`; bytes of one would be garbage in the other."""

    def __init__(self, field: str, ours: object, theirs: object) -> None:
        super().__init__(f"the peer differs in {field}: ours {ours!r}, theirs {theirs!r}")
        self.field = field


class HandshakeRefused(TransferError):
    """Not a well-formed handshake."""


class ConnectorClosed(TransferError):
    """The connector is closing or closed."""


class LimitReached(TransferError):
    """A bounded table is full; nothing has changed."""


class Fence(StrEnum):
    """How a write ended. After any of these no byte of it lands any more."""

    DONE = "done"
    FAILED = "failed"
    PEER_GONE = "peer_gone"
    NEVER_POSTED = "never_posted"


class TransferTimeout(TransferError):
    """The deadline passed. Source and target blocks may be reused only when `fence` has resolved."""

    def __init__(self, message: str, fence: asyncio.Future[Fence]) -> None:
        super().__init__(message)
        self.fence = fence


@dataclass(frozen=True, slots=True)
class TransferReceipt:
    """A write that has landed. `num_descriptors` counts extents after neighbours were merged."""

    num_bytes: int
    num_blocks: int
    num_descriptors: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PendingWrite:
    """A write under way. `done` answers the caller, at the latest at its deadline; `fence` tells the truth.

    `done`: TransferReceipt, or PeerDown, TransferTimeout, TransferError.
    `fence`: never an exception and never a timer; resolves when the transport itself has let go of the write.
    Cancelling a waiter cancels neither the write nor its fence.
    """

    done: asyncio.Future[TransferReceipt]
    fence: asyncio.Future[Fence]

    @staticmethod
    def create(loop: asyncio.AbstractEventLoop) -> PendingWrite:
        pending = PendingWrite(loop.create_future(), loop.create_future())
        pending.done.add_done_callback(_mark_retrieved)
        return pending


@dataclass(frozen=True, slots=True)
class ConnectorStats:
    """Counts since the start, then gauges of now."""

    writes_posted: int = 0
    writes_done: int = 0
    writes_failed: int = 0
    writes_timed_out: int = 0
    late_fences: int = 0  # fences of writes whose callers had given up
    bytes_written: int = 0
    blocks_written: int = 0
    descriptors_written: int = 0
    notifications: int = 0  # taken in, of any kind below
    notifications_early: int = 0
    notifications_duplicate: int = 0
    notifications_late: int = 0  # for a nonce already forgotten
    notifications_refused: int = 0  # too short, too long, or no room
    heartbeats_sent: int = 0
    peers_lost: int = 0
    peers: int = 0
    live_writes: int = 0
    overdue_writes: int = 0  # live, past their deadline


@dataclass(frozen=True, slots=True)
class KVPool:
    """The memory of one KV cache: `num_blocks` blocks of `layout.block_bytes`, contiguous, never moved or freed.

    `block(i)` gives the bytes of block i as a C-contiguous uint8 memoryview: a view where the pool is host
    memory, a fresh host copy where it is a device's. `owner` keeps the memory alive.
    """

    address: int
    num_blocks: int
    layout: KVCacheLayout
    block: Callable[[int], memoryview]
    memory: str = "DRAM"
    device_id: int = 0
    owner: object = field(default=None, repr=False, compare=False)

    @staticmethod
    def from_buffer(buffer: object, layout: KVCacheLayout) -> KVPool:
        """Pool over host memory that exports a writable buffer: numpy array, bytearray, `tensor.numpy()`.

        Raises:
            ValueError: Read-only, or not a whole number of blocks.
        """
        view: NDArray[np.uint8] = np.frombuffer(buffer, dtype=np.uint8)  # type: ignore[call-overload]
        if not view.flags.writeable:
            raise ValueError("the KV buffer is read-only")
        num_blocks, rest = divmod(view.size, layout.block_bytes)
        if rest or not num_blocks:
            raise ValueError(f"{view.size} bytes are not whole blocks of {layout.block_bytes}")
        data = view.data.cast("B")
        size = layout.block_bytes
        return KVPool(
            address=view.ctypes.data,
            num_blocks=num_blocks,
            layout=layout,
            block=lambda index: data[index * size : (index + 1) * size],
            owner=view,
        )


class KVConnector(Protocol):
    """Moves blocks of `pool` into the pools of connected peers. Every wait has a limit.

    Methods are called from an asyncio loop; futures belong to the loop which asked.
    """

    @property
    def name(self) -> str:
        """Agent name: role and a uuid4, so that a restarted process is somebody else."""
        ...

    @property
    def pool(self) -> KVPool: ...

    def handshake(self) -> bytes:
        """What a peer needs in order to connect. Not secret, not authenticated: send it over a trusted channel."""
        ...

    async def connect(self, handshake: bytes) -> str:
        """Make the peer a target of writes and notifications; idempotent. Returns its name.

        Raises:
            HandshakeRefused, PeerIncompatible (names the field), PeerDown, LimitReached, ConnectorClosed
        """
        ...

    async def disconnect(self, peer: str) -> None:
        """No new writes to `peer`; returns when its live ones have met their fences. Unknown: no effect."""
        ...

    def is_peer_alive(self, peer: str) -> bool:
        """False once the peer is known to be gone, or was never connected. Costs nothing, sends nothing."""
        ...

    def peer_gone(self, peer: str) -> asyncio.Future[None]:
        """Resolves when nothing sent by this incarnation of the peer can land any more.

        While anybody waits, the peer is probed by heartbeats. Cancel the future to stop waiting. It fails with
        PeerDown where we disconnect and with ConnectorClosed where we close: neither is evidence of its end.

        Raises:
            PeerDown: Never connected: its end could not be seen.
            ConnectorClosed
        """
        ...

    def declare_gone(self, peer: str) -> None:
        """An authority (the cluster) says that the peer's process has ended. Idempotent."""
        ...

    def submit(
        self,
        peer: str,
        local_blocks: Sequence[int],
        remote_blocks: Sequence[int],
        *,
        notification: bytes = b"",
        timeout_s: float,
    ) -> PendingWrite:
        """Start writing local block i of the list into remote block i of the list; never waits.

        `notification`, if any, reaches the peer after the last byte of this write (not of others). The local
        blocks must not change before the fence.

        Raises:
            ValueError: Lengths differ, list empty, an id out of range, a target twice, notification too long.
            PeerDown, LimitReached, ConnectorClosed: Nothing has been started.
        """
        ...

    async def write(
        self,
        peer: str,
        local_blocks: Sequence[int],
        remote_blocks: Sequence[int],
        *,
        notification: bytes = b"",
        timeout_s: float,
    ) -> TransferReceipt:
        """`submit` and wait for `done`. Raises what either raises."""
        ...

    async def notify(self, peer: str, notification: bytes) -> None:
        """Send a notification bound to no write. It may overtake writes which have not met their fences.

        Raises:
            PeerDown, ConnectorClosed, ValueError (too long)
        """
        ...

    async def expect(self, nonce: bytes, *, timeout_s: float) -> bytes:
        """The next notification that starts with `nonce` (which is kept in it); one waiter a nonce.

        Early ones have been kept (bounded); repeats of the same bytes are ignored.

        Raises:
            TimeoutError: The wait may be repeated; nothing has been lost.
            ConnectorClosed
        """
        ...

    def forget(self, nonce: bytes) -> None:
        """Drop what came for `nonce`; what still comes is counted as late and dropped. Idempotent."""
        ...

    async def close(self, *, timeout_s: float = 5.0) -> bool:
        """Stop intake, drain, release. Idempotent.

        Returns:
            False if something was still live at the deadline: its resources are then left alone on purpose (a
            late write must find its memory), and the process should end by `os._exit`.
        """
        ...

    def stats(self) -> ConnectorStats: ...


def check_write(
    pool: KVPool, remote_num_blocks: int, local: Sequence[int], remote: Sequence[int], notification: bytes
) -> None:
    """
    Raises:
        ValueError: `KVConnector.submit` says when.
    """
    if not local or len(local) != len(remote):
        raise ValueError(f"{len(local)} local blocks for {len(remote)} remote ones")
    if len(local) > MAX_BLOCKS_IN_WRITE:
        raise ValueError(f"more than {MAX_BLOCKS_IN_WRITE} blocks in one write")
    if min(local) < 0 or max(local) >= pool.num_blocks:
        raise ValueError(f"a local block is not one of {pool.num_blocks}")
    if min(remote) < 0 or max(remote) >= remote_num_blocks:
        raise ValueError(f"a remote block is not one of {remote_num_blocks}")
    if len(set(remote)) != len(remote):
        raise ValueError("a remote block is written twice in one write")
    check_notification(notification)


def check_notification(notification: bytes) -> None:
    """
    Raises:
        ValueError: Longer than `MAX_NOTIFICATION_BYTES`.
    """
    if len(notification) > MAX_NOTIFICATION_BYTES:
        raise ValueError(f"a notification is longer than {MAX_NOTIFICATION_BYTES} bytes")


def count_extents(local: Sequence[int], remote: Sequence[int]) -> int:
    """Descriptors of a write after merging pairs that are neighbours on both sides, in order of local id."""
    pairs = sorted(zip(local, remote, strict=True))
    breaks = (a[0] + 1 != b[0] or a[1] + 1 != b[1] for a, b in pairwise(pairs))
    return sum(breaks) + bool(pairs)


def _mark_retrieved(future: asyncio.Future[TransferReceipt]) -> None:
    """A caller that stopped waiting is no reason for asyncio to complain about an unread error."""
    if not future.cancelled():
        future.exception()
