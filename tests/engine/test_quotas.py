"""Quotas, and the orders of idle blocks against a model that recounts everything for each question."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from engine.errors import IntegrityError
from engine.idle_blocks import IdleBlocks
from engine.quotas import NO_QUOTAS, Quota, Quotas
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneKind
from tests.engine.toy_model import CASE, OTHER_CASE, PLAN, RIVAL_CASE

RIVAL_PLAN = Zone.parse("tenant/rival/plan/gold")
THIRD_CASE = Zone.parse("tenant/third/case/c1")
CACHEABLE = (PUBLIC, PLAN, CASE, OTHER_CASE, RIVAL_CASE, RIVAL_PLAN, THIRD_CASE)
SETS = {
    "none": NO_QUOTAS,
    "floors": Quotas(public_cap=4, tenants={"acme": Quota(floor=3), "rival": Quota(floor=2)}),
    "zone floors": Quotas(
        tenants={"acme": Quota(floor=2)}, zones={PLAN: Quota(floor=2), CASE: Quota(floor=1), RIVAL_PLAN: Quota(floor=3)}
    ),
    "caps": Quotas(
        public_cap=3,
        default=Quota(cap=4),
        tenants={"acme": Quota(cap=6)},
        zones={PLAN: Quota(cap=2), CASE: Quota(cap=3)},
    ),
    "both": Quotas(
        public_cap=2,
        default=Quota(cap=3),
        tenants={"acme": Quota(floor=4, cap=7), "rival": Quota(floor=1, cap=4)},
        zones={PLAN: Quota(floor=2, cap=4), OTHER_CASE: Quota(floor=1, cap=2), RIVAL_PLAN: Quota(floor=2)},
    ),
}


class LiteralIdle:
    """Idle blocks in one list, oldest first; every answer is found by trying."""

    def __init__(self, quotas: Quotas, blocks: Sequence[tuple[int, Zone]] = ()) -> None:
        self.quotas = quotas
        self.blocks = list(blocks)

    def copy(self) -> LiteralIdle:
        return LiteralIdle(self.quotas, self.blocks)

    def offered(self) -> list[tuple[int, Zone]]:
        """Blocks of zones and tenants above their floors, oldest first."""
        zones = Counter(zone for _, zone in self.blocks)
        tenants = Counter(zone.tenant for _, zone in self.blocks)
        return [
            (block_id, zone)
            for block_id, zone in self.blocks
            if zone != PUBLIC
            and zones[zone] > self.quotas.of_zone(zone).floor
            and tenants[zone.tenant] > self.quotas.of_tenant(zone.tenant).floor
        ]

    def victim(self, requester: Zone, tenant: str) -> tuple[int, Zone] | None:
        offered = self.offered()
        own = [item for item in offered if item[1].tenant == tenant]
        public = [item for item in self.blocks if item[1] == PUBLIC and self.quotas.public_cap is None]
        orders = (
            [item for item in own if item[1] == requester],
            [item for item in own if item[1].kind is ZoneKind.CASE],
            own,
            offered,
            public,
        )
        return next((order[0] for order in orders if order), None)

    def num_evictable(self) -> int:
        rest, count = self.copy(), 0
        while (victim := rest.victim(EPHEMERAL, "")) is not None:
            rest.blocks.remove(victim)
            count += 1
        return count

    def over_cap(self) -> list[tuple[int, Zone]]:
        """What caps take now, in order; taken."""
        gone = []
        while (item := self._first_over_cap()) is not None:
            self.blocks.remove(item)
            gone.append(item)
        return gone

    def _first_over_cap(self) -> tuple[int, Zone] | None:
        zones = Counter(zone for _, zone in self.blocks)
        for zone, count in zones.items():
            cap = self.quotas.public_cap if zone == PUBLIC else self.quotas.of_zone(zone).cap
            if cap is not None and count > cap:
                return next(item for item in self.blocks if item[1] == zone)
        tenants = Counter(zone.tenant for _, zone in self.blocks if zone != PUBLIC)
        for tenant, count in tenants.items():
            cap = self.quotas.of_tenant(tenant).cap
            if cap is not None and count > cap:
                return next(
                    (block_id, zone)
                    for block_id, zone in self.blocks
                    if zone.tenant == tenant and zone != PUBLIC and zones[zone] > self.quotas.of_zone(zone).floor
                )
        return None


class Walk:
    """The idle blocks beside their model, under random additions, removals, evictions and questions."""

    def __init__(self, quotas: Quotas, seed: int) -> None:
        self.random = random.Random(seed)
        self.quotas = quotas
        self.idle, self.model = IdleBlocks(quotas), LiteralIdle(quotas)
        self.num_blocks = self.num_capped = self.num_refused = 0

    def add(self) -> None:
        if len(self.model.blocks) >= 20:  # or the model becomes slow
            return
        zone = self.random.choice(CACHEABLE)
        block_ids = [self.num_blocks + number for number in range(self.random.randint(1, 3))]
        self.num_blocks += len(block_ids)
        self.idle.add(block_ids, zone)
        self.model.blocks += [(block_id, zone) for block_id in block_ids]
        expected = self.model.over_cap()
        taken = []
        for block_id, owner in self.idle.over_cap([zone], self.quotas.public_cap):
            self.idle.remove([block_id], owner)
            taken.append((block_id, owner))
        assert taken == expected
        self.num_capped += len(taken)

    def remove(self) -> None:
        if self.model.blocks:
            item = self.random.choice(self.model.blocks)
            self.model.blocks.remove(item)
            self.idle.remove([item[0]], item[1])

    def evict(self) -> None:
        requester = self.random.choice((*CACHEABLE, EPHEMERAL))
        tenant = requester.tenant or self.random.choice(["", "acme", "rival", "third", "unknown"])
        count, expected = self.random.randint(1, 4), list[int]()
        while len(expected) < count and (victim := self.model.victim(requester, tenant)) is not None:
            self.model.blocks.remove(victim)
            expected.append(victim[0])
        assert self.idle.take(len(expected), requester, tenant) == expected
        if len(expected) < count:
            self.num_refused += 1
            with pytest.raises(IntegrityError, match="counted as available"):
                self.idle.take(1, requester, tenant)

    def foresee(self) -> None:
        revived = self.random.sample(self.model.blocks, k=self.random.randint(0, min(4, len(self.model.blocks))))
        added = [self.random.choice(CACHEABLE) for _ in range(self.random.randint(0, 8))]
        future, num_freed = self.model.copy(), 0
        for item in revived:
            future.blocks.remove(item)
        for index, zone in enumerate(added):
            future.blocks.append((-index - 1, zone))
            num_freed += len(future.over_cap())
        foreseen = self.idle.foresee(Counter(zone for _, zone in revived), Counter(added), self.quotas.public_cap)
        assert foreseen == (future.num_evictable(), num_freed)

    def check(self) -> None:
        self.idle.check(dict(self.model.blocks))
        assert self.idle.num_evictable == self.model.num_evictable()
        assert len(self.idle) == len(self.model.blocks)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", SETS)
def test_victims_counts_and_foresight_agree_with_a_model_that_tries_everything(name: str, seed: int) -> None:
    walk = Walk(SETS[name], seed)
    operations = [*[walk.add] * 4, walk.remove, *[walk.evict] * 3, walk.foresee]
    for _ in range(4000):
        walk.random.choice(operations)()
        walk.check()
    while walk.model.blocks:
        walk.remove()
        walk.check()
    assert (walk.idle._zones, walk.idle._tenants, walk.idle._offers.current) == ({}, {}, {})
    caps, floors = name in ("caps", "both"), name in ("floors", "both", "zone floors")
    assert (walk.num_capped > 20) == (caps or name == "floors")  # public has a cap there
    assert not floors or walk.num_refused > 10


def test_what_is_remembered_of_stale_offers_is_bounded() -> None:
    idle = IdleBlocks(NO_QUOTAS)
    for block_id in range(10_000):
        idle.add([block_id], (CASE, OTHER_CASE)[block_id % 2])
        if block_id >= 2:
            idle.remove([block_id - 2], (CASE, OTHER_CASE)[block_id % 2])
    assert len(idle._offers._heap) < 40
    assert len(idle._tenants["acme"].cases._heap) < 40


@pytest.mark.parametrize("field", ["num_idle", "num_guarded"])
def test_check_notices_a_tenant_that_is_miscounted(field: str) -> None:
    idle = IdleBlocks(SETS["zone floors"])
    idle.add([1], PLAN)
    setattr(idle._tenants["acme"], field, 2)
    with pytest.raises(IntegrityError, match="counted"):
        idle.check({1: PLAN})


def test_a_cap_below_its_floor_is_refused() -> None:
    with pytest.raises(ValueError, match="floor <= cap"):
        Quota(floor=3, cap=2)
    with pytest.raises(ValueError, match="floor <= cap"):
        Quota(floor=-1)


def test_a_negative_public_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="public_cap"):
        Quotas(public_cap=-1)


def test_a_floor_for_every_tenant_is_refused_since_their_number_is_unknown() -> None:
    with pytest.raises(ValueError, match="any number of tenants"):
        Quotas(default=Quota(floor=1))


@pytest.mark.parametrize("zone", [PUBLIC, EPHEMERAL, Zone.parse("tenant/acme/mixed")])
def test_only_plans_and_cases_have_zone_quotas(zone: Zone) -> None:
    with pytest.raises(ValueError, match="only plans and cases"):
        Quotas(zones={zone: Quota(cap=1)})


@pytest.mark.parametrize("quotas", [{"default": Quota(cap=3)}, {"tenants": {"acme": Quota(cap=3)}}])
def test_zone_floors_above_their_tenants_cap_are_refused(quotas: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="add up to 4, more than its cap 3"):
        Quotas(zones={PLAN: Quota(floor=2), CASE: Quota(floor=2)}, **quotas)  # type: ignore[arg-type]


def test_the_blocks_that_floors_keep_are_each_tenants_or_its_zones_whichever_is_more() -> None:
    quotas = Quotas(
        tenants={"acme": Quota(floor=3), "rival": Quota(floor=5)},
        zones={PLAN: Quota(floor=2), CASE: Quota(floor=2), RIVAL_PLAN: Quota(floor=1), THIRD_CASE: Quota(floor=7)},
    )
    assert quotas.num_floor_blocks == 4 + 5 + 7
