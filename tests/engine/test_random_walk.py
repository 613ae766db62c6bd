"""Seeded random walks of 10,000 operations over pool, manager and engine, each followed by `check()`.

They end with everything released: no block leaked, shared wrongly or freed twice. The pool's walk is
compared with a model of its own; the engine's tokens with a model that has no cache.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest

from engine.block_pool import BlockPool
from engine.errors import PinRefused, QueueFullError
from engine.kv_cache_manager import KVCacheManager, PurgeCount
from engine.quotas import NO_QUOTAS, Quota, Quotas
from engine.request import FinishReason, Request
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan
from tests.engine.test_quotas import LiteralIdle
from tests.engine.toy_model import (
    CASE,
    OTHER_CASE,
    PLAN,
    RIVAL_CASE,
    FakeClock,
    ToyEngine,
    ToyModel,
    first_token,
    make_request,
    send_prompt,
    tokens_of,
    toy_hasher,
)

NUM_OPERATIONS = 10_000
MIXED = Zone.parse("tenant/acme/mixed")
QUOTAS = {
    "none": NO_QUOTAS,
    "quotas": Quotas(
        public_cap=2,
        default=Quota(cap=4),
        tenants={"acme": Quota(floor=1, cap=5)},
        zones={PLAN: Quota(floor=1, cap=3), CASE: Quota(cap=3)},
    ),
}
ZONES = (PUBLIC, PLAN, MIXED, CASE, OTHER_CASE, RIVAL_CASE, EPHEMERAL)


# -- pool


class PoolWalk:
    """Owners of blocks, in the most literal way, beside the pool that should agree with them."""

    def __init__(self, seed: int, quotas: Quotas) -> None:
        self.random = random.Random(seed)
        self.memory = [b""] * 12  # what is written in each block; b"" is zeroes
        self.pool = BlockPool(12, self.scrub, quotas=quotas)
        self.pins: list[list[int]] = []
        self.users: list[list[int]] = []
        self.findable: dict[bytes, tuple[int, Zone]] = {}
        self.quarantined: dict[str, list[int]] = {}
        self.generations = [0] * 12
        self.num_digests = 0

    def scrub(self, block_ids: object) -> None:
        assert isinstance(block_ids, list)
        for block_id in block_ids:
            assert all(block_id not in users for users in self.users + self.pins), "a block in use was scrubbed"
            self.memory[block_id] = b""

    def allocate(self) -> None:
        zone, count = self.random.choice(ZONES), self.random.randint(1, 5)
        tenant, model, num_free = self.random.choice(["", "acme"]), self.literal_idle(), self.pool.num_free
        tenant = zone.tenant or tenant
        available, victims = num_free + model.num_evictable(), list[tuple[int, Zone] | None]()
        for _ in range(min(count, available) - num_free):
            victims.append(model.victim(zone, tenant))
            model.blocks.remove(victims[-1])  # type: ignore[arg-type]
        block_ids = self.pool.allocate([zone] * count, zone, tenant=tenant)
        assert (block_ids is None) == (count > available)
        if block_ids is None:
            return
        assert {block_id for block_id, _ in model.blocks} == {item[0] for item in self.literal_idle().blocks}
        for block_id in block_ids:
            assert all(block_id not in users for users in self.users + self.pins), "handed out while in use"
            assert all(block_id not in blocks for blocks in self.quarantined.values()), "still in quarantine"
            assert self.pool.generation(block_id) > self.generations[block_id]
            self.generations[block_id] = self.pool.generation(block_id)
            assert not self.memory[block_id].startswith(b"private"), "private bytes reached a new owner"
            self.memory[block_id] = (b"private " if zone.is_scrubbed else b"shared ") + zone.path.encode()
            self.findable = {key: value for key, value in self.findable.items() if value[0] != block_id}
        self.users.append(block_ids)

    def publish(self) -> None:
        if self.users:
            block_id = self.random.choice(self.random.choice(self.users))
            zone = self.pool.zone(block_id)
            assert zone is not None
            if zone.is_cacheable and all(value[0] != block_id for value in self.findable.values()):
                self.num_digests += 1
                digest = b"%d" % self.num_digests
                self.pool.publish(block_id, digest)
                self.findable[digest] = (block_id, zone)

    def acquire(self) -> None:
        if self.findable:
            digest, (block_id, zone) = self.random.choice(sorted(self.findable.items()))
            assert self.pool.find(digest, zone) == block_id
            self.pool.acquire([block_id])
            assert zone.path.encode() in self.memory[block_id], "the content of a shared block changed"
            self.users.append([block_id])

    def literal_idle(self) -> LiteralIdle:
        """The idle blocks, oldest first, for a model that recounts everything."""
        idle = self.pool._idle
        ages = [(age, block_id, PUBLIC) for block_id, age in idle._public.items()]
        ages += [(age, block_id, zone) for zone, own in idle._zones.items() for block_id, age in own.order.items()]
        return LiteralIdle(self.pool.quotas, [(block_id, zone) for _, block_id, zone in sorted(ages)])

    def pin(self) -> None:
        if self.findable and len(self.pins) < 2:
            items = self.random.sample(sorted(self.findable.items()), k=min(2, len(self.findable)))
            block_ids = [block_id for _, (block_id, _) in items]
            self.pool.pin(block_ids)
            self.pins.append(block_ids)

    def unpin(self) -> None:
        if self.pins:
            block_ids = self.pins.pop(self.random.randrange(len(self.pins)))
            references = [block_id for users in self.users + self.pins for block_id in users]
            gone = set(block_ids).difference(references)
            assert self.pool.unpin(block_ids) == len(gone)
            self.findable = {key: value for key, value in self.findable.items() if value[0] not in gone}

    def release(self) -> None:
        if self.users:
            self.pool.release(self.users.pop(self.random.randrange(len(self.users))))

    def quarantine(self) -> None:
        private = [
            users
            for users in self.users
            if all(self.pool.ref_count(block_id) == 1 for block_id in users)
            and not {value[0] for value in self.findable.values()} & set(users)
        ]
        if private and len(self.quarantined) < 2:
            users = self.random.choice(private)
            owner = f"owner{self.random.randrange(10**9)}"
            self.users.remove(users)
            self.pool.quarantine(users, owner)
            self.quarantined[owner] = users

    def release_quarantine(self) -> None:
        if self.quarantined:
            owner = self.random.choice(sorted(self.quarantined))
            for block_id in self.quarantined[owner]:
                self.memory[block_id] = b"private, landed late"
            assert self.pool.release_quarantine(owner) == len(self.quarantined.pop(owner))

    def purge(self) -> None:
        zone = self.random.choice(ZONES)
        for block_ids in [block_ids for block_ids in self.pins if zone in map(self.pool.zone, block_ids)]:
            self.pins.remove(block_ids)  # as the cache manager does
            self.pool.unpin(block_ids)
        self.check()
        mine = {digest for digest, value in self.findable.items() if value[1] == zone}
        assert self.pool.purge(zone) == len(mine)
        self.findable = {digest: value for digest, value in self.findable.items() if digest not in mine}

    def drop_idle(self) -> None:
        zone = self.random.choice(ZONES)
        self.pool.drop_idle(zone, "ttl")

    def check(self) -> None:
        self.pool.check()
        # Idle blocks may have been evicted or dropped; what the model holds findable must be so or be gone.
        for digest, (block_id, zone) in list(self.findable.items()):
            if self.pool.find(digest, zone) != block_id:
                assert self.pool.ref_count(block_id) == 0 or self.pool.zone(block_id) != zone
                del self.findable[digest]
        references = [block_id for users in self.users + self.pins for block_id in users]
        assert self.pool.num_pinned == len({block_id for block_ids in self.pins for block_id in block_ids})
        assert self.pool.num_available - self.pool.num_free == self.literal_idle().num_evictable()
        assert [self.pool.ref_count(block_id) for block_id in range(12)] == [
            references.count(block_id) for block_id in range(12)
        ]
        assert self.pool.num_quarantined == sum(map(len, self.quarantined.values()))


@pytest.mark.parametrize("quotas", QUOTAS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_walk_over_the_pool_leaks_nothing(seed: int, quotas: str) -> None:
    walk = PoolWalk(seed, QUOTAS[quotas])
    operations: list[Callable[[], None]] = [
        *[walk.allocate, walk.publish, walk.acquire, walk.release] * 4,
        *[walk.publish, walk.publish, walk.release, walk.quarantine, walk.release_quarantine] * 2,
        walk.purge,
        walk.drop_idle,
        walk.pin,
        walk.unpin,
        walk.unpin,
    ]
    for _ in range(3 * NUM_OPERATIONS):
        walk.random.choice(operations)()
        walk.check()
    assert walk.pool.num_evictions > 100
    assert (walk.pool.num_quota_evictions > 20) == (quotas == "quotas")
    while walk.pins:
        walk.unpin()
    while walk.users:
        walk.release()
    while walk.quarantined:
        walk.release_quarantine()
    for zone in ZONES:
        walk.pool.purge(zone)
    walk.check()
    assert walk.pool.num_free == 12
    assert not any(text.startswith(b"private") for text in walk.memory)


# -- manager


@dataclass
class ManagerWalk:
    """Requests that come, grow, are computed, preempted, handed over and go, over few prompts and zones."""

    random: random.Random
    quotas: Quotas
    live: dict[str, Request] = field(default_factory=dict)  # with a table
    reserved: dict[str, Request] = field(default_factory=dict)
    quarantined: list[str] = field(default_factory=list)
    num_requests: int = 0
    num_rekeyed: int = 0
    num_foreseen: Counter[bool] = field(default_factory=Counter)
    epochs: Counter[Zone] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.cache = KVCacheManager(
            BlockPool(24, lambda _: None, quotas=self.quotas),
            toy_hasher(),
            4,
            clock=self.clock,
            case_idle_ttl_s=100.0,
        )

    def new_request(self) -> Request:
        self.num_requests += 1
        request = random_request(self.random, f"r{self.num_requests}", max_prompt=30, epochs=self.epochs)
        self.cache.observe_epochs(request, [*self.live.values(), *self.reserved.values()])
        return request

    def allocate(self) -> None:
        request = self.new_request()
        headroom = self.random.randint(0, 3)
        fits = self.cache.fits(request, request.num_tokens, headroom=headroom, without=())
        assert self.cache.allocate(request, request.num_tokens, headroom=headroom) == fits
        if fits:
            self.live[request.request_id] = request

    def reserve(self) -> None:
        request = self.new_request()
        if self.cache.reserve(request, request.num_tokens + self.random.randint(0, 8)):
            self.reserved[request.request_id] = request

    def compute(self) -> None:
        if self.live:
            request = self.random.choice(list(self.live.values()))
            request.num_computed_tokens += self.random.randint(0, request.num_pending_tokens)
            self.cache.publish(request)

    def grow(self) -> None:
        if self.live:
            request = self.random.choice(list(self.live.values()))
            if self.cache.extend(request, request.num_tokens + 1):
                request.output_token_ids.append(self.random.randrange(3))

    def free(self) -> None:
        """Of several, in the place of a request that counts on the room."""
        if self.live:
            gone = self.random.sample(list(self.live.values()), k=self.random.randint(1, min(3, len(self.live))))
            late, headroom = self.new_request(), self.random.randint(0, 8)
            foreseen = self.cache.fits(late, late.num_tokens, headroom=headroom, without=gone)
            with self.cache.holding_prefix(late):
                for request in gone:
                    self.cache.free(request)
                    del self.live[request.request_id]
                assert self.cache.allocate(late, late.num_tokens, headroom=headroom) == foreseen
            self.num_foreseen[foreseen] += 1
            if foreseen:
                self.live[late.request_id] = late

    def pin(self) -> None:
        if self.live and len(self.cache.pinned()) < 2:
            request = self.live.pop(self.random.choice(list(self.live)))
            kept = [zone for zone in self.zones_of(request) if zone in (PUBLIC, PLAN)]
            num_before = self.cache.pool.num_pinned
            num_pinned = self.cache.pin(request)
            assert num_pinned <= len(kept)
            assert self.cache.pool.num_pinned <= num_before + num_pinned

    def unpin(self) -> None:
        name = self.random.choice(["none", *self.cache.pinned()])
        assert self.cache.unpin(name) == 0 or name != "none"
        assert self.cache.unpin(name) == 0

    def rekey(self) -> None:
        if self.random.random() < 0.2:
            self.num_rekeyed += 1
            self.cache.rekey(toy_hasher(b"%032d" % self.num_rekeyed), [*self.live.values(), *self.reserved.values()])
            assert not self.cache.pinned()
            assert self.cache.pool.num_idle == 0

    def zones_of(self, request: Request) -> list[Zone]:
        return [request.zone_of_block(index, 4) for index in range(request.num_tokens // 4)]

    def land(self) -> None:
        if self.reserved:
            request = self.reserved.pop(self.random.choice(list(self.reserved)))
            self.cache.land(request)
            self.live[request.request_id] = request

    def quarantine(self) -> None:
        if self.reserved:
            request = self.reserved.pop(self.random.choice(list(self.reserved)))
            self.cache.quarantine(request)
            self.quarantined.append(request.request_id)

    def release_quarantine(self) -> None:
        if self.quarantined:
            request_id = self.quarantined.pop(self.random.randrange(len(self.quarantined)))
            assert self.cache.pool.release_quarantine(request_id) > 0
            assert self.cache.pool.release_quarantine(request_id) == 0

    def purge(self) -> None:
        zone = self.random.choice(ZONES)
        self.epochs[zone] += 1
        live = [*self.live.values(), *self.reserved.values()]
        num_mine = sum(self.cache.pool.zone(block_id) == zone for block_id in range(24))
        count = self.cache.purge(zone, self.epochs[zone], live)
        assert count.num_scrubbed + count.num_in_use == num_mine
        assert count.num_pinned <= count.num_findable <= num_mine
        assert self.cache.purge(zone, self.epochs[zone], live) == PurgeCount(num_in_use=count.num_in_use)

    def expire(self) -> None:
        self.clock.now_s += self.random.uniform(0.0, 60.0)
        self.cache.expire(self.clock())


@pytest.mark.parametrize("quotas", QUOTAS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_walk_over_the_cache_manager_leaks_nothing(seed: int, quotas: str) -> None:
    walk = ManagerWalk(random.Random(seed), QUOTAS[quotas])
    operations: list[Callable[[], None]] = [
        *[walk.allocate, walk.compute, walk.compute, walk.grow, walk.grow, walk.free] * 4,
        *[walk.reserve, walk.land, walk.quarantine, walk.release_quarantine] * 2,
        walk.purge,
        walk.expire,
        *[walk.pin, walk.unpin, walk.unpin, walk.rekey],
    ]
    for _ in range(NUM_OPERATIONS):
        walk.random.choice(operations)()
        walk.cache.check()
    assert walk.cache.num_hit_tokens > 1000
    assert walk.cache.pool.num_evictions > 100
    assert min(walk.num_foreseen[True], walk.num_foreseen[False]) > 50
    for request in walk.live.values():
        walk.cache.free(request)
    while walk.reserved:
        walk.quarantine()
    while walk.quarantined:
        walk.release_quarantine()
    for zone in ZONES:
        walk.cache.purge(zone, 0, [])
    assert not walk.cache.pinned()
    walk.cache.check()
    assert walk.cache.pool.num_free == 24


# -- engine


def random_request(
    source: random.Random, name: str, *, max_prompt: int, epochs: Mapping[Zone, int] = {}, **fields: object
) -> Request:
    """A prompt made of one of two shared beginnings and one of two endings, with labels to match."""
    shared = tokens_of(source.randrange(2), max_prompt)[: source.randint(1, max_prompt // 2)]
    own = tokens_of(2 + source.randrange(2), max_prompt)[: source.randint(1, max_prompt // 2)]
    kind = source.randrange(4)
    begin = source.choice([PUBLIC, PLAN])
    end = source.choice([CASE, OTHER_CASE, RIVAL_CASE])
    spans: object
    if kind == 0:
        spans = source.choice(ZONES)
    elif kind == 1:
        spans = [ZoneSpan(len(shared), begin)]  # the rest is unlabelled
    else:
        spans = [ZoneSpan(len(shared), begin), ZoneSpan(len(shared) + len(own), end)]
    if isinstance(spans, Zone):
        spans = [ZoneSpan(len(shared) + len(own), spans)]
    # Most epochs are those after the last purge, some are of before.
    spans = [
        ZoneSpan(span.end, span.zone, max(0, epochs.get(span.zone, 0) - (source.randrange(8) == 0)))
        for span in spans  # type: ignore[attr-defined]
    ]
    return make_request(
        name,
        shared + own,
        spans,
        epoch=spans[-1].epoch,
        max_tokens=source.randint(1, 12),
        priority=source.choice([0, 0, 0, -1, 1]),
        ignore_eos=False,
        **fields,  # type: ignore[arg-type]
    )


class EngineWalk:
    """A prefill engine and a decode engine under random work, handoffs, failures, aborts and late writes."""

    def __init__(self, seed: int, quotas: Quotas) -> None:
        self.random = random.Random(seed)
        self.epochs: Counter[Zone] = Counter()
        self.num_warmed = self.num_rekeyed = self.num_pins_refused = 0
        self.events: Counter[tuple[str, str]] = Counter()
        limits = {"max_num_batched_tokens": 24, "max_num_seqs": 6, "max_prefill_chunk": 7, "max_waiting": 8}
        self.prefill = ToyEngine(22, quotas=quotas, local_output_reserve=4, max_model_len=64, **limits)
        self.decode = ToyEngine(20, quotas=quotas, local_output_reserve=4, max_model_len=64, **limits)
        self.requests: dict[str, Request] = {}
        self.handoffs: dict[str, object] = {}  # request id -> Reservation, while the prefill side may write
        self.aborted: set[str] = set()
        self.num_refused = 0
        self.num_late_writes = 0

    def add(self) -> None:
        request = random_request(self.random, f"r{len(self.requests)}", max_prompt=30, epochs=self.epochs)
        try:
            self.decode.add_request(request)
        except QueueFullError:
            self.num_refused += 1
        else:
            self.requests[request.request_id] = request

    def reserve(self) -> None:
        name = f"r{len(self.requests)}"
        state = self.random.getstate()
        request = random_request(self.random, name, max_prompt=30, epochs=self.epochs)
        reservation = self.decode.reserve(request)
        if reservation is None:
            return
        self.random.setstate(state)
        sender = random_request(self.random, name, max_prompt=30, epochs=self.epochs, is_prefill_only=True)
        self.requests[name] = request
        self.handoffs[name] = reservation
        try:
            self.prefill.add_request(sender)
        except QueueFullError:
            self.fail(name)

    def step(self) -> None:
        engine = self.random.choice([self.prefill, self.decode, self.decode])
        engine.expire()
        if engine.has_work:
            engine.step()
        else:
            assert engine.step() == []

    def accept(self) -> None:
        for name in self._ready():
            if name in self.decode._scheduler._reserved and not self.requests[name].output_token_ids:
                self.decode.keep([self.decode.accept_first_token(name, first_token(self.prefill, name))])
                return

    def land(self) -> None:
        for name in self._ready():
            if name in self.decode._scheduler._reserved and self.requests[name].output_token_ids:
                send_prompt(self.prefill, self.decode, self.handoffs.pop(name), name)  # type: ignore[arg-type]
                self.decode.complete_handoff(name)
                self.prefill.release(name)
                return

    def fall_back(self) -> None:
        reserved = [name for name in self.handoffs if name in self.decode._scheduler._reserved]
        if reserved:
            self.decode.prefill_locally(self.random.choice(reserved))

    def late_write(self) -> None:
        """The peer's write reaches the blocks of a reservation that has been given up."""
        given_up = [name for name in self.handoffs if name not in self.decode._scheduler._reserved]
        if given_up:
            self.num_late_writes += 1
            for block_id in self.handoffs[self.random.choice(given_up)].block_ids:  # type: ignore[attr-defined]
                self.decode.runner.write_block(block_id, bytes([255]) * self.decode.runner.layout.block_bytes)

    def fence(self) -> None:
        given_up = [name for name in self.handoffs if name not in self.decode._scheduler._reserved]
        if given_up:
            self.fail(self.random.choice(given_up))

    def fail(self, name: str) -> None:
        """The handoff is over on both sides: nothing can land any more."""
        if name in self.decode._scheduler._reserved:
            self.decode.abort(name)
            self.aborted.add(name)
        del self.handoffs[name]
        self.decode.release_quarantine(name)
        self.prefill.abort(name)
        self.prefill.release(name)

    def abort(self) -> None:
        if self.requests:
            name = self.random.choice(list(self.requests))
            if self.decode._scheduler.get(name) is not None:
                self.decode.abort(name)
                self.aborted.add(name)

    def purge(self) -> None:
        """One of the replicas hears of it late: from the next request, or when the zone is purged again."""
        zone = self.random.choice(ZONES)
        self.epochs[zone] += 1
        for engine in self.random.sample([self.prefill, self.decode], k=self.random.randint(1, 2)):
            engine.purge(zone.path, self.epochs[zone])
            assert engine.epoch_floor(zone) == self.epochs[zone]

    def rekey(self) -> None:
        self.num_rekeyed += 1
        engine = self.random.choice([self.prefill, self.decode])
        engine.rekey(toy_hasher(b"%032d" % self.num_rekeyed))
        assert engine.pinned() == ()
        assert engine.num_cached_prompt_tokens(make_request("new", tokens_of(0, 15))) == 0

    def warm(self) -> None:
        """Compute a prefix ahead of its use on the prefill side, and pin it."""
        self.num_warmed += 1
        name = f"w{self.num_warmed}"
        request = random_request(self.random, name, max_prompt=30, epochs=self.epochs, is_prefill_only=True)
        try:
            self.prefill.add_request(request)
        except QueueFullError:
            self.num_refused += 1

    def pin(self) -> None:
        for name in [name for name in self.prefill._scheduler._held if name.startswith("w")]:
            try:
                self.prefill.pin(name)
            except PinRefused:
                self.num_pins_refused += 1
                self.prefill.release(name)

    def unpin(self) -> None:
        if self.prefill.pinned():
            self.prefill.unpin(self.random.choice(self.prefill.pinned()))

    def take_events(self) -> None:
        for engine in (self.prefill, self.decode):
            for event in engine.take_cache_events():
                self.events[event.kind, event.reason] += event.num_blocks

    def wait(self) -> None:
        for engine in (self.prefill, self.decode):
            engine.clock.now_s += self.random.uniform(0.0, 400.0)

    def runner_fails(self) -> None:
        self.decode.runner.fault = RuntimeError("device lost")
        if self.decode.has_work:
            try:
                self.decode.step()
            except RuntimeError:
                return
        self.decode.runner.fault = None

    def check(self) -> None:
        self.prefill.check()
        self.decode.check()
        for engine in (self.prefill, self.decode):
            assert engine.stats().running + engine.stats().reserved <= 6
            for step in engine.runner.executed:
                assert sum(len(chunk.token_ids) for chunk in step) <= 24
            engine.runner.executed.clear()

    def _ready(self) -> list[str]:
        return [name for name in self.handoffs if name in self.prefill._scheduler._held and self.prefill.tokens(name)]

    def drain(self) -> None:
        for name in list(self.handoffs):
            if name in self.decode._scheduler._reserved:
                self.decode.prefill_locally(name)
            self.fail(name)
        for engine in (self.prefill, self.decode):
            for _ in range(2000):
                if not engine.has_work:
                    break
                engine.step()
                self.check()
            assert not engine.has_work
        self.pin()
        self.take_events()


