"""One handoff from ticket to verified blocks, and everything that may go wrong on the way."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from engine.kv_cache import KVCacheLayout
from tests.transfer.support import (
    CANARY,
    KEY,
    LAYOUT,
    NEW_KEY,
    NUM_BLOCKS,
    ZONE,
    Ends,
    block_bytes,
    handoff_ends,
    run,
    until,
)
from transfer import handoff
from transfer.handoff import LandingRefused, PushFailed
from transfer.local_connector import Fault
from transfer.notice import AbortReason, Notice, NoticeKind
from transfer.protocol import ConnectorClosed, PeerDown, TransferError, TransferTimeout
from transfer.quarantine import HandoffFault
from transfer.ticket import Expectation, RefusalReason, TicketRefused

BOTH = pytest.mark.parametrize("kind", ["local", "nixl"])
WAIT_S = 10.0


class Freed(list[str]):
    """What the engine would be told: one entry each time blocks are released."""

    def __call__(self) -> None:
        self.append("freed")


async def refused(ends: Ends, landing: handoff.Landing, timeout_s: float = WAIT_S) -> LandingRefused:
    with pytest.raises(LandingRefused) as caught:
        await landing.landed(timeout_s)
    return caught.value


def faults(ends: Ends) -> dict[str, int]:
    return {name: count for name, count in ends.receiver.stats().ledger.faults.items() if count}


@BOTH
def test_blocks_pushed_chunk_by_chunk_land_verified(kind: str) -> None:
    async def body() -> None:
        async with handoff_ends(kind) as ends:
            landing = ends.issue([40, 41, 42, 50, 7])
            waiting = asyncio.create_task(landing.landed(WAIT_S))
            session = await ends.accept(landing)
            for chunk in ([1, 2], [3], [4, 9]):
                session.push(chunk)
                await asyncio.sleep(0.005)
            receipt = await session.finish()
            landed = await waiting
            await session.settled()
            for source, goal in zip([1, 2, 3, 4, 9], landing.ticket.block_ids, strict=True):
                assert block_bytes(ends.pair.receiver.pool, goal) == block_bytes(ends.pair.sender.pool, source)
            untouched = set(range(NUM_BLOCKS)) - set(landing.ticket.block_ids)
            for block in untouched:
                assert set(block_bytes(ends.pair.receiver.pool, block)) == {CANARY}
            assert (receipt.num_blocks, receipt.num_writes, receipt.num_descriptors) == (5, 3, 4)
            assert receipt.num_bytes == landed.num_bytes == 5 * LAYOUT.block_bytes
            assert ends.sender.stats().bytes_pushed == ends.receiver.stats().landed_bytes == landed.num_bytes
            assert ends.receiver.stats().ledger.landed == 1
            assert landing.is_fenced
            ends.receiver.ledger.check()

    run(body)


@BOTH
def test_prompt_of_one_chunk_is_one_write_with_the_notice(kind: str) -> None:
    async def body() -> None:
        async with handoff_ends(kind) as ends:
            landing = ends.issue([8, 9, 10, 11])
            session = await ends.accept(landing)
            session.push([20, 21, 22, 23])
            assert (await session.finish()).num_writes == 1
            assert await session.finish() == await session.finish()
            assert (await landing.landed(WAIT_S)).num_blocks == 4  # the notice came early and was kept

    run(body)


@BOTH
def test_ticket_without_blocks_lands_at_once_and_sends_nothing(kind: str) -> None:
    async def body() -> None:
        async with handoff_ends(kind) as ends:
            landing = ends.issue([])
            session = await ends.accept(landing)
            session.push([])
            assert (await session.finish()).num_blocks == 0
            await session.settled()
            assert (await landing.landed(WAIT_S)).num_bytes == 0
            assert ends.pair.sender.stats().writes_posted == 0
            assert ends.receiver.stats().ledger.writing_handoffs == 0

    run(body)


def test_large_blocks_are_digested_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    real = asyncio.to_thread

    async def spy(*args: object) -> object:
        threads.append(args)
        return await real(*args)  # type: ignore[arg-type]

    async def body() -> None:
        monkeypatch.setattr(handoff, "OFFLOAD_BYTES", LAYOUT.block_bytes)
        monkeypatch.setattr(asyncio, "to_thread", spy)
        async with handoff_ends("local") as ends:
            landing = ends.issue([1, 2, 3])
            session = await ends.accept(landing)
            session.push([1])
            session.push([2, 3])
            await session.finish()
            await landing.landed(WAIT_S)
        assert len(threads) == 2  # the second chunk, and the landed blocks

    run(body)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_corrupted_byte_in_flight_is_refused_and_never_lands(position: int) -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            freed = Freed()
            ends.pair.fabric.faults.append(Fault(corrupt_block=position))
            landing = ends.issue([1, 2, 3])
            session = await ends.accept(landing)
            session.push([4, 5, 6])
            await session.finish()
            refusal = await refused(ends, landing)
            assert refusal.fault is HandoffFault.DIGEST_MISMATCH
            assert refusal.is_fenced  # its notice is authentic: nothing is under way
            landing.release_when_fenced(freed)
            assert freed == ["freed"]
            assert faults(ends) == {"digest_mismatch": 1}
            assert ends.receiver.stats().landed_bytes == 0

    run(body)


def test_source_that_changes_under_the_push_is_refused() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            ends.pair.fabric.faults.append(Fault(delay_s=0.05))
            landing = ends.issue([1, 2, 3])
            session = await ends.accept(landing)
            session.push([4, 5])
            await asyncio.sleep(0)
            ends.pair.sender.pool.block(4)[0] ^= 1
            session.push([6])
            await session.finish()
            assert (await refused(ends, landing)).fault is HandoffFault.DIGEST_MISMATCH

    run(body)


def test_blocks_in_another_order_are_refused() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            landing = ends.issue([1, 2])
            session = await ends.accept(landing)
            session.push([4, 5])
            await session.finish()
            pool = ends.pair.receiver.pool
            first, second = block_bytes(pool, 1), block_bytes(pool, 2)
            pool.block(1)[:], pool.block(2)[:] = second, first
            assert (await refused(ends, landing)).fault is HandoffFault.DIGEST_MISMATCH

    run(body)


def test_notice_of_another_count_is_refused() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            landing = ends.issue([1, 2])
            await ends.accept(landing)
            notice = Notice(landing.ticket.nonce, NoticeKind.DONE, 1)
            await ends.pair.sender.notify(ends.pair.receiver.name, notice.sign(KEY))
            assert (await refused(ends, landing)).fault is HandoffFault.COUNT_MISMATCH

    run(body)


def test_blocks_handed_out_anew_meanwhile_are_refused() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            landing = ends.issue([1, 2])
            session = await ends.accept(landing)
            session.push([1, 2])
            await session.finish()
            ends.generations[2] += 1
            assert (await refused(ends, landing)).fault is HandoffFault.STALE_GENERATION

    run(body)


def test_blocks_handed_out_anew_while_they_are_digested_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            landing = ends.issue([1, 2])
            session = await ends.accept(landing)
            session.push([1, 2])
            await session.finish()
            real = handoff._update_digest

            async def slow(*args: object) -> None:
                await real(*args)  # type: ignore[arg-type]
                ends.generations[2] += 1

            monkeypatch.setattr(handoff, "_update_digest", slow)
            assert (await refused(ends, landing)).fault is HandoffFault.STALE_GENERATION

    run(body)


@pytest.mark.parametrize("moment", range(5))
@pytest.mark.parametrize("aborts", [False, True])
def test_keys_that_change_at_any_moment_of_a_handoff_break_nothing(moment: int, aborts: bool) -> None:
    """Its tickets, digests and notices stay under the key that it began with, though the ring has forgotten it."""
    now = iter(range(5))

    async def body() -> None:
        async with handoff_ends("local") as ends:

            def pass_a_moment() -> None:
                if next(now) == moment:
                    for sealer in ends.sealers:
                        sealer.set_keys((NEW_KEY, KEY) if moment == 1 else (NEW_KEY,))  # sealed, not opened yet

            pass_a_moment()
            landing = ends.issue([1, 2, 3])
            pass_a_moment()
            session = await ends.accept(landing)
            pass_a_moment()
            session.push([4, 5])
            pass_a_moment()
            if aborts:
                assert await session.abort(AbortReason.PREFILL_FAILED)
            else:
                session.push([6])
                await session.finish()
            pass_a_moment()
            if aborts:
                assert (await refused(ends, landing)).fault is HandoffFault.ABORTED
                landing.release_when_fenced(Freed())
            else:
                assert (await landing.landed(WAIT_S)).num_blocks == 3
            assert ends.receiver.stats().forged_notices == 0

    run(body)


def test_ticket_under_a_key_that_the_sender_does_not_know_yet_is_refused_and_counted() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            ends.sealers[1].set_keys((NEW_KEY, KEY))
            landing = ends.issue([1])
            with pytest.raises(TicketRefused, match="forged"):
                await ends.accept(landing)
            assert ends.sender.stats().refused["forged"] == 1
            landing.confirm_fence()
            landing.release_when_fenced(Freed(), HandoffFault.NOT_SENT)

    run(body)


def test_forged_notices_are_counted_and_the_true_one_still_counts() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            landing = ends.issue([1])
            waiting = asyncio.create_task(landing.landed(WAIT_S))
            session = await ends.accept(landing)
            forged = Notice(landing.ticket.nonce, NoticeKind.ABORTED).sign(bytes(32))
            await ends.pair.sender.notify(ends.pair.receiver.name, forged)
            await until(lambda: ends.receiver.stats().forged_notices == 1)
            assert not landing.is_fenced
            session.push([5])
            await session.finish()
            assert (await waiting).num_blocks == 1

    run(body)


def test_lost_notice_times_out_and_the_blocks_stay_until_a_fence() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            freed = Freed()
            ends.pair.fabric.faults.append(Fault(drops_notification=True))
            landing = ends.issue([1, 2])
            session = await ends.accept(landing)
            session.push([5, 6])
            await session.finish()
            refusal = await refused(ends, landing, timeout_s=0.05)
            assert refusal.fault is HandoffFault.TIMEOUT
            assert not refusal.is_fenced
            landing.release_when_fenced(freed)
            await asyncio.sleep(0.05)
            assert freed == []
            stats = ends.receiver.stats().ledger
            assert (stats.quarantined_handoffs, stats.quarantined_blocks) == (1, 2)
            assert stats.oldest_quarantine_s > 0
            landing.confirm_fence()  # the sender's answer over its own call
            landing.confirm_fence()
            assert freed == ["freed"]
            assert ends.receiver.stats().ledger.quarantined_blocks == 0

    run(body)


def test_duplicate_notice_changes_nothing() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            ends.pair.fabric.faults.append(Fault(duplicates_notification=True))
            landing = ends.issue([1])
            session = await ends.accept(landing)
            session.push([5])
            await session.finish()
            await landing.landed(WAIT_S)
            await until(lambda: ends.pair.receiver.stats().notifications == 2)
            stats = ends.pair.receiver.stats()
            assert stats.notifications_duplicate + stats.notifications_late == 1
            assert ends.receiver.stats().ledger.landed == 1

    run(body)


def test_late_write_keeps_its_blocks_in_quarantine_until_it_has_landed() -> None:
    async def body() -> None:
        async with handoff_ends("local", write_timeout_s=0.05) as ends:
            freed, fabric = Freed(), ends.pair.fabric
            fabric.stall(ends.pair.receiver.name)
            landing = ends.issue([1, 2])
            session = await ends.accept(landing)
            session.push([5, 6])
            with pytest.raises(PushFailed) as caught:
                await session.finish()
            assert isinstance(caught.value.__cause__, TransferTimeout)
            assert (await refused(ends, landing, 0.05)).fault is HandoffFault.TIMEOUT
            landing.release_when_fenced(freed)
            settled = asyncio.create_task(session.settled())
            aborted = asyncio.create_task(session.abort(AbortReason.WRITE_FAILED))
            await asyncio.sleep(0.05)
            assert not settled.done()
            assert not aborted.done()
            assert freed == []
            assert fabric.may_write(ends.pair.receiver.name) == {1, 2}
            fabric.resume(ends.pair.receiver.name)
            await settled
            assert await aborted
            await until(lambda: freed == ["freed"])
            assert fabric.may_write(ends.pair.receiver.name) == set()

    run(body)


@BOTH
def test_abort_in_the_middle_fences_and_frees_at_once(kind: str) -> None:
    async def body() -> None:
        async with handoff_ends(kind) as ends:
            freed = Freed()
            landing = ends.issue([1, 2, 3])
            session = await ends.accept(landing)
            session.push([5, 6])
            assert await session.abort(AbortReason.PREFILL_FAILED)
            assert await session.abort(AbortReason.CANCELLED)  # idempotent: the first reason stands
            with pytest.raises(PushFailed):
                session.push([7])
            refusal = await refused(ends, landing)
            assert refusal.fault is HandoffFault.ABORTED
            assert "prefill_failed" in str(refusal)
            assert refusal.is_fenced
            landing.release_when_fenced(freed)
            assert freed == ["freed"]
            assert ends.sender.stats().aborted["prefill_failed"] == 1
            assert ends.receiver.stats().sender_aborts["prefill_failed"] == 1

    run(body)


def test_abort_before_anything_was_pushed_still_tells_the_receiver() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            landing = ends.issue([1])
            session = await ends.accept(landing)
            assert await session.abort(AbortReason.CANCELLED)
            assert (await refused(ends, landing)).fault is HandoffFault.ABORTED

    run(body)


def test_abort_after_the_end_is_no_abort() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            landing = ends.issue([1])
            session = await ends.accept(landing)
            session.push([5])
            await session.finish()
            assert await session.abort(AbortReason.CANCELLED)
            assert (await landing.landed(WAIT_S)).num_blocks == 1
            assert ends.sender.stats().aborted["cancelled"] == 0

    run(body)


def test_abort_while_the_last_write_is_under_way_waits_for_its_fence() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            ends.pair.fabric.faults.append(Fault(delay_s=0.05))
            landing = ends.issue([1])
            session = await ends.accept(landing)
            session.push([5])
            finishing = asyncio.create_task(session.finish())
            await asyncio.sleep(0.01)
            assert await session.abort(AbortReason.CANCELLED)
            with pytest.raises(PushFailed):
                await finishing
            assert (await landing.landed(WAIT_S)).num_blocks == 1  # its DONE notice was on its way with it

    run(body)


def test_failed_write_fails_the_session_and_its_abort_is_the_fence() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            ends.pair.fabric.faults.append(Fault(fails=True))
            landing = ends.issue([1, 2, 3])
            session = await ends.accept(landing)
            session.push([5])
            await asyncio.sleep(0.02)
            with pytest.raises(PushFailed, match="earlier write"):
                session.push([6])
            assert await session.abort(AbortReason.WRITE_FAILED)
            assert (await refused(ends, landing)).is_fenced

    run(body)


def test_failed_write_before_the_last_one_means_no_done_notice() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            ends.pair.fabric.faults.append(Fault(fails=True, delay_s=0.03))
            landing = ends.issue([1, 2])
            session = await ends.accept(landing)
            session.push([5])
            session.push([6])
            with pytest.raises(PushFailed):
                await session.finish()
            assert (await refused(ends, landing, 0.05)).fault is HandoffFault.TIMEOUT
            assert block_bytes(ends.pair.receiver.pool, 2) == bytes([CANARY]) * LAYOUT.block_bytes

    run(body)


def test_death_of_the_sender_is_a_fence() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            freed, fabric = Freed(), ends.pair.fabric
            fabric.faults.append(Fault(delay_s=5.0))
            landing = ends.issue([1, 2])
            session = await ends.accept(landing)
            session.push([5])
            waiting = asyncio.create_task(landing.landed(WAIT_S))
            await asyncio.sleep(0.01)
            fabric.kill(ends.pair.sender.name)
            with pytest.raises(LandingRefused) as caught:
                await waiting
            assert caught.value.fault is HandoffFault.PEER_DOWN
            assert caught.value.is_fenced
            landing.release_when_fenced(freed)
            assert freed == ["freed"]
            assert not await session.abort(AbortReason.SHUTDOWN)

    run(body)


def test_death_of_a_sender_learnt_later_is_a_fence_for_what_was_given_up() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            freed, fabric = Freed(), ends.pair.fabric
            landing = ends.issue([1], sender="")
            landing.set_sender(ends.pair.sender.name)
            landing.release_when_fenced(freed, HandoffFault.CANCELLED)
            await asyncio.sleep(0.02)
            assert freed == []
            fabric.kill(ends.pair.sender.name)
            await until(lambda: freed == ["freed"])
            assert faults(ends) == {"cancelled": 1}

    run(body)


@BOTH
def test_leaving_the_sender_is_no_fence(kind: str) -> None:
    async def body() -> None:
        async with handoff_ends(kind) as ends:
            freed = Freed()
            landing = ends.issue([1, 2])
            session = await ends.accept(landing)
            session.push([5])
            waiting = asyncio.create_task(landing.landed(0.3))
            await asyncio.sleep(0.05)
            await ends.pair.receiver.disconnect(ends.pair.sender.name)
            with pytest.raises(LandingRefused) as caught:
                await waiting
            assert caught.value.fault is HandoffFault.TIMEOUT
            assert not caught.value.is_fenced
            landing.release_when_fenced(freed)
            await asyncio.sleep(0.02)
            assert freed == []
            await session.abort(AbortReason.CANCELLED)
            await until(lambda: freed == ["freed"])

    run(body)


def test_closing_connector_ends_the_wait_and_is_no_fence() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            landing = ends.issue([1, 2])
            waiting = asyncio.create_task(landing.landed(WAIT_S))
            await asyncio.sleep(0.01)
            await ends.pair.receiver.close()
            with pytest.raises(ConnectorClosed):
                await waiting
            assert not landing.is_fenced

    run(body)


def test_death_of_the_receiver_fails_the_push_and_settles_it() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            ends.pair.fabric.faults.append(Fault(delay_s=5.0))
            landing = ends.issue([1, 2])
            session = await ends.accept(landing)
            session.push([5])
            ends.pair.fabric.kill(ends.pair.receiver.name)
            await session.settled()
            with pytest.raises(PushFailed) as caught:
                session.push([6])
            assert isinstance(caught.value.__cause__, PeerDown)

    run(body)


def test_cancelled_wait_keeps_the_blocks_until_the_notice() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            freed = Freed()
            landing = ends.issue([1, 2])
            session = await ends.accept(landing)
            session.push([5])
            waiting = asyncio.create_task(landing.landed(WAIT_S))
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            landing.release_when_fenced(freed, HandoffFault.CANCELLED)
            with pytest.raises(TransferError):
                landing.release_when_fenced(freed)
            session.push([6])
            await session.finish()  # the sender has not heard of it and goes on
            await until(lambda: freed == ["freed"])

    run(body)


def test_two_attempts_of_one_request_are_freed_only_when_both_are_fenced() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            freed = Freed()
            first, second = ends.issue([1, 2]), ends.issue([3, 4])
            for landing in (first, second):
                landing.release_when_fenced(freed, HandoffFault.CANCELLED)
            first.confirm_fence()
            assert freed == []
            second.confirm_fence()
            assert freed == ["freed", "freed"]

    run(body)


def test_block_under_an_open_ticket_gets_no_second_one() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            ends.issue([1, 2])
            with pytest.raises(TransferError, match="block 2"):
                ends.issue([2, 3], request_id="r2")

    run(body)


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        (Expectation("tenant/t/case/other", 0), RefusalReason.WRONG_ZONE),
        (Expectation(ZONE, 1), RefusalReason.WRONG_EPOCH),
        (Expectation(ZONE, 0, num_prompt_tokens=17), RefusalReason.WRONG_PROMPT),
    ],
)
def test_refused_ticket_is_counted_and_writes_nothing(expected: Expectation, reason: RefusalReason) -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            landing, freed = ends.issue([1]), Freed()
            with pytest.raises(TicketRefused) as caught:
                await ends.sender.accept(landing.sealed, ends.pair.receiver.handshake(), expected)
            assert caught.value.reason is reason
            assert ends.sender.stats().refused[reason] == 1
            assert ends.pair.sender.stats().writes_posted == 0
            landing.release_when_fenced(freed, HandoffFault.NOT_SENT)
            landing.confirm_fence()
            assert freed == ["freed"]

    run(body)


def test_replayed_ticket_opens_no_second_session() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            landing = ends.issue([1])
            await ends.accept(landing)
            with pytest.raises(TicketRefused) as caught:
                await ends.accept(landing)
            assert caught.value.reason is RefusalReason.REPLAYED

    run(body)


def test_handshake_of_somebody_else_than_the_issuer_is_refused() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends, handoff_ends("local") as others:
            others.pair.fabric = ends.pair.fabric
            ends.pair.fabric.add(others.pair.receiver)
            landing = ends.issue([1])
            with pytest.raises(TicketRefused) as caught:
                await ends.sender.accept(landing.sealed, others.pair.receiver.handshake(), Expectation(ZONE, 0))
            assert caught.value.reason is RefusalReason.WRONG_RECEIVER

    run(body)


def test_push_after_the_expiry_is_refused() -> None:
    async def body() -> None:
        now = [1000.0]
        async with handoff_ends("local", clock=lambda: now[0]) as ends:
            landing = ends.issue([1, 2])
            session = await ends.accept(landing)
            session.push([5])
            now[0] += 60
            with pytest.raises(PushFailed, match="expired"):
                session.push([6])
            assert session.num_missing == 1

    run(body)


def test_more_blocks_than_the_ticket_has_are_refused() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            session = await ends.accept(ends.issue([1, 2]))
            with pytest.raises(ValueError):
                session.push([5, 6, 7])
            with pytest.raises(ValueError):
                session.push([NUM_BLOCKS])
            with pytest.raises(ValueError):
                await session.finish()
            assert ends.pair.sender.stats().writes_posted == 0

    run(body)


def test_closed_receiver_stops_waiting_for_fences() -> None:
    async def body() -> None:
        async with handoff_ends("local") as ends:
            landing, freed = ends.issue([1]), Freed()
            landing.release_when_fenced(freed, HandoffFault.CANCELLED)
            await asyncio.sleep(0)
            await ends.receiver.close()
            assert freed == []

    run(body)


def test_fingerprint_stands_for_the_whole_layout() -> None:
    base = LAYOUT.fingerprint()
    others = [replace(LAYOUT, num_layers=3), replace(LAYOUT, dtype="float16"), replace(LAYOUT, block_size=32)]
    assert base not in {layout.fingerprint() for layout in others}
    assert isinstance(others[0], KVCacheLayout)
