"""Purging a zone: its epoch is raised and kept first, then every replica of every pool is told, then it is signed.

Once the epoch is on the medium the zone's entries are found by no new request, whichever replica then fails to answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from pydantic import Field, field_validator

from deployments.claims.model import StrictModel
from deployments.errors import OverCapacity, PurgeUnavailable
from deployments.trust.epochs import EpochError, EpochStore
from deployments.trust.receipts import (
    UNNAMED,
    Outcome,
    PoolPurge,
    Receipt,
    ReceiptSigner,
    ReplicaPurge,
    SignedReceipt,
    is_complete,
)
from engine.zone import MAX_ZONE_PATH_CHARS, Zone

logger = logging.getLogger("ray.serve.zoneserve.trust")

POOL_TIMEOUT_S = 30.0
MAX_PENDING_PURGES = 16  # running or waiting for their turn, of one ingress replica
BUSY_RETRY_AFTER_S = 5.0

# Tells each replica of a pool to purge a zone (its path) up to an epoch: what each did, or the error it ended with.
PurgePool = Callable[[str, int], Awaitable[Sequence[ReplicaPurge | BaseException]]]


def purgeable_zone(path: str) -> Zone:
    """The zone of a path, if anything can be cached in it.

    Raises:
        ValueError: No zone path, or a zone where nothing is ever cached. The message does not repeat it.
    """
    try:
        zone = Zone.parse(path)
    except ValueError:
        raise ValueError("a zone is public, tenant/T/plan/P or tenant/T/case/C") from None
    if not zone.is_cacheable:
        raise ValueError("nothing is ever cached in this zone")
    return zone


class PurgeRequest(StrictModel):
    """Body of `POST /v1/zones/purge`."""

    zone: str = Field(max_length=MAX_ZONE_PATH_CHARS)

    @field_validator("zone")
    @classmethod
    def _is_purgeable(cls, path: str) -> str:
        return purgeable_zone(path).path


class PurgeService:
    """Purges of one ingress replica, one at a time. A caller that goes away ends none that has begun."""

    def __init__(
        self,
        epochs: EpochStore,
        signer: ReceiptSigner,
        pools: Mapping[str, PurgePool],
        record: Callable[[SignedReceipt], Awaitable[None]],
        clock: Callable[[], float] = time.time,
        *,
        pool_timeout_s: float = POOL_TIMEOUT_S,
    ) -> None:
        """
        Args:
            pools: By name. A pool answers with one entry a replica.
            record: Called with each receipt before the caller gets it: the audit log.
            clock: Unix time in seconds.
        """
        self._epochs, self._signer, self._pools = epochs, signer, pools
        self._record, self._clock, self._pool_timeout_s = record, clock, pool_timeout_s
        self._turn = asyncio.Lock()
        self._pending: set[asyncio.Task[SignedReceipt]] = set()

    async def purge(self, zone: Zone, principal: str) -> SignedReceipt:
        """Purge a zone everywhere. Whether the principal may is the caller's question.

        Returns:
            The receipt; incomplete where a replica did not purge, and then the same purge may be asked for again.

        Raises:
            ValueError: Nothing is ever cached in the zone.
            OverCapacity: Too many purges are pending; nothing has changed.
            PurgeUnavailable: The epoch cannot be kept; nothing has changed and no replica was told.
            AuditUnavailable: What `record` raises; the zone is purged.
        """
        purgeable_zone(zone.path)
        if len(self._pending) >= MAX_PENDING_PURGES:
            raise OverCapacity("too many purges are pending", retry_after_s=BUSY_RETRY_AFTER_S)
        task = asyncio.create_task(self._purge(zone, principal))
        self._pending.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[SignedReceipt]) -> None:
        self._pending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:  # perhaps nobody waits for it any more
            logger.error("a purge failed: %s", type(error).__name__)

    async def _purge(self, zone: Zone, principal: str) -> SignedReceipt:
        async with self._turn:
            started = self._clock()
            try:
                epoch = await asyncio.to_thread(self._epochs.raise_epoch, zone)
            except EpochError as error:
                logger.error("the epoch of a zone cannot be kept: %s", error)
                raise PurgeUnavailable("the purge cannot be kept, so nothing was purged") from error
            pools = tuple(await asyncio.gather(*(self._tell(name, zone, epoch) for name in self._pools)))
            receipt = Receipt(
                zone=zone.path,
                epoch=epoch,
                principal=principal,
                started_ms=int(started * 1000),
                finished_ms=int(self._clock() * 1000),
                pools=pools,
                complete=is_complete(pools),
            )
            signed = self._signer.sign(receipt)
            await self._record(signed)
            return signed

    async def _tell(self, pool: str, zone: Zone, epoch: int) -> PoolPurge:
        """What the pool's replicas did. A pool that cannot be asked, or has none to ask, is one that did not purge."""
        try:
            async with asyncio.timeout(self._pool_timeout_s):
                answers = await self._pools[pool](zone.path, epoch)
            replicas = tuple(_entry(pool, answer) for answer in answers)
            return PoolPurge(pool=pool, replicas=replicas or (_unnamed(Outcome.SILENT),))
        except Exception as error:
            return PoolPurge(pool=pool, replicas=(_entry(pool, error),))


def _entry(pool: str, answer: ReplicaPurge | BaseException) -> ReplicaPurge:
    if isinstance(answer, ReplicaPurge):
        return answer
    logger.error("of the %s pool not all has purged: %s", pool, type(answer).__name__)
    return _unnamed(Outcome.SILENT if isinstance(answer, TimeoutError) else Outcome.FAILED)


def _unnamed(outcome: Outcome) -> ReplicaPurge:
    return ReplicaPurge(replica=UNNAMED, outcome=outcome)
