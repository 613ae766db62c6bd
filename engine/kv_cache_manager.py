"""Each request's block table, and the prefix cache: which blocks a request may share and for how long.

Knows requests, zones and digests; holds no KV. The clock comes in through the constructor.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

from engine.block_hash import ROOT_DIGEST, BlockHasher
from engine.block_pool import BlockPool
from engine.cache_events import CacheEventKind, EvictionReason
from engine.epoch_floors import EpochFloors
from engine.errors import IntegrityError, PinRefused
from engine.request import Request
from engine.zone import Zone, ZoneKind

MAX_PINS = 1024  # names under which blocks are pinned


@dataclass(frozen=True, slots=True)
class PurgeCount:
    """What a purge of one zone found, in blocks.

    `num_findable`: were in the index, among them `num_pinned` pinned ones. `num_scrubbed`: zeroed and free now.
    `num_in_use`: hold something of the zone still, since a request uses them or a remote write may reach them;
    they are not findable and are scrubbed when they are given back.
    """

    num_findable: int = 0
    num_scrubbed: int = 0
    num_in_use: int = 0
    num_pinned: int = 0


@dataclass(slots=True)
class BlockTable:
    """Blocks of one request in token order.

    `num_matched`: leading blocks found in the cache when the table was made.
    `num_published`: leading blocks already offered to the index.
    `exposed`: the part [start, end) that a remote prefill may write; empty where there is none.
    """

    request: Request
    block_ids: list[int]
    generations: list[int]
    num_matched: int
    num_published: int
    exposed: tuple[int, int] = (0, 0)
    _as_tuple: tuple[int, ...] | None = field(default=None, repr=False)

    def append(self, block_id: int, generation: int) -> None:
        self.block_ids.append(block_id)
        self.generations.append(generation)
        self._as_tuple = None

    def as_tuple(self) -> tuple[int, ...]:
        """The block ids; rebuilt only after the table has grown."""
        if self._as_tuple is None:
            self._as_tuple = tuple(self.block_ids)
        return self._as_tuple


class KVCacheManager:
    """Gives requests their blocks and finds what they may reuse.

    A request has a table from `allocate` or `reserve` until `free` or `quarantine`. Only leading full
    blocks of cacheable zones are ever shared, and a block enters a table only where its owner zone is
    the zone of that place in the request.
    """

    def __init__(
        self,
        pool: BlockPool,
        hasher: BlockHasher,
        block_size: int,
        *,
        clock: Callable[[], float],
        case_idle_ttl_s: float,
    ) -> None:
        """
        Args:
            clock: Monotonic seconds.
            case_idle_ttl_s: Idle blocks of a case are dropped this long after the case was last used.
        """
        self.pool = pool
        self.block_size = block_size
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_stale_epochs = 0
        self._hasher = hasher
        self._clock = clock
        self._case_idle_ttl_s = case_idle_ttl_s
        self._case_last_used_s: OrderedDict[Zone, float] = OrderedDict()  # least recently used first
        self._tables: dict[str, BlockTable] = {}
        self._pins: dict[str, list[int]] = {}
        self._epoch_floors = EpochFloors()

    def table(self, request_id: str) -> BlockTable:
        """
        Raises:
            IntegrityError: The request has no table.
        """
        if request_id not in self._tables:
            raise IntegrityError(f"{request_id} has no block table")
        return self._tables[request_id]

    def request_ids(self) -> set[str]:
        """Requests that have a table."""
        return set(self._tables)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, request: Request) -> list[int]:
        """Findable blocks that hold the request's leading tokens. Nothing changes.

        At least one known token is left out: its logits must be computed.
        """
        limit = min((request.num_tokens - 1) // self.block_size, self._num_shareable(request))
        matched: list[int] = []
        for index, digest in enumerate(self._digests(request, limit)[:limit]):
            block_id = self.pool.find(digest, request.zone_of_block(index, self.block_size))
            if block_id is None:
                break
            matched.append(block_id)
        return matched

    def fits(self, request: Request, num_tokens: int, *, headroom: int, without: Iterable[Request]) -> bool:
        """Would `allocate` succeed if the requests `without` were freed first? Nothing changes."""
        references = Counter(block_id for other in without for block_id in self.table(other.request_id).block_ids)
        freed = [block_id for block_id, count in references.items() if self.pool.ref_count(block_id) == count]
        return self._fits(self.match_prefix(request), num_tokens, headroom, freed)

    def allocate(self, request: Request, num_tokens: int, *, headroom: int = 0) -> bool:
        """Make the request's table: its cached prefix and new blocks up to `num_tokens`.

        Sets `num_computed_tokens` to the cached prefix.

        Args:
            headroom: Blocks that must stay available besides.

        Returns:
            False when there is no room, and then nothing has changed.

        Raises:
            IntegrityError: The request has a table already, or a block of another zone would enter it.
        """
        if request.request_id in self._tables:
            raise IntegrityError(f"{request.request_id} has a block table already")
        matched = self.match_prefix(request)
        if not self._fits(matched, num_tokens, headroom, ()):
            return False
        table = BlockTable(request, [], [], num_matched=len(matched), num_published=len(matched))
        self.pool.acquire(matched)
        for block_id in matched:
            self._append(table, block_id)
        self._tables[request.request_id] = table
        self._extend(table, num_tokens)
        request.num_computed_tokens = len(matched) * self.block_size
        self._attribute(request)
        self._record("hit", request, range(len(matched)))
        self._touch(request)
        return True

    def reserve(self, request: Request, num_tokens: int, *, headroom: int = 0) -> bool:
        """As `allocate`, and the prompt's blocks past the cached prefix become a remote prefill's to write."""
        if not self.allocate(request, num_tokens, headroom=headroom):
            return False
        table = self._tables[request.request_id]
        table.exposed = (table.num_matched, self.num_blocks_for(len(request.prompt_token_ids)))
        return True

    @contextmanager
    def holding_prefix(self, request: Request) -> Iterator[None]:
        """While others are freed to make room for the request, the prefix that it would find is in use: the
        freed blocks may exceed a cap, and what then goes must not be what the request counts on."""
        matched = self.match_prefix(request)
        self.pool.acquire(matched)
        try:
            yield
        finally:
            self.pool.release(matched)

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Grow the table to cover `num_tokens`. False when there is no room; then nothing has changed."""
        return self._extend(self.table(request.request_id), num_tokens)

    def land(self, request: Request) -> None:
        """The remote prefill's bytes are in place and verified: the whole prompt counts as computed."""
        table = self.table(request.request_id)
        table.exposed = (0, 0)
        request.num_computed_tokens = len(request.prompt_token_ids)
        request.num_attributed_tokens = len(request.prompt_token_ids)
        self.publish(request)

    def publish(self, request: Request) -> None:
        """Make the blocks that have become full findable, as far as zone and purges allow."""
        table = self.table(request.request_id)
        num_full = request.num_computed_tokens // self.block_size
        if num_full <= table.num_published:
            return
        num_full = min(num_full, self._num_shareable(request))
        digests = self._digests(request, num_full)
        places = range(table.num_published, min(num_full, len(digests)))
        stored = [index for index in places if self.pool.publish(table.block_ids[index], digests[index])]
        self._record("store", request, stored)
        table.num_published = max(num_full, table.num_published)

    def free(self, request: Request) -> None:
        """Give the request's blocks back; what is findable stays so while idle.

        Raises:
            IntegrityError: It has no table, or a remote write may still land in it (`quarantine` then).
        """
        table = self.table(request.request_id)
        if table.exposed != (0, 0):
            raise IntegrityError(f"{request.request_id}: a remote write may still land in its blocks")
        del self._tables[request.request_id]
        self.pool.release(table.block_ids)
        self._touch(request)

    def quarantine(self, request: Request) -> None:
        """Give up a reservation: exposed blocks wait for `release_quarantine`, the others are freed."""
        table = self.table(request.request_id)
        start, end = table.exposed
        self.pool.quarantine(table.block_ids[start:end], request.request_id)
        del self._tables[request.request_id]
        self.pool.release(table.block_ids[:start] + table.block_ids[end:])
        self._touch(request)

    def pin(self, request: Request) -> int:
        """Free the request as `free` does, but keep its findable leading blocks under its id until `unpin`.

        Blocks of a case are not kept: they would outlive its time to live.

        Returns:
            How many blocks are kept.

        Raises:
            PinRefused: The id is pinned already, or `MAX_PINS` are.
        """
        if request.request_id in self._pins:
            raise PinRefused(f"{request.request_id} is pinned already")
        if len(self._pins) >= MAX_PINS:
            raise PinRefused(f"{MAX_PINS} prefixes are pinned already")
        block_ids = self._pinnable(request)
        if block_ids:
            self.pool.pin(block_ids)
            self._pins[request.request_id] = block_ids
        self.free(request)
        return len(block_ids)

    def num_dependable_with(self, request: Request) -> int:
        """`BlockPool.num_dependable` if the request were pinned."""
        return self.pool.num_dependable(self._pinnable(request))

    def unpin(self, name: str) -> int:
        """Free the blocks pinned under this name that nobody else uses or pins. Idempotent. Returns how many."""
        return self.pool.unpin(self._pins.pop(name, []))

    def pinned(self) -> tuple[str, ...]:
        """Names under which something is pinned, oldest first."""
        return tuple(self._pins)

    def purge(self, zone: Zone, epoch: int, live_requests: Collection[Request]) -> PurgeCount:
        """Raise the zone's floor to `epoch`, drop every findable block of it, and let no live request make one
        findable again. A prefix that is pinned and holds one is unpinned as a whole."""
        for request in live_requests:
            first = request.first_block_of(zone, self.block_size)
            if first is not None:
                request.num_shareable_blocks = min(request.num_shareable_blocks, first)
        held = self.pool.of_zone(zone)
        pinned = {block_id for block_id in held if self.pool.is_pinned(block_id)}
        num_findable = self.pool.purge(zone)
        for name in [name for name, block_ids in self._pins.items() if not pinned.isdisjoint(block_ids)]:
            self.unpin(name)
        num_in_use = len(self.pool.of_zone(zone))
        if self._epoch_floors.raise_to(zone, epoch):
            self.drop_all("purge", live_requests)
        return PurgeCount(num_findable, len(held) - num_in_use, num_in_use, len(pinned))

    def drop_all(self, reason: EvictionReason, live_requests: Iterable[Request]) -> int:
        """Drop every findable block, pins too, and let no live request make one findable.

        Returns:
            How many blocks were findable.
        """
        for request in live_requests:
            request.num_shareable_blocks = 0
        num_findable = self.pool.drop_all(reason)
        for name in self.pinned():
            self.unpin(name)
        return num_findable

    def rekey(self, hasher: BlockHasher, live_requests: Iterable[Request]) -> int:
        """Compute digests with another hasher from now on; `drop_all` what the old one made findable."""
        self._hasher = hasher
        return self.drop_all("rekey", live_requests)

    def epoch_floor(self, zone: Zone) -> int:
        return self._epoch_floors.of(zone)

    def observe_epochs(self, request: Request, live_requests: Collection[Request]) -> None:
        """A zone's epoch that is higher than its floor purges what is older."""
        for span in request.zone_spans:
            epoch = request.epoch_of(span.zone)
            if span.zone.is_cacheable and epoch > self._epoch_floors.of(span.zone):
                self.purge(span.zone, epoch, live_requests)

    def count_stale_epochs(self, request: Request) -> None:
        """Once for each request that is taken on."""
        self.num_stale_epochs += self._first_stale_block(request) is not None

    def expire(self, now_s: float) -> int:
        """Scrub and free idle blocks of every case unused for its time to live. Returns how many."""
        num_dropped = 0
        while self._case_last_used_s:
            zone, last_used_s = next(iter(self._case_last_used_s.items()))
            if now_s - last_used_s < self._case_idle_ttl_s:
                break
            del self._case_last_used_s[zone]
            num_dropped += self.pool.drop_idle(zone, "ttl")
        return num_dropped

    def check(self) -> None:
        """Tables and pool agree: each reference is a table's, each block stands in its own zone.

        Raises:
            IntegrityError: They do not.
        """
        self.pool.check()
        references = Counter(block_id for block_ids in self._pins.values() for block_id in block_ids)
        if any(self.pool.is_pinned(block_id) != (block_id in references) for block_id in range(self.pool.num_blocks)):
            raise IntegrityError("a block is pinned under no name")
        for table in self._tables.values():
            if len(set(table.block_ids)) != len(table.block_ids):
                raise IntegrityError(f"{table.request.request_id} has a block twice in its table")
            for index, (block_id, generation) in enumerate(zip(table.block_ids, table.generations, strict=True)):
                references[block_id] += 1
                self._check_owner(table.request, index, block_id)
                if self.pool.generation(block_id) != generation:
                    raise IntegrityError(f"block {block_id} was handed out again while in a table")
        for block_id in range(self.pool.num_blocks):
            if self.pool.ref_count(block_id) != references[block_id]:
                raise IntegrityError(f"block {block_id} has a reference that no table holds")
        if any(zone.kind is ZoneKind.CASE and zone not in self._case_last_used_s for zone in self.pool.idle_zones()):
            raise IntegrityError("idle blocks of a case would never expire")

    def _fits(self, matched: Sequence[int], num_tokens: int, headroom: int, freed: Collection[int]) -> bool:
        num_new = self.num_blocks_for(num_tokens) - len(matched)
        others = set(freed).difference(matched)
        return num_new + headroom <= self.pool.num_available_after(matched, others)

    def _extend(self, table: BlockTable, num_tokens: int) -> bool:
        request, places = table.request, range(len(table.block_ids), self.num_blocks_for(num_tokens))
        if not places:
            return True
        zones = [request.zone_of_block(index, self.block_size) for index in places]
        block_ids = self.pool.allocate(zones, request.zone, tenant=request.tenant, request_id=request.request_id)
        if block_ids is None:
            return False
        for block_id in block_ids:
            self._append(table, block_id)
        return True

    def _append(self, table: BlockTable, block_id: int) -> None:
        self._check_owner(table.request, len(table.block_ids), block_id)
        table.append(block_id, self.pool.generation(block_id))

    def _check_owner(self, request: Request, index: int, block_id: int) -> None:
        """A foreign block is refused."""
        zone = request.zone_of_block(index, self.block_size)
        if self.pool.zone(block_id) != zone:
            raise IntegrityError(
                f"{request.request_id}: block {block_id} of zone {self.pool.zone(block_id)} "
                f"does not belong at {index} of a table, zone {zone}"
            )

    def _digests(self, request: Request, count: int) -> Sequence[bytes]:
        """Digests of up to `count` leading blocks; they end before the first block that is not cacheable."""
        digests = request.block_digests
        for index in range(len(digests), count):
            zone = request.zone_of_block(index, self.block_size)
            if not zone.is_cacheable:
                break
            token_ids = request.token_ids(index * self.block_size, (index + 1) * self.block_size)
            parent = (digests[-1] if digests else ROOT_DIGEST) + self._inner_epochs(request, index, zone)
            digests.append(self._hasher.digest(parent, token_ids, zone, request.epoch_of(zone)))
        return digests

    def _inner_epochs(self, request: Request, index: int, zone: Zone) -> bytes:
        """Epochs of zones too short to own a block: they begin in this one, of another zone, and its key does not
        bind them. Without them a purge of such a zone would leave its text reachable within the wider one."""
        starts = (0, *(span.end for span in request.zone_spans))
        return b"".join(
            struct.pack("<Q", request.epoch_of(span.zone))
            for start, span in zip(starts, request.zone_spans, strict=False)
            if start // self.block_size == index and span.zone != zone
        )

    def _attribute(self, request: Request) -> None:
        """Count the cached prefix once, when the request first gets a table that it goes on with."""
        if request.num_attributed_tokens == 0:
            num_hit = min(request.num_computed_tokens, len(request.prompt_token_ids))
            request.num_cached_tokens = num_hit
            request.num_attributed_tokens = num_hit
            self.num_queried_tokens += len(request.prompt_token_ids)
            self.num_hit_tokens += num_hit

    def _touch(self, request: Request) -> None:
        """Its case is in use. The span's zone counts, not the request's own: where a case is joined with
        another the request is ephemeral, and its first blocks are still the case's."""
        for span in request.zone_spans:
            if span.zone.kind is ZoneKind.CASE and self.pool.has_idle(span.zone):
                self._case_last_used_s[span.zone] = self._clock()
                self._case_last_used_s.move_to_end(span.zone)
        if len(self._case_last_used_s) > 2 * self.pool.num_blocks:  # so the sweep costs O(1) for each entry
            kept = [item for item in self._case_last_used_s.items() if self.pool.has_idle(item[0])]
            self._case_last_used_s = OrderedDict(kept)

    def _record(self, kind: CacheEventKind, request: Request, places: Iterable[int]) -> None:
        """Blocks at `places` of the request's table were found or became findable."""
        for zone, run in groupby(places, lambda index: request.zone_of_block(index, self.block_size)):
            self.pool.events.record(
                kind, zone, sum(1 for _ in run), request_id=request.request_id, requester=request.zone
            )

    def _num_shareable(self, request: Request) -> int:
        """Leading blocks that the request may find or make findable."""
        stale = self._first_stale_block(request)
        return request.num_shareable_blocks if stale is None else min(request.num_shareable_blocks, stale)

    def _first_stale_block(self, request: Request) -> int | None:
        """The first block that holds a token of a zone whose epoch is below the zone's floor."""
        if not self._epoch_floors:
            return None
        for span in request.zone_spans:
            if span.zone.is_cacheable and request.epoch_of(span.zone) < self._epoch_floors.of(span.zone):
                return request.first_block_of(span.zone, self.block_size)
        return None

    def _pinnable(self, request: Request) -> list[int]:
        """The findable blocks that hold the request's computed tokens, up to those of a case."""
        num_full = min(request.num_computed_tokens // self.block_size, self._num_shareable(request))
        found: list[int] = []
        for index, digest in enumerate(self._digests(request, num_full)[:num_full]):
            zone = request.zone_of_block(index, self.block_size)
            block_id = None if zone.kind is ZoneKind.CASE else self.pool.find(digest, zone)
            if block_id is None:
                break
            found.append(block_id)
        return found
