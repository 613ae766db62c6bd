"""What every connector promises, run against each: the local one and NIXL, DRAM to DRAM."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.transfer.support import (
    CANARY,
    LAYOUT,
    NUM_BLOCKS,
    block_bytes,
    connected_pair,
    make_connector,
    make_pool,
    run,
    until,
)
from transfer.handshake import Handshake
from transfer.local_connector import LocalFabric
from transfer.protocol import (
    MAX_NOTIFICATION_BYTES,
    ConnectorClosed,
    Fence,
    HandshakeRefused,
    PeerDown,
    PeerIncompatible,
    TransferError,
    count_extents,
)

NONCE = bytes(range(100, 116))
CANARY_BLOCK = bytes([CANARY]) * LAYOUT.block_bytes
pytestmark = pytest.mark.parametrize("kind", ["local", "nixl"])


def test_written_blocks_land_and_their_neighbours_stay(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            local, remote = [3, 4, 9, 0, 63], [10, 11, 30, 63, 0]
            receipt = await pair.sender.write(pair.receiver.name, local, remote, timeout_s=10)
            assert receipt.num_blocks == 5
            assert receipt.num_bytes == 5 * LAYOUT.block_bytes
            goal = dict(zip(remote, local, strict=True))
            for block in range(NUM_BLOCKS):
                landed = block_bytes(pair.receiver.pool, block)
                source = goal.get(block)
                assert landed == (CANARY_BLOCK if source is None else block_bytes(pair.sender.pool, source))

    run(body)


@pytest.mark.parametrize(
    ("local", "remote", "num_descriptors"),
    [
        (list(range(32)), list(range(16, 48)), 1),
        ([0, 1, 2, 10, 11], [0, 1, 5, 6, 7], 3),  # 2 and 10 are neighbours on the far side only
        ([5, 4, 3], [25, 24, 23], 1),  # order of the list does not matter
        (list(range(0, 32, 2)), list(range(0, 32, 2)), 16),
    ],
)
def test_neighbours_on_both_sides_become_one_descriptor(
    kind: str, local: list[int], remote: list[int], num_descriptors: int
) -> None:
    async def body() -> None:
        assert count_extents(local, remote) == num_descriptors
        async with connected_pair(kind) as pair:
            receipt = await pair.sender.write(pair.receiver.name, local, remote, timeout_s=10)
            assert receipt.num_descriptors == num_descriptors
            assert pair.sender.stats().descriptors_written == num_descriptors
            for source, goal in zip(local, remote, strict=True):
                assert block_bytes(pair.receiver.pool, goal) == block_bytes(pair.sender.pool, source)

    run(body)


def test_notification_comes_after_the_bytes_it_vouches_for(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            waiting = asyncio.create_task(pair.receiver.expect(NONCE, timeout_s=10))
            await asyncio.sleep(0.01)
            message = NONCE + bytes(range(256))  # any byte, NUL included
            await pair.sender.write(
                pair.receiver.name, list(range(20)), list(range(20)), notification=message, timeout_s=10
            )
            assert await waiting == message
            assert block_bytes(pair.receiver.pool, 19) == block_bytes(pair.sender.pool, 19)
            assert pair.receiver.stats().notifications_early == 0

    run(body)


def test_early_notification_is_kept_for_whoever_asks(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            await pair.sender.write(pair.receiver.name, [1], [1], notification=NONCE + b"early", timeout_s=10)
            await until(lambda: pair.receiver.stats().notifications == 1)
            assert await pair.receiver.expect(NONCE, timeout_s=10) == NONCE + b"early"
            assert pair.receiver.stats().notifications_early == 1

    run(body)


def test_duplicate_notification_is_ignored_and_a_different_one_is_not(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            for suffix in (b"one", b"one", b"two"):
                await pair.sender.notify(pair.receiver.name, NONCE + suffix)
            assert await pair.receiver.expect(NONCE, timeout_s=10) == NONCE + b"one"
            assert await pair.receiver.expect(NONCE, timeout_s=10) == NONCE + b"two"
            with pytest.raises(TimeoutError):
                await pair.receiver.expect(NONCE, timeout_s=0.05)
            assert pair.receiver.stats().notifications_duplicate == 1

    run(body)


def test_late_notification_is_counted_and_dropped(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            with pytest.raises(TimeoutError):
                await pair.receiver.expect(NONCE, timeout_s=0.02)
            pair.receiver.forget(NONCE)
            await pair.sender.notify(pair.receiver.name, NONCE + b"late")
            await until(lambda: pair.receiver.stats().notifications_late == 1)

    run(body)


def test_notification_that_meets_a_timeout_is_not_lost(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            with pytest.raises(TimeoutError):
                await pair.receiver.expect(NONCE, timeout_s=0.02)
            await pair.sender.notify(pair.receiver.name, NONCE + b"x")
            assert await pair.receiver.expect(NONCE, timeout_s=10) == NONCE + b"x"

    run(body)


def test_notification_too_short_for_a_nonce_is_refused(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            await pair.sender.notify(pair.receiver.name, b"short")
            await until(lambda: pair.receiver.stats().notifications_refused == 1)

    run(body)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "block_size", "dtype"])
def test_other_layout_is_refused_by_the_name_of_the_field(kind: str, field: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            theirs = Handshake.decode(pair.receiver.handshake())
            value = "float16" if field == "dtype" else getattr(LAYOUT, field) * 2
            theirs = replace(theirs, layout=replace(LAYOUT, **{field: value}))
            with pytest.raises(PeerIncompatible, match=rf"layout\.{field}") as caught:
                await pair.sender.connect(theirs.encode())
            assert caught.value.field == f"layout.{field}"

    run(body)


def test_other_fact_of_the_deployment_is_refused_by_name(kind: str) -> None:
    async def body() -> None:
        fabric = LocalFabric()
        facts = {"weights_digest": "a", "attention": "torch"}
        ours = make_connector(kind, "prefill", make_pool(), fabric, compatibility=facts)
        other = make_connector(kind, "decode", make_pool(), fabric, compatibility={**facts, "attention": "x"})
        without = make_connector(kind, "decode", make_pool(), fabric)
        try:
            with pytest.raises(PeerIncompatible, match="differs in attention"):
                await ours.connect(other.handshake())
            with pytest.raises(PeerIncompatible, match="differs in attention"):
                await ours.connect(without.handshake())
            pulling = replace(Handshake.decode(ours.handshake()), mode="pull", name="decode-" + "0" * 32)
            with pytest.raises(PeerIncompatible, match="differs in mode"):
                await ours.connect(pulling.encode())
        finally:
            for connector in (ours, other, without):
                await connector.close()

    run(body)


@pytest.mark.parametrize("damage", [b"", b"\x00", b"\xc1", b"\x9a" * 10, b"garbage" * 1000, b"x" * 300_000])
def test_bytes_that_are_no_handshake_are_refused(kind: str, damage: bytes) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            with pytest.raises(HandshakeRefused):
                await pair.sender.connect(damage)

    run(body)


def test_connecting_twice_is_once(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            assert await pair.sender.connect(pair.receiver.handshake()) == pair.receiver.name
            assert pair.sender.stats().peers == 1
            assert pair.sender.is_peer_alive(pair.receiver.name)
            await pair.sender.write(pair.receiver.name, [1], [2], timeout_s=10)

    run(body)


def test_disconnected_peer_takes_no_writes_and_may_come_back(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            name = pair.receiver.name
            await pair.sender.disconnect(name)
            await pair.sender.disconnect(name)
            assert not pair.sender.is_peer_alive(name)
            with pytest.raises(PeerDown):
                await pair.sender.write(name, [1], [2], timeout_s=10)
            with pytest.raises(PeerDown):
                pair.sender.peer_gone(name)
            await pair.sender.connect(pair.receiver.handshake())
            await pair.sender.write(name, [1], [2], timeout_s=10)
            assert block_bytes(pair.receiver.pool, 2) == block_bytes(pair.sender.pool, 1)

    run(body)


@pytest.mark.parametrize(
    ("local", "remote"),
    [([], []), ([1], [1, 2]), ([64], [1]), ([1], [64]), ([-1], [1]), ([1], [-1]), ([1, 2], [3, 3])],
)
def test_impossible_write_is_refused_before_it_starts(kind: str, local: list[int], remote: list[int]) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            with pytest.raises(ValueError):
                await pair.sender.write(pair.receiver.name, local, remote, timeout_s=10)
            assert pair.sender.stats().writes_posted == 0
            for block in range(NUM_BLOCKS):
                assert block_bytes(pair.receiver.pool, block) == CANARY_BLOCK

    run(body)


def test_notification_beyond_the_limit_is_refused(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            message = bytes(MAX_NOTIFICATION_BYTES + 1)
            with pytest.raises(ValueError):
                await pair.sender.write(pair.receiver.name, [1], [1], notification=message, timeout_s=10)
            with pytest.raises(ValueError):
                await pair.sender.notify(pair.receiver.name, message)

    run(body)


def test_fence_of_a_finished_write_says_done(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            pending = pair.sender.submit(pair.receiver.name, [1], [1], timeout_s=10)
            await pending.done
            assert await pending.fence is Fence.DONE

    run(body)


def test_many_writes_at_once_all_land(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            writes = [pair.sender.submit(pair.receiver.name, [i], [63 - i], timeout_s=10) for i in range(64)]
            for write in writes:
                await write.done
            for block in range(64):
                assert block_bytes(pair.receiver.pool, 63 - block) == block_bytes(pair.sender.pool, block)
            stats = pair.sender.stats()
            assert (stats.writes_done, stats.blocks_written, stats.live_writes) == (64, 64, 0)
            assert stats.bytes_written == 64 * LAYOUT.block_bytes

    run(body)


def test_caller_that_gives_up_does_not_stop_the_write(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            pending = pair.sender.submit(pair.receiver.name, [1], [1], timeout_s=10)
            pending.done.cancel()
            assert await pending.fence is Fence.DONE
            assert block_bytes(pair.receiver.pool, 1) == block_bytes(pair.sender.pool, 1)

    run(body)


def test_closed_connector_takes_no_work(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            waiting = asyncio.create_task(pair.sender.expect(NONCE, timeout_s=10))
            await asyncio.sleep(0.01)
            assert await pair.sender.close()
            assert await pair.sender.close()
            with pytest.raises(ConnectorClosed):
                await waiting
            with pytest.raises(ConnectorClosed):
                pair.sender.submit(pair.receiver.name, [1], [1], timeout_s=1)
            with pytest.raises(ConnectorClosed):
                await pair.sender.connect(pair.receiver.handshake())
            with pytest.raises(ConnectorClosed):
                await pair.sender.expect(NONCE, timeout_s=1)
            with pytest.raises(ConnectorClosed):
                await pair.sender.notify(pair.receiver.name, NONCE)
            await pair.sender.disconnect(pair.receiver.name)

    run(body)


def test_forgetting_a_nonce_ends_its_wait(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            waiting = asyncio.create_task(pair.receiver.expect(NONCE, timeout_s=10))
            await asyncio.sleep(0.01)
            pair.receiver.forget(NONCE)
            with pytest.raises(TransferError):
                await waiting

    run(body)


def test_declared_death_of_a_peer_reaches_who_watches_it(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            gone = pair.receiver.peer_gone(pair.sender.name)
            await asyncio.sleep(0.05)
            assert not gone.done()
            pair.receiver.declare_gone(pair.sender.name)
            await asyncio.wait_for(gone, 5)
            assert not pair.receiver.is_peer_alive(pair.sender.name)
            await pair.receiver.peer_gone(pair.sender.name)
            with pytest.raises(PeerDown):
                await pair.receiver.connect(pair.sender.handshake())
            assert pair.receiver.stats().peers_lost == 1

    run(body)


def test_peer_never_seen_cannot_be_watched(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            with pytest.raises(PeerDown):
                pair.receiver.peer_gone("prefill-" + "0" * 32)

    run(body)


def test_watch_of_a_peer_fails_where_we_leave_it_and_where_we_close(kind: str) -> None:
    async def body() -> None:
        async with connected_pair(kind) as pair:
            gone = pair.receiver.peer_gone(pair.sender.name)
            await asyncio.sleep(0.05)
            await pair.receiver.disconnect(pair.sender.name)
            with pytest.raises(PeerDown):
                await gone
            gone = pair.sender.peer_gone(pair.receiver.name)
            await asyncio.sleep(0.05)
            await pair.sender.close()
            with pytest.raises(ConnectorClosed):
                await gone
            with pytest.raises(ConnectorClosed):
                pair.sender.peer_gone(pair.receiver.name)

    run(body)
