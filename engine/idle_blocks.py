"""Idle blocks (findable, used by nobody) in the orders in which they are given up, with floors and caps.

Block ids, zones and counts only. Adding and removing a block is O(1), finding the next victim O(log zones).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from engine.errors import IntegrityError
from engine.quotas import Quota, Quotas
from engine.zone import PUBLIC, Zone, ZoneKind

_Key = TypeVar("_Key", bound=Hashable)


class IdleBlocks:
    """Who may be evicted, and who next.

    A block's age is when it became idle. A zone gives up its oldest block while it holds more than its floor;
    a tenant gives up blocks of its zones while it holds more than its own floor. `num_evictable` counts what
    all of them would give up, whoever asks.
    """

    def __init__(self, quotas: Quotas) -> None:
        self.quotas = quotas
        self.num_added = 0  # ever; also the age of the next block
        self._public: OrderedDict[int, int] = OrderedDict()  # block id -> age, oldest first; so everywhere
        self._zones: dict[Zone, _ZoneIdle] = {}
        self._tenants: dict[str, _TenantIdle] = {}
        self._offers: _Offers[str] = _Offers()
        self._num_private = 0
        self._num_surplus = 0

    def __len__(self) -> int:
        return self._num_private + len(self._public)

    @property
    def num_public(self) -> int:
        return len(self._public)

    @property
    def num_evictable(self) -> int:
        return self._num_surplus + (len(self._public) if self.quotas.public_cap is None else 0)

    def zones(self) -> list[Zone]:
        """Zones that have idle blocks."""
        return [*self._zones, *([PUBLIC] if self._public else [])]

    def has_zone(self, zone: Zone) -> bool:
        return bool(self._public) if zone == PUBLIC else zone in self._zones

    def of_zone(self, zone: Zone) -> list[int]:
        """Its blocks, oldest first."""
        if zone == PUBLIC:
            return list(self._public)
        return list(self._zones[zone].order) if zone in self._zones else []

    def add(self, block_ids: Collection[int], zone: Zone) -> None:
        """Blocks of one zone have become idle, in this order."""
        if zone.kind is ZoneKind.PUBLIC:
            self._append(self._public, block_ids)
            return
        own = self._zones.get(zone)
        if own is None:
            own = self._zones[zone] = _ZoneIdle(self.quotas.of_zone(zone))
        tenant = self._tenants.get(zone.tenant)
        if tenant is None:
            tenant = self._tenants[zone.tenant] = _TenantIdle(self.quotas.of_tenant(zone.tenant))
        num_before, surplus_before = len(own.order), tenant.surplus
        self._append(own.order, block_ids)
        self._update(zone, own, tenant, num_before, surplus_before)

    def remove(self, block_ids: Iterable[int], zone: Zone) -> None:
        """Blocks of one zone are idle no more."""
        if zone.kind is ZoneKind.PUBLIC:
            for block_id in block_ids:
                del self._public[block_id]
            return
        own, tenant = self._zones[zone], self._tenants[zone.tenant]
        num_before, surplus_before = len(own.order), tenant.surplus
        for block_id in block_ids:
            del own.order[block_id]
        self._update(zone, own, tenant, num_before, surplus_before)
        if not own.order:
            del self._zones[zone]
        if not tenant.num_idle:
            del self._tenants[zone.tenant]

    def take(self, count: int, requester: Zone, tenant_name: str) -> list[int]:
        """Remove the `count` blocks to be evicted for a request of this zone and tenant, in order.

        Raises:
            IntegrityError: Fewer are evictable.
        """
        taken: list[int] = []
        while len(taken) < count:
            zone, limit = self._next_zone(requester, tenant_name)
            block_ids = self._oldest_run(zone, min(limit, count - len(taken)))
            self.remove(block_ids, zone)
            taken += block_ids
        return taken

    def over_cap(self, zones: Collection[Zone], public_cap: int | None) -> Iterator[tuple[int, Zone]]:
        """Blocks that `zones` and their tenants hold above their caps, zones first, each oldest first. One must be
        removed before the next is asked for."""
        for zone in zones:
            cap, order = self._cap_and_order(zone, public_cap)
            while cap is not None and len(order) > cap:
                yield next(iter(order)), zone
        for name in dict.fromkeys(zone.tenant for zone in zones):
            tenant = self._tenants.get(name)
            while tenant is not None and tenant.quota.cap is not None and tenant.num_idle > tenant.quota.cap:
                yield self._oldest_of_zone(tenant.oldest())

    def foresee(
        self, revived: Mapping[Zone, int], added: Mapping[Zone, int], public_cap: int | None
    ) -> tuple[int, int]:
        """What would remain if `revived` blocks left and then `added` ones came, with caps applied.

        Returns:
            `num_evictable` then, and the blocks that caps would have freed. Both depend on counts alone: caps
            take from what is above floors, so what floors guard only grows while blocks come, and a tenant
            that has reached its cap stays there.
        """
        num_surplus, num_freed, num_public = self._num_surplus, 0, len(self._public)
        by_tenant: dict[str, list[Zone]] = {}
        for zone in {**revived, **added}:
            if zone.kind is ZoneKind.PUBLIC:
                num_public += added.get(zone, 0) - revived.get(zone, 0)
                if public_cap is not None and num_public > public_cap:
                    num_freed += num_public - public_cap
                    num_public = public_cap
            else:
                by_tenant.setdefault(zone.tenant, []).append(zone)
        for name, zones in by_tenant.items():
            tenant = self._tenants.get(name) or _TenantIdle(self.quotas.of_tenant(name))
            num_idle, num_guarded = tenant.num_idle, tenant.num_guarded
            for zone in zones:
                quota, num_now = self.quotas.of_zone(zone), len(self._zones[zone].order) if zone in self._zones else 0
                num_raw = num_now - revived.get(zone, 0) + added.get(zone, 0)
                num_then = num_raw if quota.cap is None else min(num_raw, quota.cap)
                num_freed += num_raw - num_then
                num_idle += num_then - num_now
                num_guarded += min(num_then, quota.floor) - min(num_now, quota.floor)
            cap = tenant.quota.cap
            num_kept = num_idle if cap is None else min(num_idle, cap)
            num_freed += num_idle - num_kept
            num_surplus += max(0, num_kept - max(num_guarded, tenant.quota.floor)) - tenant.surplus
        return num_surplus + (num_public if self.quotas.public_cap is None else 0), num_freed

    def check(self, expected: Mapping[int, Zone]) -> None:
        """The orders hold exactly the blocks of `expected`, and every sum and offer is what they say.

        Raises:
            IntegrityError: They do not.
        """
        held = {block_id: PUBLIC for block_id in self._public}
        for zone, own in self._zones.items():
            _require(bool(own.order), "an empty idle order was kept")
            _require(list(own.order.values()) == sorted(own.order.values()), "an idle order is out of order")
            held.update(dict.fromkeys(own.order, zone))
        _require(held == expected, "idle blocks are miscounted")
        _require(len(self) == len(held), "idle blocks are miscounted")
        _require(set(self._tenants) == {zone.tenant for zone in self._zones}, "a tenant without idle blocks was kept")
        for name, tenant in self._tenants.items():
            zones = {zone: own for zone, own in self._zones.items() if zone.tenant == name}
            guarded = sum(min(len(own.order), own.quota.floor) for own in zones.values())
            _require(tenant.num_idle == sum(len(own.order) for own in zones.values()), "a tenant is miscounted")
            _require(tenant.num_guarded == guarded, "what floors guard is miscounted")
            offers = {zone: own.offer for zone, own in zones.items() if own.offer is not None}
            _require({**tenant.cases.current, **tenant.plans.current} == offers, "a zone's offer is stale")
            _require(self._offers.current.get(name) == tenant.offer, "a tenant's offer is stale")
        _require(set(self._offers.current) <= set(self._tenants), "a tenant that is gone still offers")
        _require(self._num_surplus == sum(tenant.surplus for tenant in self._tenants.values()), "surplus is miscounted")

    def _next_zone(self, requester: Zone, tenant_name: str) -> tuple[Zone, int]:
        """The zone that gives up its oldest block next, and how many it may give up before another must."""
        tenant = self._tenants.get(tenant_name)
        offer: tuple[int, Zone] | None
        if tenant is not None and tenant.surplus:
            own = self._zones.get(requester)
            offer = (
                (0, requester) if own is not None and own.surplus else tenant.cases.oldest() or tenant.plans.oldest()
            )
        else:
            offered = self._offers.oldest()
            tenant = None if offered is None else self._tenants[offered[1]]
            offer = None if tenant is None else tenant.oldest()
        if tenant is not None and offer is not None:
            return offer[1], min(tenant.surplus, self._zones[offer[1]].surplus)
        if self._public and self.quotas.public_cap is None:
            return PUBLIC, len(self._public)
        raise IntegrityError("the idle blocks that were counted as available are not there")

    def _oldest_run(self, zone: Zone, limit: int) -> list[int]:
        """The zone's oldest block, and those that became idle right after it: no other zone's lies between."""
        order = self._public if zone.kind is ZoneKind.PUBLIC else self._zones[zone].order
        run: list[int] = []
        last = 0
        for block_id, age in islice(order.items(), limit):
            if run and age != last + 1:
                break
            run.append(block_id)
            last = age
        return run

    def _append(self, order: OrderedDict[int, int], block_ids: Collection[int]) -> None:
        first = self.num_added + 1
        self.num_added += len(block_ids)
        order.update(zip(block_ids, range(first, self.num_added + 1), strict=True))

    def _cap_and_order(self, zone: Zone, public_cap: int | None) -> tuple[int | None, OrderedDict[int, int]]:
        if zone.kind is ZoneKind.PUBLIC:
            return public_cap, self._public
        own = self._zones.get(zone)
        return (None, OrderedDict()) if own is None else (own.quota.cap, own.order)

    def _update(self, zone: Zone, own: _ZoneIdle, tenant: _TenantIdle, num_before: int, surplus_before: int) -> None:
        """Bring offers and sums in line after blocks of `zone` have come or gone."""
        num_now, floor = len(own.order), own.quota.floor
        tenant.num_idle += num_now - num_before
        tenant.num_guarded += min(num_now, floor) - min(num_before, floor)
        self._num_private += num_now - num_before
        orders = tenant.cases if zone.kind is ZoneKind.CASE else tenant.plans
        orders.put(zone, own.offer)
        self._offers.put(zone.tenant, tenant.offer)
        self._num_surplus += tenant.surplus - surplus_before

    def _oldest_of_zone(self, offer: tuple[int, Zone] | None) -> tuple[int, Zone]:
        if offer is None:
            raise IntegrityError("a tenant above its floor has no block to give up")
        return next(iter(self._zones[offer[1]].order)), offer[1]


class _Offers(Generic[_Key]):
    """Who would give up a block of which age; the oldest first. A heap that is cleaned when it is looked at."""

    def __init__(self) -> None:
        self.current: dict[_Key, int] = {}
        self._heap: list[tuple[int, _Key]] = []  # no two keys ever have the same age, so keys are not compared

    def put(self, key: _Key, age: int | None) -> None:
        if self.current.get(key) == age:
            return
        if age is None:
            del self.current[key]
            return
        self.current[key] = age
        heapq.heappush(self._heap, (age, key))
        if len(self._heap) > 2 * len(self.current) + 16:
            self._heap = [(age, key) for key, age in self.current.items()]
            heapq.heapify(self._heap)

    def oldest(self) -> tuple[int, _Key] | None:
        while self._heap and self.current.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None


@dataclass(slots=True)
class _ZoneIdle:
    quota: Quota
    order: OrderedDict[int, int] = field(default_factory=OrderedDict)

    @property
    def surplus(self) -> int:
        return max(0, len(self.order) - self.quota.floor)

    @property
    def offer(self) -> int | None:
        """Age of the block that it gives up next; None at its floor."""
        return next(iter(self.order.values())) if self.surplus else None


@dataclass(slots=True)
class _TenantIdle:
    """`num_guarded`: what its zones' floors keep."""

    quota: Quota
    num_idle: int = 0
    num_guarded: int = 0
    cases: _Offers[Zone] = field(default_factory=_Offers[Zone])
    plans: _Offers[Zone] = field(default_factory=_Offers[Zone])

    @property
    def surplus(self) -> int:
        return max(0, self.num_idle - max(self.num_guarded, self.quota.floor))

    @property
    def offer(self) -> int | None:
        oldest = self.oldest() if self.surplus else None
        return None if oldest is None else oldest[0]

    def oldest(self) -> tuple[int, Zone] | None:
        offers = [offer for offer in (self.cases.oldest(), self.plans.oldest()) if offer is not None]
        return min(offers, default=None)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