# Pools of 22 and 20 blocks, of which a longest request needs 16.
ENGINE_QUOTAS = {
    "none": NO_QUOTAS,
    "quotas": Quotas(
        public_cap=2, tenants={"acme": Quota(floor=1), "rival": Quota(floor=1, cap=6)}, zones={CASE: Quota(cap=4)}
    ),
}


@pytest.mark.parametrize(("seed", "quotas"), [(1, "none"), (2, "quotas"), (3, "quotas")])
def test_a_random_walk_over_two_engines_gives_the_oracles_tokens_and_leaks_nothing(seed: int, quotas: str) -> None:
    walk = EngineWalk(seed, ENGINE_QUOTAS[quotas])
    operations: list[Callable[[], None]] = [
        *[walk.step] * 16,
        *[walk.add, walk.reserve] * 2,
        *[walk.accept, walk.land] * 3,
        *[walk.fall_back, walk.late_write, walk.late_write, walk.fence, walk.abort, walk.runner_fails],
        *[walk.purge, walk.wait, walk.warm, walk.warm, walk.pin, walk.unpin, walk.take_events],
    ]
    for _ in range(NUM_OPERATIONS):
        operation = walk.rekey if walk.random.random() < 0.002 else walk.random.choice(operations)
        operation()
        walk.check()
    walk.drain()

    finished = 0
    for name, request in walk.requests.items():
        answer = ToyModel.continuation(request.prompt_token_ids, request.sampling.max_tokens)
        tokens = walk.decode.tokens(name)
        if name in walk.aborted:
            assert tokens == answer[: len(tokens)], name
        else:
            assert tokens == answer, name
            assert walk.decode.last(name).finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            finished += 1

    for engine in (walk.prefill, walk.decode):
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.reserved, stats.held) == (0, 0, 0, 0)
        assert (stats.blocks_used, stats.blocks_quarantined) == (0, 0)
        assert stats.prefix_cache_hits > 0
        for zone in ZONES:
            engine.purge(zone.path, 0)
        assert engine.pinned() == ()
        engine.check()
        assert engine.stats().blocks_free == engine.runner.num_blocks
        assert engine._detokenizers == {}
        assert engine._sampler._states == {}
    # The walk went where it was meant to go.
    stats = walk.decode.stats()
    assert min(stats.preemptions, stats.evictions, stats.recomputed_tokens, walk.num_late_writes) > 50
    assert finished > 200
    assert walk.num_rekeyed > 5
    assert walk.num_pins_refused > 0
    kinds = {
        ("hit", ""),
        ("store", ""),
        ("scrub", ""),
        *(("evict", why) for why in ("demand", "purge", "ttl", "rekey")),
    }
    assert kinds | {("evict", "unpin")} <= set(walk.events)
    assert (("evict", "cap") in walk.events) == (quotas == "quotas")
    engines = (walk.prefill.stats(), walk.decode.stats())
    assert sum(stats.evictions for stats in engines) == walk.events["evict", "demand"]
    assert sum(stats.quota_evictions for stats in engines) == walk.events["evict", "cap"]
    assert min(stats.stale_epochs for stats in engines) > 10
