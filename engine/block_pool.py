"""Who owns each KV block: reference counts, zones, generations, the digest index, eviction, quarantine.

Bookkeeping over block ids. Holds no KV and knows no requests; the caller's `scrub` zeroes memory.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from engine.cache_events import CacheEventLog, EvictionReason
from engine.errors import IntegrityError
from engine.idle_blocks import IdleBlocks
from engine.quotas import NO_QUOTAS, Quotas
from engine.zone import Zone, ZoneKind


@dataclass(slots=True)
class _Block:
    """One block. Its state follows from the fields:

    quarantined: `quarantined_for` is set. pinned: `num_pins` > 0. used: `ref_count` > 0, not pinned. idle:
    `digest` is set and nobody uses it. free: none of these; it then holds nothing that needs scrubbing.
    `ref_count` counts pins as well.
    """

    ref_count: int = 0
    num_pins: int = 0
    generation: int = 0
    zone: Zone | None = None
    digest: bytes | None = None
    needs_scrub: bool = False
    quarantined_for: str | None = None


class BlockPool:
    """The blocks of one KV cache.

    A block is free, used (by one request or, when findable, by several of its zone), idle (used by
    nobody, still findable), pinned (findable and kept, used or not) or quarantined (a remote write may still
    land in it).

    Eviction: free blocks go first, lowest id first, so that tables are mostly contiguous and a transfer
    merges neighbours. Then idle ones, least recently used first: of the requester's own zone, of its tenant's
    other cases, of its tenant's plans, of any tenant. Nobody takes what a floor keeps, its owner neither: a
    request waits instead, so how much of its cache a tenant finds again does not depend on its neighbours.
    Public blocks are evicted for nobody where `Quotas.public_cap` bounds them, and after all else where not.
    Above a cap the owner's least recently used blocks go at once.
    """

    def __init__(
        self,
        num_blocks: int,
        scrub: Callable[[Sequence[int]], None],
        *,
        quotas: Quotas = NO_QUOTAS,
        events: CacheEventLog | None = None,
    ) -> None:
        """
        Args:
            scrub: Zeroes the given blocks before it returns, or before anything issued later reads them.
            events: Where evictions and scrubs are recorded.
        """
        if num_blocks < 1:
            raise ValueError("a block pool needs at least one block")
        self.num_blocks = num_blocks
        self.quotas = quotas
        self.events = CacheEventLog() if events is None else events
        self.num_scrubbed = 0
        self.num_evictions = 0
        self.num_quota_evictions = 0
        self._scrub = scrub
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free = list(range(num_blocks))  # a heap
        self._idle = IdleBlocks(quotas)
        self._by_digest: dict[bytes, int] = {}
        self._quarantined: dict[str, list[int]] = {}
        self._num_quarantined = 0
        self._num_pinned = 0
        self._num_pinned_public = 0
        self._num_freed = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_quarantined(self) -> int:
        return self._num_quarantined

    @property
    def num_used(self) -> int:
        """Blocks in use and not pinned."""
        return self.num_blocks - self.num_free - self.num_idle - self.num_quarantined - self.num_pinned

    @property
    def num_pinned(self) -> int:
        return self._num_pinned

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now. It depends on no requester: nobody may go under a floor."""
        return self.num_free + self._idle.num_evictable

    @property
    def version(self) -> tuple[int, int]:
        """Another one whenever blocks have become free or idle."""
        return self._num_freed, self._idle.num_added

    def num_dependable(self, pinned_besides: Collection[int] = ()) -> int:
        """Blocks that are available whenever no request holds any and none are in quarantine.

        Args:
            pinned_besides: Findable blocks to be counted as pinned.
        """
        new = [block_id for block_id in pinned_besides if not self.is_pinned(block_id)]
        num_new_public = sum(self._is_public(block_id) for block_id in new)
        num_public = max(self.quotas.public_cap or 0, self._num_pinned_public + num_new_public)
        num_others = self._num_pinned - self._num_pinned_public + len(new) - num_new_public
        return self.num_blocks - num_public - num_others - self.quotas.num_floor_blocks

    def num_available_after(self, revived: Sequence[int], freed: Iterable[int]) -> int:
        """`num_available` once the idle ones of `revived` are in use and then the last users of `freed` left."""
        gone = Counter(self._zone_of(block_id) for block_id in revived if self.is_idle(block_id))
        num_freed, idle = 0, Counter[Zone]()
        for block_id in freed:
            if self._blocks[block_id].digest is None:
                num_freed += 1
            else:
                idle[self._zone_of(block_id)] += 1
        num_evictable, num_capped = self._idle.foresee(gone, idle, self._public_cap)
        return self.num_free + num_freed + num_capped + num_evictable

    def zone(self, block_id: int) -> Zone | None:
        """Owner zone; None for a block that was never used or is clean again."""
        return self._blocks[block_id].zone

    def generation(self, block_id: int) -> int:
        """How often the block has been handed out anew."""
        return self._blocks[block_id].generation

    def ref_count(self, block_id: int) -> int:
        return self._blocks[block_id].ref_count

    def is_idle(self, block_id: int) -> bool:
        block = self._blocks[block_id]
        return block.digest is not None and block.ref_count == 0

    def idle_zones(self) -> list[Zone]:
        """Zones that have idle blocks."""
        return self._idle.zones()

    def has_idle(self, zone: Zone) -> bool:
        return self._idle.has_zone(zone)

    def allocate(
        self, zones: Sequence[Zone], requester: Zone, *, tenant: str = "", request_id: str = ""
    ) -> list[int] | None:
        """Take one block for each of `zones`, the owner zones in table order.

        Args:
            requester: Zone on whose behalf idle blocks are evicted.
            tenant: Its tenant, where the zone names none.
            request_id: For the record of evictions.

        Returns:
            The ids, each with reference count 1 and a new generation; None when fewer are
            available, and then nothing has changed.
        """
        if len(zones) > self.num_available:
            return None
        self._evict(len(zones) - len(self._free), requester, tenant or requester.tenant, request_id)
        block_ids = [heapq.heappop(self._free) for _ in zones]
        for block_id, zone in zip(block_ids, zones, strict=True):
            block = self._blocks[block_id]
            block.ref_count = 1
            block.generation += 1
            block.zone = zone
            block.needs_scrub = zone.is_scrubbed
        return block_ids

    def find(self, digest: bytes, zone: Zone) -> int | None:
        """The findable block with this digest.

        Raises:
            IntegrityError: It belongs to another zone: the digest does not bind its zone.
        """
        block_id = self._by_digest.get(digest)
        if block_id is not None and self._blocks[block_id].zone != zone:
            raise IntegrityError(f"block {block_id} of zone {self._blocks[block_id].zone} found from {zone}")
        return block_id

    def acquire(self, block_ids: Sequence[int]) -> None:
        """One more user of each of these findable blocks.

        Raises:
            IntegrityError: A block is not findable, so nobody may share it; nothing has changed.
        """
        for block_id in block_ids:
            if self._blocks[block_id].digest is None:
                raise IntegrityError(f"block {block_id} is not findable and cannot be shared")
        for zone, idle in groupby(filter(self.is_idle, block_ids), self._zone_of):
            self._idle.remove(idle, zone)
        for block_id in block_ids:
            self._blocks[block_id].ref_count += 1

    def publish(self, block_id: int, digest: bytes) -> bool:
        """Make a used, full block findable. Where its content already is, the earlier block stays.

        Returns:
            True where the block was not findable before.

        Raises:
            IntegrityError: The block is not in use, is published otherwise, or its zone is not cacheable.
        """
        block = self._blocks[block_id]
        if block.ref_count == 0 or block.digest not in (None, digest):
            raise IntegrityError(f"block {block_id} cannot be published in its state")
        if not self._zone_of(block_id).is_cacheable:
            raise IntegrityError(f"block {block_id} of zone {block.zone} must not become findable")
        if self.find(digest, self._zone_of(block_id)) is not None:
            return False
        self._by_digest[digest] = block_id
        block.digest = digest
        return True

    def release(self, block_ids: Sequence[int]) -> None:
        """One user less of each. The last user leaves a findable block idle; any other becomes free.

        Later blocks of a table go idle first, so that eviction takes a chain from its end.

        Raises:
            IntegrityError: A block is not in use.
        """
        unused: list[int] = []
        idle: list[int] = []
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            if block.ref_count <= block.num_pins:
                raise IntegrityError(f"block {block_id} was freed twice")
            block.ref_count -= 1
            if block.ref_count == 0:
                (unused if block.digest is None else idle).append(block_id)
        runs = [(zone, list(run)) for zone, run in groupby(idle, self._zone_of)]
        for zone, run in runs:
            self._idle.add(run, zone)
        self._clean(unused)
        self._apply_caps([zone for zone, _ in runs])

    def pin(self, block_ids: Sequence[int]) -> None:
        """Keep findable blocks until `unpin`, once for each call that names them.

        Raises:
            IntegrityError: A block is not findable.
        """
        self.acquire(block_ids)
        for block_id in block_ids:
            block = self._blocks[block_id]
            block.num_pins += 1
            if block.num_pins == 1:
                self._count_pinned(block_id, 1)
        self._apply_caps(self._count_zones(block_ids))

    def unpin(self, block_ids: Sequence[int]) -> int:
        """End a pin. A block that nobody uses then is dropped from the index and freed; any other stays findable.

        Returns:
            How many blocks were freed.

        Raises:
            IntegrityError: A block is not pinned.
        """
        unused = []
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.num_pins < 1:
                raise IntegrityError(f"block {block_id} is not pinned")
            block.num_pins -= 1
            block.ref_count -= 1
            if block.num_pins == 0:
                self._count_pinned(block_id, -1)
            if block.ref_count == 0:
                unused.append(block_id)
        self._drop([block_id for block_id in unused if self._blocks[block_id].digest is not None], "unpin")
        self._clean(unused)
        return len(unused)

    def quarantine(self, block_ids: Sequence[int], owner: str) -> None:
        """Take blocks that a remote write may still reach out of use until `release_quarantine(owner)`.

        Raises:
            IntegrityError: `owner` already has blocks there, or a block is shared or findable.
        """
        if owner in self._quarantined:
            raise IntegrityError(f"{owner} already has blocks in quarantine")
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count != 1 or block.digest is not None:
                raise IntegrityError(f"block {block_id} is shared and cannot go to quarantine")
            block.ref_count = 0
            block.quarantined_for = owner
        if block_ids:
            self._quarantined[owner] = list(block_ids)
            self._num_quarantined += len(block_ids)

    def has_quarantined(self, owner: str) -> bool:
        return owner in self._quarantined

    def release_quarantine(self, owner: str) -> int:
        """The fence has passed: scrub and free the owner's blocks. Returns how many; 0 when called again."""
        block_ids = self._quarantined.pop(owner, [])
        self._num_quarantined -= len(block_ids)
        for block_id in block_ids:
            self._blocks[block_id].quarantined_for = None
            self._blocks[block_id].needs_scrub = True
        self._clean(block_ids)
        return len(block_ids)

    def is_pinned(self, block_id: int) -> bool:
        return self._blocks[block_id].num_pins > 0

    def of_zone(self, zone: Zone) -> list[int]:
        """Every block that holds something of `zone`, in quarantine or not. Linear in the pool."""
        return [block_id for block_id, block in enumerate(self._blocks) if block.zone == zone]

    def purge(self, zone: Zone) -> int:
        """Make nothing of `zone` findable: idle blocks are scrubbed and freed, used ones when released.

        Returns:
            How many blocks were findable.
        """
        block_ids = self.of_zone(zone)
        for block_id in block_ids:
            self._blocks[block_id].needs_scrub = True
        return self._withdraw(block_ids, "purge")

    def drop_all(self, reason: EvictionReason) -> int:
        """Make nothing findable: idle blocks are freed, used ones when released. Returns how many."""
        return self._withdraw(range(self.num_blocks), reason)

    def drop_idle(self, zone: Zone, reason: EvictionReason) -> int:
        """Free all idle blocks of `zone`. Returns how many."""
        return self._withdraw(self._idle.of_zone(zone), reason)

    def check(self) -> None:
        """Every block is in exactly one state, and the index, the idle order and the counts agree.

        Raises:
            IntegrityError: They do not.
        """
        free = set(self._free)
        quarantined = {block_id for block_ids in self._quarantined.values() for block_id in block_ids}
        _require(len(free) == len(self._free), "a block is free twice")
        _require(len(quarantined) == self._num_quarantined, "quarantine is miscounted")
        idle = {}
        for block_id, block in enumerate(self._blocks):
            is_idle = self.is_idle(block_id)
            if is_idle:
                idle[block_id] = self._zone_of(block_id)
            states = (block_id in free, block_id in quarantined, is_idle, block.ref_count > 0)
            _require(sum(states) == 1, f"block {block_id} is in {sum(states)} states")
            _require((block.quarantined_for is not None) == (block_id in quarantined), "quarantine differs")
            _require(0 <= block.num_pins <= block.ref_count, f"block {block_id} is pinned and not in use")
            if block.digest is not None:
                _require(self._by_digest.get(block.digest) == block_id, f"block {block_id} is not in the index")
                _require(self._zone_of(block_id).is_cacheable, f"block {block_id} must not be findable")
            if block_id in free:
                _require(not block.needs_scrub, f"block {block_id} is free and dirty")
        num_findable = sum(block.digest is not None for block in self._blocks)
        _require(num_findable == len(self._by_digest), "the index names a block that is not findable")
        self._idle.check(idle)
        pinned = [block for block in self._blocks if block.num_pins]
        num_public = sum(block.zone is not None and block.zone.kind is ZoneKind.PUBLIC for block in pinned)
        _require((self._num_pinned, self._num_pinned_public) == (len(pinned), num_public), "pins are miscounted")
        over_cap = next(self._idle.over_cap(self._idle.zones(), self._public_cap), None)
        _require(over_cap is None, f"more is idle than a cap allows: {over_cap}")

    @property
    def _public_cap(self) -> int | None:
        """Idle public blocks that may stay: pinned ones count among those that `Quotas.public_cap` bounds."""
        cap = self.quotas.public_cap
        return None if cap is None else max(0, cap - self._num_pinned_public)

    def _evict(self, count: int, requester: Zone, tenant: str, request_id: str) -> None:
        victims = self._idle.take(count, requester, tenant)
        self.num_evictions += len(victims)
        self._drop(victims, "demand", request_id=request_id, requester=requester)
        self._clean(victims)

    def _apply_caps(self, zones: Collection[Zone]) -> None:
        victims = []
        for block_id, zone in self._idle.over_cap(zones, self._public_cap):
            self._idle.remove([block_id], zone)
            victims.append(block_id)
        self.num_quota_evictions += len(victims)
        self._drop(victims, "cap")
        self._clean(victims)

    def _withdraw(self, block_ids: Iterable[int], reason: EvictionReason) -> int:
        """Make blocks unfindable, and free those that nobody uses. Returns how many were findable."""
        findable = [block_id for block_id in block_ids if self._blocks[block_id].digest is not None]
        idle = [block_id for block_id in findable if self.is_idle(block_id)]
        for zone, run in groupby(idle, self._zone_of):
            self._idle.remove(run, zone)
        self._drop(findable, reason)
        self._clean(idle)
        return len(findable)

    def _drop(
        self, block_ids: Sequence[int], reason: EvictionReason, *, request_id: str = "", requester: Zone | None = None
    ) -> None:
        """Take findable blocks out of the index."""
        for block_id in block_ids:
            digest = self._blocks[block_id].digest
            if digest is None or self._by_digest.pop(digest, None) != block_id:
                raise IntegrityError(f"block {block_id} is not in the index")
            self._blocks[block_id].digest = None
        for zone, count in self._count_zones(block_ids).items():
            self.events.record("evict", zone, count, reason=reason, request_id=request_id, requester=requester)

    def _count_pinned(self, block_id: int, change: int) -> None:
        self._num_pinned += change
        self._num_pinned_public += change * self._is_public(block_id)

    def _is_public(self, block_id: int) -> bool:
        return self._zone_of(block_id).kind is ZoneKind.PUBLIC

    def _count_zones(self, block_ids: Iterable[int]) -> Mapping[Zone, int]:
        return Counter(self._zone_of(block_id) for block_id in block_ids)

    def _clean(self, block_ids: Iterable[int]) -> None:
        """Scrub what needs it, in one call, then hand the blocks to the free list."""
        block_ids = sorted(block_ids)
        self._num_freed += len(block_ids)
        dirty = [block_id for block_id in block_ids if self._blocks[block_id].needs_scrub]
        if dirty:
            self._scrub(dirty)
            self.num_scrubbed += len(dirty)
            for zone, count in self._count_zones(dirty).items():
                self.events.record("scrub", zone, count)
        for block_id in block_ids:
            block = self._blocks[block_id]
            block.zone = None
            block.needs_scrub = False
            heapq.heappush(self._free, block_id)

    def _zone_of(self, block_id: int) -> Zone:
        zone = self._blocks[block_id].zone
        if zone is None:
            raise IntegrityError(f"block {block_id} has no owner zone")
        return zone


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
