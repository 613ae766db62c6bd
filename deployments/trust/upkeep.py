"""What an engine replica looks after by itself: its master keys, its purges, and the shared texts it keeps resident."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from deployments.config import QuotaEntry, QuotaSection
from deployments.engine_host import EngineHost
from deployments.trust.keyring import Keyring, KeyringWatch
from deployments.trust.trail import AuditTrail
from deployments.trust.warm import Warmer
from engine.block_hash import BlockHasher
from engine.cache_events import CacheEvent
from engine.quotas import Quota, Quotas
from engine.zone import Zone

TRANSFER_KEY_INFO = b"kv-transfer"
GRANT_KEY_INFO = b"zone-grant"

Rotate = Callable[[tuple[bytes, ...], tuple[bytes, ...]], None]


@dataclass(frozen=True, slots=True)
class Upkeep:
    """Of one replica. `hasher_for`: digests of its blocks under a master key. `period_s`: between two looks."""

    keys: KeyringWatch
    warmer: Warmer
    hasher_for: Callable[[bytes], BlockHasher]
    period_s: float

    async def look(self, host: EngineHost, rotate: Rotate) -> bool:
        """Take new keys into use, then see to the shared texts. True where the keys have changed.

        Args:
            rotate: Takes the new transfer keys and the new grant keys, newest first.

        Raises:
            EngineStopped: The engine is gone.
        """
        keyring = await asyncio.to_thread(self.keys.poll)
        if keyring is not None:
            await self._rekey(keyring, host, rotate)
        await self.warmer.warm_host(host)
        return keyring is not None

    async def _rekey(self, keyring: Keyring, host: EngineHost, rotate: Rotate) -> None:
        rotate(keyring.derive(TRANSFER_KEY_INFO), keyring.derive(GRANT_KEY_INFO))
        hasher = self.hasher_for(keyring.current)
        await host.call(lambda engine: engine.rekey(hasher))


def quotas_of(section: QuotaSection, *, num_blocks: int, num_longest: int) -> Quotas:
    """Shares as blocks of one pool. Public text gets its share as far as the longest request keeps its room.

    Args:
        num_longest: Blocks of the longest request.
    """

    def blocks(entry: QuotaEntry) -> Quota:
        return Quota(floor=int(entry.floor * num_blocks), cap=int(entry.cap * num_blocks))

    quotas = Quotas(
        default=blocks(section.default),
        tenants={tenant: blocks(entry) for tenant, entry in section.tenants.items()},
        zones={Zone.parse(path): blocks(entry) for path, entry in section.zones.items()},
    )
    num_spare = num_blocks - num_longest - quotas.num_floor_blocks
    public_cap = max(0, min(int(section.public_cap * num_blocks), num_spare))
    return Quotas(public_cap, quotas.default, quotas.tenants, quotas.zones)


def note_cache_events(trail: AuditTrail, events: list[CacheEvent]) -> None:
    """Put what the cache did on record, counts by zone and reason."""
    for event in events:
        trail.note(
            f"cache.{event.kind}",
            zone=event.zone.path,
            num_blocks=event.num_blocks,
            request_id=event.request_id or None,
            reason=event.reason or None,
            requester_zone=None if event.requester is None or event.kind != "evict" else event.requester.path,
        )
