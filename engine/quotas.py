"""How much of a pool's cache belongs to whom: floors and caps, in blocks. Values and checks, no bookkeeping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.zone import Zone, ZoneKind


@dataclass(frozen=True, slots=True)
class Quota:
    """Share of a tenant or a zone, counted in idle blocks: findable and used by nobody.

    `floor`: so many stay, the most recently used, whoever asks for room, the owner's own requests included:
        they too would otherwise throw out what a neighbour's load left them no other room for.
    `cap`: more are not kept; the owner's least recently used go. None: no cap.
    """

    floor: int = 0
    cap: int | None = None

    def __post_init__(self) -> None:
        if self.floor < 0 or (self.cap is not None and self.cap < self.floor):
            raise ValueError("a quota needs 0 <= floor <= cap")


@dataclass(frozen=True, slots=True)
class Quotas:
    """Every quota of one pool.

    `public_cap`: most public blocks that stay while no request uses them, pinned ones included. So bounded
        they are evicted for nobody. None: there is no bound, and they are evicted, after all else.
    `default`: quota of each tenant that `tenants` does not name. It has no floor, since nobody knows how many
        tenants there will be.
    `zones`: of plan and case zones, within their tenant's.
    """

    public_cap: int | None = None
    default: Quota = Quota()
    tenants: Mapping[str, Quota] = field(default_factory=dict)
    zones: Mapping[Zone, Quota] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.public_cap is not None and self.public_cap < 0:
            raise ValueError("public_cap must not be negative")
        if self.default.floor:
            raise ValueError("the default quota cannot have a floor: it would hold for any number of tenants")
        for zone in self.zones:
            if zone.kind not in (ZoneKind.PLAN, ZoneKind.CASE):
                raise ValueError(f"zone {zone} cannot have a quota: only plans and cases can")
        for tenant, floor in self._zone_floors().items():
            cap = self.of_tenant(tenant).cap
            if cap is not None and floor > cap:
                raise ValueError(f"the zone floors of tenant {tenant} add up to {floor}, more than its cap {cap}")

    def of_tenant(self, tenant: str) -> Quota:
        return self.tenants.get(tenant, self.default)

    def of_zone(self, zone: Zone) -> Quota:
        return self.zones.get(zone, _NO_QUOTA)

    @property
    def num_floor_blocks(self) -> int:
        """Most blocks that floors keep from requests: a tenant's own floor, or its zones' where they add up to
        more."""
        floors = self._zone_floors()
        return sum(max(floors[tenant], self.of_tenant(tenant).floor) for tenant in {*floors, *self.tenants})

    def _zone_floors(self) -> Counter[str]:
        floors: Counter[str] = Counter()
        for zone, quota in self.zones.items():
            floors[zone.tenant] += quota.floor
        return floors


_NO_QUOTA = Quota()
NO_QUOTAS = Quotas()
