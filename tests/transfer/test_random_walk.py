"""Ten thousand random operations over whole handoffs, with a clock of our own and every fault of the local fabric.

Held after each operation: no block is freed while a write may land in it, none is freed twice, none is lost; what
landed is what was sent; a freed block stays as it was scrubbed until it is handed out again.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tests.transfer.support import KEY, NUM_BLOCKS, WEIGHTS, ZONE, block_bytes, make_pool, run
from transfer.handoff import (
    HandoffReceiver,
    HandoffSender,
    Landing,
    LandingReceipt,
    LandingRefused,
    PushFailed,
    PushSession,
)
from transfer.local_connector import Fault, LocalConnector, LocalFabric
from transfer.notice import AbortReason
from transfer.protocol import TransferError
from transfer.quarantine import HandoffFault
from transfer.ticket import Expectation, ReplayGuard, TicketSealer, TicketVerifier

NUM_OPERATIONS = 10_000
MAX_OPEN = 12
TURNS = 12  # turns of the loop after each operation: enough for every task to come to rest


@dataclass(eq=False)
class Handoff:
    landing: Landing
    waiting: asyncio.Task[LandingReceipt]
    sender_name: str = ""
    session: PushSession | None = None
    sources: list[int] = field(default_factory=list)
    pushed: int = 0


class World:
    """One decode replica with a table of its blocks, two prefill replicas which die and are replaced."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_s = 1000.0
        self.fabric = LocalFabric(lambda: self.now_s)
        self.pool = make_pool(fill=0)
        self.decode = LocalConnector("decode", self.pool, self.fabric)
        self.sealer = TicketSealer((KEY,), lambda: self.now_s)
        self.receiver = HandoffReceiver(
            self.decode,
            self.sealer,
            weights_digest=WEIGHTS,
            generations_of=lambda ids: tuple(self.generations[block] for block in ids),
            clock=lambda: self.now_s,
            monotonic=lambda: self.now_s,
            nonces=lambda: self.random.randbytes(16),
        )
        self.senders: dict[str, tuple[LocalConnector, HandoffSender]] = {}
        self.free = set(range(NUM_BLOCKS))
        self.owner: dict[int, object] = {}
        self.generations = dict.fromkeys(range(NUM_BLOCKS), 0)
        self.handoffs: list[Handoff] = []
        self.decoding: list[Landing] = []
        self.tasks: set[asyncio.Task[bool]] = set()
        self.counts: Counter[str] = Counter()

    # The block table: what the engine would do.

    def allocate(self, count: int, owner: object) -> list[int]:
        blocks = self.random.sample(sorted(self.free), count)
        for block in blocks:
            assert not any(block_bytes(self.pool, block)), f"block {block} was written after its scrub"
            self.free.discard(block)
            self.owner[block] = owner
            self.generations[block] += 1
        return blocks

    def free_blocks(self, landing: Landing, owner: object) -> None:
        in_danger = self.fabric.may_write(self.decode.name)
        for block in landing.ticket.block_ids:
            assert block not in in_danger, f"block {block} freed while a write may land in it"
            assert self.owner.pop(block, None) is owner, f"block {block} freed twice"
            self.pool.block(block)[:] = bytes(self.pool.layout.block_bytes)
            self.free.add(block)
        self.counts["freed"] += 1

    # Operations.

    async def add_sender(self) -> None:
        connector = LocalConnector("prefill", make_pool(), self.fabric)
        verifier = TicketVerifier(
            self.sealer,
            ReplayGuard(lambda: self.now_s),
            layout_fingerprint=self.pool.layout.fingerprint(),
            weights_digest=WEIGHTS,
            agent_name=connector.name,
        )
        sender = HandoffSender(connector, verifier, write_timeout_s=2.0, clock=lambda: self.now_s)
        await self.decode.connect(connector.handshake())
        self.senders[connector.name] = (connector, sender)

    async def issue(self) -> None:
        count = self.random.randint(1, 5)
        if len(self.handoffs) >= MAX_OPEN or len(self.free) < count:
            return
        name = self.random.choice(sorted(self.senders))
        token = object()
        blocks = self.allocate(count, token)
        landing = self.receiver.issue(
            request_id=f"r{self.random.randint(0, 30)}",
            zone=ZONE,
            epoch=0,
            block_ids=blocks,
            generations=[self.generations[block] for block in blocks],
            first_missing_block=0,
            num_prompt_tokens=count * 16,
            lifetime_s=20.0,
            sender=name,
        )
        for block in blocks:
            self.owner[block] = landing
        waiting = asyncio.create_task(landing.landed(self.random.choice([1.0, 5.0])))
        handoff = Handoff(landing, waiting, name)
        self.handoffs.append(handoff)
        zone = ZONE if self.random.random() < 0.9 else "public"
        try:
            session = await self.senders[name][1].accept(landing.sealed, self.decode.handshake(), Expectation(zone, 0))
        except TransferError:
            self.counts["not_sent"] += 1
            landing.confirm_fence()
            return
        handoff.session = session

    def push(self) -> None:
        ready = [item for item in self.handoffs if item.session is not None and item.session.num_missing]
        if not ready:
            return
        handoff = self.random.choice(ready)
        assert handoff.session is not None
        chunk = self.random.sample(range(NUM_BLOCKS), self.random.randint(1, handoff.session.num_missing))
        self.fabric.faults.append(self.random_fault())
        try:
            handoff.session.push(chunk)
        except (PushFailed, TransferError):
            self.abort(handoff)
        else:
            handoff.sources += chunk
        self.fabric.faults.clear() if handoff.session.num_missing else None

    def random_fault(self) -> Fault:
        draw = self.random.random()
        if draw < 0.5:
            return Fault(delay_s=self.random.choice([0.0, 0.1, 3.0]))
        kinds = [
            Fault(drops_notification=True),
            Fault(duplicates_notification=True, notification_delay_s=self.random.random()),
            Fault(corrupt_block=0, delay_s=self.random.random()),
            Fault(fails=True, delay_s=self.random.random()),
            Fault(notification_delay_s=self.random.choice([1.0, 6.0])),
        ]
        return self.random.choice(kinds)

    def abort(self, handoff: Handoff | None = None) -> None:
        under_way = [item for item in self.handoffs if item.session is not None]
        if handoff is None and under_way:
            handoff = self.random.choice(under_way)
        if handoff is not None and handoff.session is not None:
            task = asyncio.create_task(handoff.session.abort(AbortReason.CANCELLED))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def give_up(self) -> None:
        if self.handoffs:
            self.random.choice(self.handoffs).waiting.cancel()

    def end_request(self) -> None:
        if self.decoding:
            landing = self.decoding.pop(self.random.randrange(len(self.decoding)))
            self.free_blocks(landing, landing)

    async def kill_sender(self) -> None:
        name = self.random.choice(sorted(self.senders))
        del self.senders[name]
        self.fabric.kill(name)
        await self.add_sender()

    def move_clock(self) -> None:
        self.now_s += self.random.choice([0.05, 0.5, 2.0])
        self.fabric.pump()

    async def step(self) -> None:
        draw = self.random.random()
        if draw < 0.22:
            await self.issue()
        elif draw < 0.50:
            self.push()
        elif draw < 0.54:
            self.abort()
        elif draw < 0.58:
            self.give_up()
        elif draw < 0.68:
            self.end_request()
        elif draw < 0.70:
            await self.kill_sender()
        elif draw < 0.72:
            self.fabric.stall(self.decode.name)
        elif draw < 0.76:
            self.fabric.resume(self.decode.name)
        else:
            self.move_clock()
        await self.rest()
        self.collect()
        self.check()

    async def rest(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)
            self.fabric.pump()

    def collect(self) -> None:
        """Do with each ended wait what the decode replica does."""
        for handoff in [item for item in self.handoffs if item.waiting.done()]:
            self.handoffs.remove(handoff)
            landing = handoff.landing
            fault = None
            if handoff.waiting.cancelled():
                fault = HandoffFault.CANCELLED
            elif handoff.waiting.exception() is None:
                self.counts["landed"] += 1
                self.compare(handoff)
                self.decoding.append(landing)
                continue
            else:
                error = handoff.waiting.exception()
                assert isinstance(error, LandingRefused), error
                self.counts[error.fault] += 1
            landing.release_when_fenced(lambda landing=landing: self.free_blocks(landing, landing), fault)

    def compare(self, handoff: Handoff) -> None:
        source = make_pool()
        for mine, theirs in zip(handoff.landing.ticket.block_ids, handoff.sources, strict=True):
            assert block_bytes(self.pool, mine) == block_bytes(source, theirs), "wrong bytes were let in"

    def check(self) -> None:
        self.receiver.ledger.check()
        assert self.free.isdisjoint(self.owner)
        assert len(self.free) + len(self.owner) == NUM_BLOCKS, "a block is lost"
        in_danger = self.fabric.may_write(self.decode.name)
        assert self.free.isdisjoint(in_danger), "a write may land in a free block"
        for block in in_danger:
            assert self.receiver.ledger.may_be_written(block), "the ledger does not know of a live write"

    async def wind_down(self) -> None:
        self.fabric.resume(self.decode.name)
        for name in list(self.senders):
            del self.senders[name]
            self.fabric.kill(name)
        for _ in range(20):
            self.now_s += 10.0
            self.fabric.pump()
            await self.rest()
            self.collect()
        while self.decoding:
            self.end_request()


@pytest.mark.parametrize("seed", [1])
def test_no_block_is_freed_under_a_write_none_leaks_and_each_is_freed_once(seed: int) -> None:
    async def body() -> None:
        world = World(seed)
        await world.add_sender()
        await world.add_sender()
        for _ in range(NUM_OPERATIONS):
            await world.step()
        await world.wind_down()
        world.check()
        assert world.free == set(range(NUM_BLOCKS))
        ledger = world.receiver.stats().ledger
        assert ledger.opened == ledger.landed + ledger.released == world.counts["freed"]
        assert ledger.landed == world.counts["landed"]
        # The walk has been everywhere, or it proves nothing.
        rare = {name: world.counts[name] for name in ("landed", "not_sent", *world_faults())}
        assert min(rare.values()) >= 10, rare
        assert min(ledger.fences.values()) >= 10, ledger.fences
        await world.receiver.close()

    run(body, 120)


def world_faults() -> list[HandoffFault]:
    return [
        HandoffFault.TIMEOUT,
        HandoffFault.PEER_DOWN,
        HandoffFault.ABORTED,
        HandoffFault.DIGEST_MISMATCH,
    ]
