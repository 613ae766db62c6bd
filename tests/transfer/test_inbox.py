"""The inbox holds what comes early, and holds its limits."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.transfer.support import run
from transfer import inbox as module
from transfer.inbox import HEARTBEAT, MAX_MESSAGES_PER_NONCE, NotificationInbox
from transfer.protocol import MAX_NOTIFICATION_BYTES, ConnectorClosed


def nonce(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_full_table_drops_the_oldest_that_nobody_expects() -> None:
    async def body() -> None:
        inbox = NotificationInbox(max_nonces=3)
        expected = asyncio.create_task(inbox.take(nonce(0)))
        await asyncio.sleep(0)
        for number in range(1, 5):
            inbox.deliver(nonce(number) + b"x")
        assert inbox.counts.refused == 2
        for number in (3, 4):
            assert await inbox.take(nonce(number)) == nonce(number) + b"x"
        inbox.deliver(nonce(0) + b"y")
        assert await expected == nonce(0) + b"y"

    run(body)


def test_table_full_of_expected_nonces_refuses_both_sides() -> None:
    async def body() -> None:
        inbox = NotificationInbox(max_nonces=1)
        expected = asyncio.create_task(inbox.take(nonce(0)))
        await asyncio.sleep(0)
        inbox.deliver(nonce(1))
        assert inbox.counts.refused == 1
        with pytest.raises(ValueError):
            await inbox.take(nonce(1))
        inbox.deliver(nonce(0))
        await expected

    run(body)


def test_messages_of_one_nonce_are_bounded() -> None:
    inbox = NotificationInbox()
    for number in range(MAX_MESSAGES_PER_NONCE + 3):
        inbox.deliver(nonce(0) + bytes([number]))
    assert inbox.counts.refused == 3


def test_forgotten_nonces_are_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FORGOTTEN_NONCES", 2)
    inbox = NotificationInbox()
    for number in range(3):
        inbox.forget(nonce(number))
    for number in range(3):
        inbox.deliver(nonce(number))
    assert (inbox.counts.late, inbox.counts.early) == (2, 1)


def test_message_of_an_impossible_size_is_refused_and_a_heartbeat_is_none() -> None:
    inbox = NotificationInbox()
    for message in (b"", b"x" * 15, b"x" * (MAX_NOTIFICATION_BYTES + 1)):
        inbox.deliver(message)
    inbox.deliver(HEARTBEAT)
    assert (inbox.counts.received, inbox.counts.refused) == (3, 3)


def test_second_waiter_of_a_nonce_is_refused() -> None:
    async def body() -> None:
        inbox = NotificationInbox()
        first = asyncio.create_task(inbox.take(nonce(0)))
        await asyncio.sleep(0)
        with pytest.raises(ValueError):
            await inbox.take(nonce(0))
        with pytest.raises(ValueError):
            await inbox.take(b"short")
        first.cancel()

    run(body)


def test_message_stays_where_its_waiter_is_cancelled_in_the_same_moment() -> None:
    async def body() -> None:
        inbox = NotificationInbox()
        for number in range(20):
            waiting = asyncio.create_task(inbox.take(nonce(number)))
            await asyncio.sleep(0)
            inbox.deliver(nonce(number))
            for _ in range(number % 3):
                await asyncio.sleep(0)
            if waiting.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                assert await inbox.take(nonce(number)) == nonce(number)
        assert not inbox.has_waiters

    run(body)


def test_messages_from_another_thread_wake_the_waiter() -> None:
    async def body() -> None:
        inbox = NotificationInbox()
        thread = threading.Thread(target=lambda: [inbox.deliver(nonce(number)) for number in range(100)])
        waits = [asyncio.create_task(inbox.take(nonce(number))) for number in range(100)]
        await asyncio.sleep(0)
        thread.start()
        assert await asyncio.gather(*waits) == [nonce(number) for number in range(100)]
        thread.join()

    run(body)


def test_closing_wakes_waiters_and_refuses_new_ones() -> None:
    async def body() -> None:
        inbox = NotificationInbox()
        waiting = asyncio.create_task(inbox.take(nonce(0)))
        await asyncio.sleep(0)
        inbox.close()
        with pytest.raises(ConnectorClosed):
            await waiting
        with pytest.raises(ConnectorClosed):
            await inbox.take(nonce(1))

    run(body)
