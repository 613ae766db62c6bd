"""Who owns each KV block: reference counts, zones, generations, the digest index, eviction, quarantine.

Bookkeeping over block ids. Holds no KV and knows no requests; the caller's `scrub` zeroes memory.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from engine.errors import IntegrityError
from engine.zone import PUBLIC, Zone, ZoneKind

_Key = TypeVar("_Key", Zone, str)


@dataclass(slots=True)
class _Block:
    """One block. Its state follows from the fields:

    quarantined: `quarantined_for` is set. used: `ref_count` > 0. idle: `digest` is set and nobody
    uses it. free: none of these; it then holds nothing that needs scrubbing.
    """

    ref_count: int = 0
    generation: int = 0
    zone: Zone | None = None
    digest: bytes | None = None
    needs_scrub: bool = False
    quarantined_for: str | None = None


class BlockPool:
    """The blocks of one KV cache.

    A block is free, used (by one request or, when findable, by several of its zone), idle (used by
    nobody, still findable) or quarantined (a remote write may still land in it).

    Eviction: free blocks go first, lowest id first, so that tables are mostly contiguous and a transfer
    merges neighbours. Then the least recently used idle block of the requester's own zone, then of
    its tenant's private zones, then of any zone but public. Public blocks go last: they are evicted
    only where the pool holds nothing else, since refusing work for a template would be worse.
    """

    def __init__(self, num_blocks: int, scrub: Callable[[Sequence[int]], None]) -> None:
        """
        Args:
            scrub: Zeroes the given blocks before it returns, or before anything issued later reads them.
        """
        if num_blocks < 1:
            raise ValueError("a block pool needs at least one block")
        self.num_blocks = num_blocks
        self.num_scrubbed = 0
        self.num_evictions = 0
        self._scrub = scrub
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free = list(range(num_blocks))  # a heap
        self._idle = _IdleBlocks()
        self._by_digest: dict[bytes, int] = {}
        self._quarantined: dict[str, list[int]] = {}
        self._num_quarantined = 0

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
        return self.num_blocks - self.num_free - self.num_idle - self.num_quarantined

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return self.num_free + self.num_idle

    def zone(self, block_id: int) -> Zone | None:
        """Owner zone; None for a block that was never used or is clean again."""
        return self._blocks[block_id].zone

    def generation(self, block_id: int) -> int:
        """How often the block has been handed out anew."""
        return self._blocks[block_id].generation

    def ref_count(self, block_id: int) -> int:
        return self._blocks[block_id].ref_count

    def is_idle(self, block_id: int) -> bool:
        return block_id in self._idle

    def idle_zones(self) -> list[Zone]:
        """Zones that have idle blocks."""
        return self._idle.zones()

    def allocate(self, zones: Sequence[Zone], requester: Zone) -> list[int] | None:
        """Take one block for each of `zones`, the owner zones in table order.

        Args:
            requester: Zone on whose behalf idle blocks are evicted.

        Returns:
            The ids, each with reference count 1 and a new generation; None when fewer are
            available, and then nothing has changed.
        """
        if len(zones) > self.num_available:
            return None
        self._evict(len(zones) - len(self._free), requester)
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

    def acquire(self, block_id: int) -> None:
        """One more user of a findable block.

        Raises:
            IntegrityError: The block is not findable, so nobody may share it.
        """
        block = self._blocks[block_id]
        if block.digest is None:
            raise IntegrityError(f"block {block_id} is not findable and cannot be shared")
        if block.ref_count == 0:
            self._idle.remove(block_id, self._zone_of(block_id))
        block.ref_count += 1

    def publish(self, block_id: int, digest: bytes) -> None:
        """Make a used, full block findable. Where its content already is, the earlier block stays.

        Raises:
            IntegrityError: The block is not in use, is published otherwise, or its zone is not cacheable.
        """
        block = self._blocks[block_id]
        if block.ref_count == 0 or block.digest not in (None, digest):
            raise IntegrityError(f"block {block_id} cannot be published in its state")
        if not self._zone_of(block_id).is_cacheable:
            raise IntegrityError(f"block {block_id} of zone {block.zone} must not become findable")
        if self.find(digest, self._zone_of(block_id)) is None:
            self._by_digest[digest] = block_id
            block.digest = digest

    def release(self, block_ids: Sequence[int]) -> None:
        """One user less of each. The last user leaves a findable block idle; any other becomes free.

        Later blocks of a table go idle first, so that eviction takes a chain from its end.

        Raises:
            IntegrityError: A block is not in use.
        """
        unused = []
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            if block.ref_count < 1:
                raise IntegrityError(f"block {block_id} was freed twice")
            block.ref_count -= 1
            if block.ref_count == 0 and block.digest is not None:
                self._idle.add(block_id, self._zone_of(block_id))
            elif block.ref_count == 0:
                unused.append(block_id)
        self._clean(unused)

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

    def purge(self, zone: Zone) -> int:
        """Make nothing of `zone` findable: idle blocks are scrubbed and freed, used ones when released.

        Returns:
            How many blocks were findable.
        """
        num_dropped = 0
        for block_id, block in enumerate(self._blocks):
            if block.zone != zone:
                continue
            block.needs_scrub = True
            if block.digest is not None and block.ref_count > 0:
                self._forget(block_id)
                num_dropped += 1
        return num_dropped + self.drop_idle(zone)

    def drop_idle(self, zone: Zone) -> int:
        """Free all idle blocks of `zone`. Returns how many."""
        block_ids = self._idle.of_zone(zone)
        for block_id in block_ids:
            self._idle.remove(block_id, zone)
            self._forget(block_id)
        self._clean(block_ids)
        return len(block_ids)

    def check(self) -> None:
        """Every block is in exactly one state, and the index, the idle order and the counts agree.

        Raises:
            IntegrityError: They do not.
        """
        free = set(self._free)
        quarantined = {block_id for block_ids in self._quarantined.values() for block_id in block_ids}
        _require(len(free) == len(self._free), "a block is free twice")
        _require(len(quarantined) == self._num_quarantined, "quarantine is miscounted")
        for block_id, block in enumerate(self._blocks):
            is_idle = block_id in self._idle
            states = (block_id in free, block_id in quarantined, is_idle, block.ref_count > 0)
            _require(sum(states) == 1, f"block {block_id} is in {sum(states)} states")
            _require((block.quarantined_for is not None) == (block_id in quarantined), "quarantine differs")
            _require(not is_idle or block.digest is not None, f"idle block {block_id} is not findable")
            if block.digest is not None:
                _require(self._by_digest.get(block.digest) == block_id, f"block {block_id} is not in the index")
                _require(self._zone_of(block_id).is_cacheable, f"block {block_id} must not be findable")
            if block_id in free:
                _require(not block.needs_scrub, f"block {block_id} is free and dirty")
        num_findable = sum(block.digest is not None for block in self._blocks)
        _require(num_findable == len(self._by_digest), "the index names a block that is not findable")
        self._idle.check()

    def _evict(self, count: int, requester: Zone) -> None:
        victims = []
        for _ in range(count):
            block_id = self._idle.victim(requester)
            self._idle.remove(block_id, self._zone_of(block_id))
            self._forget(block_id)
            victims.append(block_id)
        self.num_evictions += len(victims)
        self._clean(victims)

    def _clean(self, block_ids: Iterable[int]) -> None:
        """Scrub what needs it, in one call, then hand the blocks to the free list."""
        block_ids = sorted(block_ids)
        dirty = [block_id for block_id in block_ids if self._blocks[block_id].needs_scrub]
        if dirty:
            self._scrub(dirty)
            self.num_scrubbed += len(dirty)
        for block_id in block_ids:
            block = self._blocks[block_id]
            block.zone = None
            block.needs_scrub = False
            heapq.heappush(self._free, block_id)

    def _forget(self, block_id: int) -> None:
        digest = self._blocks[block_id].digest
        if digest is None or self._by_digest.pop(digest, None) != block_id:
            raise IntegrityError(f"block {block_id} is not in the index")
        self._blocks[block_id].digest = None

    def _zone_of(self, block_id: int) -> Zone:
        zone = self._blocks[block_id].zone
        if zone is None:
            raise IntegrityError(f"block {block_id} has no owner zone")
        return zone


class _IdleBlocks:
    """Idle blocks, least recently used first, in the orders in which a victim is sought. All O(1)."""

    def __init__(self) -> None:
        self._by_zone: defaultdict[Zone, OrderedDict[int, None]] = defaultdict(OrderedDict)
        self._private_by_tenant: defaultdict[str, OrderedDict[int, None]] = defaultdict(OrderedDict)
        self._not_public: OrderedDict[int, None] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._not_public or block_id in self._by_zone.get(PUBLIC, ())

    def add(self, block_id: int, zone: Zone) -> None:
        self._count += 1
        self._by_zone[zone][block_id] = None
        if zone.kind is not ZoneKind.PUBLIC:
            self._not_public[block_id] = None
        if zone.is_scrubbed:
            self._private_by_tenant[zone.tenant][block_id] = None

    def remove(self, block_id: int, zone: Zone) -> None:
        self._count -= 1
        _discard(self._by_zone, zone, block_id)
        self._not_public.pop(block_id, None)
        if zone.is_scrubbed:
            _discard(self._private_by_tenant, zone.tenant, block_id)

    def zones(self) -> list[Zone]:
        return list(self._by_zone)

    def of_zone(self, zone: Zone) -> list[int]:
        return list(self._by_zone.get(zone, ()))

    def victim(self, requester: Zone) -> int:
        """The block to evict for `requester`; there must be one."""
        orders = (
            self._by_zone.get(requester) if requester.kind is not ZoneKind.PUBLIC else None,
            self._private_by_tenant.get(requester.tenant),
            self._not_public,
            self._by_zone.get(PUBLIC),
        )
        return next(next(iter(order)) for order in orders if order)

    def check(self) -> None:
        by_zone = [block_id for order in self._by_zone.values() for block_id in order]
        _require(len(by_zone) == len(set(by_zone)) == self._count, "idle blocks are miscounted")
        num_public = len(self._by_zone.get(PUBLIC, ()))
        _require(len(self._not_public) + num_public == self._count, "an idle order has lost a block")
        _require(all(self._by_zone.values()), "an empty idle order was kept")
        _require(all(self._private_by_tenant.values()), "an empty idle order was kept")


def _discard(orders: dict[_Key, OrderedDict[int, None]], key: _Key, block_id: int) -> None:
    """Remove a block from one order, and the order with its last block."""
    order = orders[key]
    del order[block_id]
    if not order:
        del orders[key]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
