"""What the prefix cache did, for the audit log: who reused, stored and evicted whose blocks. Counts, no content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from engine.zone import Zone

MAX_CACHE_EVENTS = 4096  # distinct events kept until they are taken; later ones are only counted

CacheEventKind: TypeAlias = Literal["hit", "store", "evict", "scrub"]
EvictionReason: TypeAlias = Literal["", "demand", "cap", "ttl", "purge", "rekey", "unpin"]


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """One thing that happened to `num_blocks` blocks of `zone`, added up since the events were last taken.

    hit: a request took them from the cache. store: they became findable. evict: they are findable no more.
    scrub: they were zeroed.
    `request_id`, `requester`: the request and its own zone: of a hit or a store, and of an eviction on demand.
    """

    kind: CacheEventKind
    zone: Zone
    num_blocks: int
    reason: EvictionReason = ""
    request_id: str = ""
    requester: Zone | None = None


_Key: TypeAlias = tuple[CacheEventKind, Zone, EvictionReason, str, Zone | None]


class CacheEventLog:
    """Adds events up until they are taken, in the order in which each first happened."""

    def __init__(self) -> None:
        self.num_lost = 0
        self._num_blocks: dict[_Key, int] = {}

    def record(
        self,
        kind: CacheEventKind,
        zone: Zone,
        num_blocks: int,
        *,
        reason: EvictionReason = "",
        request_id: str = "",
        requester: Zone | None = None,
    ) -> None:
        """Where `MAX_CACHE_EVENTS` different ones are kept, another is lost and counted in `num_lost`."""
        key = (kind, zone, reason, request_id, requester)
        before = self._num_blocks.get(key)
        if before is None and len(self._num_blocks) >= MAX_CACHE_EVENTS:
            self.num_lost += 1
            return
        self._num_blocks[key] = (before or 0) + num_blocks

    def take(self) -> list[CacheEvent]:
        """The events since the last call."""
        taken, self._num_blocks = self._num_blocks, {}
        return [
            CacheEvent(kind, zone, num_blocks, reason, request_id, requester)
            for (kind, zone, reason, request_id, requester), num_blocks in taken.items()
        ]
