"""The purge service: the epoch first, then every replica, whatever fails, then the receipt and the record."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.errors import AuditUnavailable, OverCapacity, PurgeUnavailable
from deployments.trust.epochs import EpochStore
from deployments.trust.keyring import Keyring
from deployments.trust.purge import MAX_PENDING_PURGES, PurgeRequest, PurgeService, purgeable_zone
from deployments.trust.receipts import Outcome, ReceiptSigner, ReplicaPurge, SignedReceipt, receipt_keys, verify_receipt
from engine.zone import EPHEMERAL, PUBLIC, Zone
from tests.deployments.support import RUN_TIMEOUT_S, Clock, reaches, run

RING = Keyring((b"k" * 32,))
GOLD = Zone.parse("tenant/acme/plan/gold")
CASE = Zone.parse("tenant/acme/case/c")

BAD_PATHS = [
    "", "/", "public/", "/public", "Public", "ｐublic", "pub\u0456ic", "public\n", " public", "tenant", "tenant/acme",
    "tenant/acme/plan", "tenant/acme/plan/", "tenant//plan/gold", "tenant/acme//gold", "tenant/../plan/gold",
    "tenant/acme/plan/..", "tenant/acme/plan/a..b", "tenant/acme/plan/gold/..", "tenant/ａcme/plan/gold",
    "tenant/асme/plan/gold", "tenant/acme/plan/go\u200bld", "tenant/acme/plan/gold\x00", "tenant/acme/plan/%2e%2e",
    "tenant/acme/plan/*", "tenant/{tenant}/plan/gold", "x" * 10_000, "tenant/acme/case/" + "c" * 10_000,
    "tenant/" * 2_000, "ephemeral", "tenant/acme/mixed",
]  # fmt: skip


class Pool:
    """Replicas that note what they are told."""

    def __init__(self, *answers: ReplicaPurge | BaseException, error: Exception | None = None) -> None:
        self.answers, self.error = answers, error
        self.told: list[tuple[str, int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, path: str, epoch: int) -> Sequence[ReplicaPurge | BaseException]:
        self.told.append((path, epoch))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.answers


class Desk:
    """A service over two pools, with its records."""

    def __init__(
        self,
        epochs: EpochStore | None = None,
        pool_timeout_s: float = RUN_TIMEOUT_S,
        **pools: Callable[[str, int], Awaitable[Any]],
    ) -> None:
        self.epochs = epochs or EpochStore(None)
        self.records: list[SignedReceipt] = []
        self.failure: Exception | None = None
        self.decode = Pool(ReplicaPurge(replica="d1", num_findable=2, num_scrubbed=1), ReplicaPurge(replica="d2"))
        self.prefill = Pool(ReplicaPurge(replica="p1", num_pinned=3))
        self.service = PurgeService(
            self.epochs,
            ReceiptSigner(RING),
            {"decode": self.decode, "prefill": self.prefill, **pools},
            self.record,
            Clock(1000.5),
            pool_timeout_s=pool_timeout_s,
        )

    async def record(self, signed: SignedReceipt) -> None:
        if self.failure is not None:
            raise self.failure
        self.records.append(signed)


def test_every_replica_of_every_pool_is_told_and_the_receipt_says_so() -> None:
    async def body() -> None:
        desk = Desk()
        signed = await desk.service.purge(GOLD, "ann")
        assert verify_receipt(signed.data, receipt_keys(RING)).receipt == signed.receipt
        found = signed.receipt
        assert (found.zone, found.epoch, found.principal, found.complete) == (GOLD.path, 1, "ann", True)
        assert (found.started_ms, found.finished_ms) == (1_000_500, 1_000_500)
        assert [(pool.pool, [replica.replica for replica in pool.replicas]) for pool in found.pools] == [
            ("decode", ["d1", "d2"]),
            ("prefill", ["p1"]),
        ]
        assert found.replicas[0] == desk.decode.answers[0]
        assert desk.decode.told == desk.prefill.told == [(GOLD.path, 1)]
        assert desk.records == [signed]
        assert (await desk.service.purge(GOLD, "ann")).receipt.epoch == 2
        assert (await desk.service.purge(CASE, "ann")).receipt.epoch == 1

    run(body)


def test_epoch_is_on_the_medium_before_any_replica_is_told(tmp_path: Path) -> None:
    async def body() -> None:
        kept: list[int] = []

        async def look(path: str, epoch: int) -> list[ReplicaPurge]:
            kept.append(EpochStore(tmp_path / "epochs.json").epoch_of(GOLD))
            return [ReplicaPurge(replica="x")]

        desk = Desk(EpochStore(tmp_path / "epochs.json"), decode=look, prefill=look)
        assert (await desk.service.purge(GOLD, "ann")).receipt.complete
        assert kept == [1, 1]

    run(body)


def test_epoch_that_cannot_be_kept_tells_nobody(tmp_path: Path) -> None:
    async def body() -> None:
        path = tmp_path / "epochs.json"
        desk = Desk(EpochStore(path))
        path.write_text("{}")
        with pytest.raises(PurgeUnavailable) as refusal:
            await desk.service.purge(GOLD, "ann")
        assert str(path) not in refusal.value.message
        assert (desk.decode.told, desk.prefill.told, desk.records) == ([], [], [])
        assert desk.epochs.epoch_of(GOLD) == 0

    run(body)


@pytest.mark.parametrize(
    ("pool", "outcomes"),
    [
        (Pool(ReplicaPurge(replica="d1"), TimeoutError()), ["purged", "silent"]),
        (Pool(ReplicaPurge(replica="d1"), RuntimeError("secret")), ["purged", "failed"]),
        (Pool(ReplicaPurge(replica="d1", outcome=Outcome.FAILED)), ["failed"]),
        (Pool(error=RuntimeError("secret")), ["failed"]),
        (Pool(), ["silent"]),
        (Pool(*[ReplicaPurge(replica="d")] * 1001), ["failed"]),
    ],
    ids=["timed out", "raised", "failed by its own word", "cannot be asked", "nobody there", "more than a receipt has"],
)
def test_replica_that_does_not_purge_makes_the_receipt_incomplete(
    pool: Pool, outcomes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        desk = Desk(decode=pool)
        signed = await desk.service.purge(GOLD, "ann")
        assert not signed.receipt.complete
        assert [replica.outcome for replica in signed.receipt.pools[0].replicas] == outcomes
        assert [replica.outcome for replica in signed.receipt.pools[1].replicas] == ["purged"]
        assert desk.epochs.epoch_of(GOLD) == 1
        assert desk.records == [signed]
        assert b"secret" not in signed.data

    run(body)
    assert "secret" not in caplog.text


def test_pool_that_does_not_answer_is_waited_for_within_a_limit() -> None:
    async def body() -> None:
        desk = Desk(pool_timeout_s=0.02)
        desk.decode.gate.clear()
        found = (await desk.service.purge(GOLD, "ann")).receipt
        assert not found.complete
        assert [(replica.replica, replica.outcome) for replica in found.replicas] == [("*", "silent"), ("p1", "purged")]

    run(body)


def test_caller_that_goes_away_ends_no_purge() -> None:
    async def body() -> None:
        desk = Desk()
        desk.decode.gate.clear()
        caller = asyncio.create_task(desk.service.purge(GOLD, "ann"))
        await reaches(lambda: bool(desk.decode.told))
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        desk.decode.gate.set()
        await reaches(lambda: bool(desk.records))
        assert desk.records[0].receipt.complete

    run(body)


def test_purges_take_turns_and_too_many_are_refused_before_anything_happens() -> None:
    async def body() -> None:
        desk = Desk()
        desk.decode.gate.clear()
        waiting = [asyncio.create_task(desk.service.purge(GOLD, "ann")) for _ in range(MAX_PENDING_PURGES)]
        await reaches(lambda: bool(desk.decode.told))
        with pytest.raises(OverCapacity):
            await desk.service.purge(CASE, "ann")
        await asyncio.sleep(0.02)
        assert len(desk.decode.told) == 1
        desk.decode.gate.set()
        receipts = [signed.receipt for signed in await asyncio.gather(*waiting)]
        assert [found.epoch for found in receipts] == list(range(1, MAX_PENDING_PURGES + 1))
        assert desk.epochs.epoch_of(CASE) == 0
        assert (await desk.service.purge(CASE, "ann")).receipt.complete

    run(body)


def test_record_that_cannot_be_written_is_the_callers_error_and_the_zone_is_purged() -> None:
    async def body() -> None:
        desk = Desk()
        desk.failure = AuditUnavailable("no log")
        with pytest.raises(AuditUnavailable):
            await desk.service.purge(GOLD, "ann")
        assert desk.prefill.told == [(GOLD.path, 1)]
        desk.failure = None
        assert (await desk.service.purge(GOLD, "ann")).receipt.epoch == 2

    run(body)


@pytest.mark.parametrize("zone", [EPHEMERAL, Zone.parse("tenant/acme/mixed")])
def test_zone_where_nothing_is_cached_is_not_purged(zone: Zone) -> None:
    async def body() -> None:
        desk = Desk()
        with pytest.raises(ValueError, match="nothing is ever cached"):
            await desk.service.purge(zone, "ann")
        assert desk.decode.told == []

    run(body)


@pytest.mark.parametrize("path", BAD_PATHS)
def test_path_that_is_none_is_refused_and_not_repeated(path: str) -> None:
    with pytest.raises(ValueError) as refusal:
        purgeable_zone(path)
    assert len(str(refusal.value)) < 80
    with pytest.raises(ValidationError):
        PurgeRequest.model_validate({"zone": path})


@pytest.mark.parametrize(
    "body", [{}, {"zone": 1}, {"zone": None}, {"zone": ["public"]}, {"zone": "public", "epoch": 9}]
)
def test_body_that_is_none_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PurgeRequest.model_validate(body)


@pytest.mark.parametrize("zone", [PUBLIC, GOLD, CASE])
def test_path_of_a_zone_that_caches_is_taken(zone: Zone) -> None:
    assert purgeable_zone(PurgeRequest.model_validate({"zone": zone.path}).zone) == zone
