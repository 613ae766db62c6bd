"""Pools, pairs of connectors and whole handoffs for the transfer tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.kv_cache import KVCacheLayout
from transfer.handoff import HandoffReceiver, HandoffSender, Landing, PushSession
from transfer.local_connector import LocalConnector, LocalFabric
from transfer.nixl_connector import NixlConnector
from transfer.protocol import KVPool
from transfer.ticket import Expectation, ReplayGuard, TicketSealer, TicketVerifier

LAYOUT = KVCacheLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32")
NUM_BLOCKS = 64
KEY = bytes(range(32))
NEW_KEY = bytes(range(100, 132))
WEIGHTS = "weights-a"
ZONE = "tenant/t/case/c"
CANARY = 0xA5


def make_pool(layout: KVCacheLayout = LAYOUT, num_blocks: int = NUM_BLOCKS, fill: int | None = None) -> KVPool:
    """A pool whose bytes all differ by block and offset, or are all `fill`."""
    size = num_blocks * layout.block_bytes
    if fill is None:
        data = np.random.default_rng(7).integers(0, 256, size, dtype=np.uint8)
    else:
        data = np.full(size, fill, dtype=np.uint8)
    return KVPool.from_buffer(data, layout)


def block_bytes(pool: KVPool, block_id: int) -> bytes:
    return bytes(pool.block(block_id))


@dataclass
class Pair:
    """A sender and a receiver which it is connected to, both ways. `fabric`: of the local kind only."""

    sender: Any
    receiver: Any
    fabric: LocalFabric | None = None


def make_connector(kind: str, role: str, pool: KVPool, fabric: LocalFabric | None, **options: Any) -> Any:
    if kind == "nixl":
        return NixlConnector(role, pool, **options)
    assert fabric is not None
    return LocalConnector(role, pool, fabric, **options)


@asynccontextmanager
async def connected_pair(
    kind: str, num_blocks: int = NUM_BLOCKS, layout: KVCacheLayout = LAYOUT
) -> AsyncIterator[Pair]:
    fabric = LocalFabric() if kind == "local" else None
    sender = make_connector(kind, "prefill", make_pool(layout, num_blocks), fabric)
    receiver = make_connector(kind, "decode", make_pool(layout, num_blocks, CANARY), fabric)
    try:
        await sender.connect(receiver.handshake())
        await receiver.connect(sender.handshake())
        yield Pair(sender, receiver, fabric)
    finally:
        await sender.close()
        await receiver.close()


def run(job: Callable[[], Awaitable[None]], timeout_s: float = 30.0) -> None:
    """Run one test body on a fresh loop, bounded."""

    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await job()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is awaited may be in another process
            await asyncio.sleep(0.002)


@dataclass
class Ends:
    """Both ends of handoffs over a pair of connectors."""

    pair: Pair
    sender: HandoffSender
    receiver: HandoffReceiver
    generations: dict[int, int]
    sealers: tuple[TicketSealer, TicketSealer]  # the sender's and the receiver's

    def issue(self, block_ids: list[int], **changes: Any) -> Landing:
        options: dict[str, Any] = {
            "request_id": "r1",
            "zone": ZONE,
            "epoch": 0,
            "block_ids": block_ids,
            "generations": [self.generations[block] for block in block_ids],
            "first_missing_block": 0,
            "num_prompt_tokens": 16 * max(1, len(block_ids)),
            "lifetime_s": 60.0,
            "sender": self.pair.sender.name,
        }
        return self.receiver.issue(**{**options, **changes})

    async def accept(self, landing: Landing) -> PushSession:
        expected = Expectation(ZONE, 0)
        return await self.sender.accept(landing.sealed, self.pair.receiver.handshake(), expected)


def make_ends(pair: Pair, *, write_timeout_s: float = 10.0, clock: Callable[[], float] = time.time) -> Ends:
    layout = pair.sender.pool.layout
    generations = dict.fromkeys(range(pair.receiver.pool.num_blocks), 1)
    sealers = (TicketSealer((KEY,), clock), TicketSealer((KEY,), clock))
    verifier = TicketVerifier(
        sealers[0],
        ReplayGuard(clock),
        layout_fingerprint=layout.fingerprint(),
        weights_digest=WEIGHTS,
        agent_name=pair.sender.name,
    )
    receiver = HandoffReceiver(
        pair.receiver,
        sealers[1],
        weights_digest=WEIGHTS,
        generations_of=lambda block_ids: tuple(generations[block] for block in block_ids),
        clock=clock,
    )
    sender = HandoffSender(pair.sender, verifier, write_timeout_s=write_timeout_s, clock=clock)
    return Ends(pair, sender, receiver, generations, sealers)


@asynccontextmanager
async def handoff_ends(kind: str, **options: Any) -> AsyncIterator[Ends]:
    async with connected_pair(kind) as pair:
        ends = make_ends(pair, **options)
        try:
            yield ends
        finally:
            await ends.receiver.close()
