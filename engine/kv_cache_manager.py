"""Each request's block table, and the prefix cache: which blocks a request may share and for how long.

Knows requests, zones and digests; holds no KV. The clock comes in through the constructor.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from engine.block_hash import ROOT_DIGEST, BlockHasher
from engine.block_pool import BlockPool
from engine.errors import IntegrityError
from engine.request import Request
from engine.zone import Zone, ZoneKind

MAX_TRACKED_CASES = 65_536  # cases whose time to live is counted; beyond it the least recently used expires


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
        self._hasher = hasher
        self._clock = clock
        self._case_idle_ttl_s = case_idle_ttl_s
        self._case_last_used_s: OrderedDict[Zone, float] = OrderedDict()  # least recently used first
        self._tables: dict[str, BlockTable] = {}

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
        limit = (request.num_tokens - 1) // self.block_size
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
        freed = {block_id for block_id, count in references.items() if self.pool.ref_count(block_id) == count}
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
        if not self._fits(matched, num_tokens, headroom, frozenset()):
            return False
        table = BlockTable(request, [], [], num_matched=len(matched), num_published=len(matched))
        for block_id in matched:
            self.pool.acquire(block_id)
            self._append(table, block_id)
        self._tables[request.request_id] = table
        self._extend(table, num_tokens)
        request.num_computed_tokens = len(matched) * self.block_size
        self._attribute(request)
        self._touch(request)
        return True

    def reserve(self, request: Request, num_tokens: int, *, headroom: int = 0) -> bool:
        """As `allocate`, and the prompt's blocks past the cached prefix become a remote prefill's to write."""
        if not self.allocate(request, num_tokens, headroom=headroom):
            return False
        table = self._tables[request.request_id]
        table.exposed = (table.num_matched, self.num_blocks_for(len(request.prompt_token_ids)))
        return True

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
        num_full = min(request.num_computed_tokens // self.block_size, request.num_publishable_blocks)
        if num_full <= table.num_published:
            return
        digests = self._digests(request, num_full)
        for index in range(table.num_published, min(num_full, len(digests))):
            self.pool.publish(table.block_ids[index], digests[index])
        table.num_published = num_full

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

    def purge(self, zone: Zone, live_requests: Iterable[Request]) -> int:
        """Drop every findable block of `zone`, and let no live request make one findable again.

        Returns:
            How many blocks were findable.
        """
        for request in live_requests:
            num_known = self.num_blocks_for(request.num_tokens)
            for index in range(min(num_known + 1, request.num_publishable_blocks)):
                if request.zone_of_block(index, self.block_size) == zone:
                    request.num_publishable_blocks = index
                    break
        self._case_last_used_s.pop(zone, None)
        return self.pool.purge(zone)

    def expire(self, now_s: float) -> int:
        """Scrub and free idle blocks of every case unused for its time to live. Returns how many."""
        num_dropped = 0
        while self._case_last_used_s:
            last_used_s = next(iter(self._case_last_used_s.values()))
            if now_s - last_used_s < self._case_idle_ttl_s:
                break
            num_dropped += self._drop_oldest_case()
        return num_dropped

    def check(self) -> None:
        """Tables and pool agree: each reference is a table's, each block stands in its own zone.

        Raises:
            IntegrityError: They do not.
        """
        self.pool.check()
        references: dict[int, int] = {}
        for table in self._tables.values():
            if len(set(table.block_ids)) != len(table.block_ids):
                raise IntegrityError(f"{table.request.request_id} has a block twice in its table")
            for index, (block_id, generation) in enumerate(zip(table.block_ids, table.generations, strict=True)):
                references[block_id] = references.get(block_id, 0) + 1
                self._check_owner(table.request, index, block_id)
                if self.pool.generation(block_id) != generation:
                    raise IntegrityError(f"block {block_id} was handed out again while in a table")
        for block_id in range(self.pool.num_blocks):
            if self.pool.ref_count(block_id) != references.get(block_id, 0):
                raise IntegrityError(f"block {block_id} has a reference that no table holds")
        if any(zone.kind is ZoneKind.CASE and zone not in self._case_last_used_s for zone in self.pool.idle_zones()):
            raise IntegrityError("idle blocks of a case would never expire")

    def _fits(self, matched: Sequence[int], num_tokens: int, headroom: int, freed: Collection[int]) -> bool:
        num_new = self.num_blocks_for(num_tokens) - len(matched)
        num_revived = sum(self.pool.is_idle(block_id) or block_id in freed for block_id in matched)
        return num_new + headroom <= self.pool.num_available + len(freed) - num_revived

    def _extend(self, table: BlockTable, num_tokens: int) -> bool:
        request, places = table.request, range(len(table.block_ids), self.num_blocks_for(num_tokens))
        if not places:
            return True
        zones = [request.zone_of_block(index, self.block_size) for index in places]
        block_ids = self.pool.allocate(zones, request.zone)
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
            parent = digests[-1] if digests else ROOT_DIGEST
            digests.append(self._hasher.digest(parent, token_ids, zone, request.epoch_of(zone)))
        return digests

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
            if span.zone.kind is ZoneKind.CASE:
                self._case_last_used_s[span.zone] = self._clock()
                self._case_last_used_s.move_to_end(span.zone)
        while len(self._case_last_used_s) > MAX_TRACKED_CASES:
            self._drop_oldest_case()

    def _drop_oldest_case(self) -> int:
        zone, _ = self._case_last_used_s.popitem(last=False)
        return self.pool.drop_idle(zone)
