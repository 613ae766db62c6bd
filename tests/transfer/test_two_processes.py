"""NIXL between two OS processes: landing, death, stall, fence. Over shared memory and over TCP."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.transfer.support import CANARY, LAYOUT, NUM_BLOCKS, Pair, block_bytes, make_ends, make_pool, run, until
from transfer.handoff import LandingRefused
from transfer.nixl_connector import NixlConnector
from transfer.protocol import Fence, PeerDown, TransferTimeout
from transfer.quarantine import HandoffFault

ROOT = Path(__file__).parents[2]
CANARY_DIGEST = hashlib.sha256(bytes([CANARY]) * LAYOUT.block_bytes).hexdigest()
TRANSPORTS = pytest.mark.parametrize("transport", ["any", "tcp"])


class Remote:
    """The other process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ask(self, do: str, **arguments: Any) -> Any:
        answer = await self.try_ask(do, **arguments)
        assert "ok" in answer, answer
        return answer["ok"]

    async def try_ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        line = await self.process.stdout.readline()
        assert line, "the other process has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def handshake(self) -> bytes:
        return bytes.fromhex(await self.ask("handshake"))

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    async def stop(self) -> None:
        """SIGSTOP, and wait until every thread has stopped."""
        self.signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        await until(lambda: all(_state(task) == "T" for task in tasks.iterdir()))


@asynccontextmanager
async def remote(role: str) -> AsyncIterator[Remote]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.transfer.peer_process",
        role,
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**20,
    )
    try:
        yield Remote(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def local(role: str) -> AsyncIterator[NixlConnector]:
    connector = await asyncio.to_thread(NixlConnector, role, make_pool(fill=CANARY if role == "decode" else None))
    try:
        yield connector
    finally:
        await connector.close(timeout_s=2)


@pytest.fixture(autouse=True)
def _transport(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if transport == "tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")


async def write_for_ever(connector: NixlConnector, peer: str) -> None:
    while True:
        await connector.write(peer, list(range(32)), list(range(32)), timeout_s=5)


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def expected_blocks(connector: NixlConnector, goals: dict[int, int]) -> list[str]:
    """Digests of the other pool if exactly `goals` (its block -> ours) have been written into it."""
    return [
        hashlib.sha256(block_bytes(connector.pool, goals[i])).hexdigest() if i in goals else CANARY_DIGEST
        for i in range(NUM_BLOCKS)
    ]


@TRANSPORTS
def test_whole_handoff_from_another_process_lands_verified(transport: str) -> None:
    async def body() -> None:
        async with remote("prefill") as prefill, local("decode") as decode:
            sender = await decode.connect(await prefill.handshake())
            ends = make_ends(Pair(sender=decode, receiver=decode))
            landing = ends.issue([30, 31, 32, 9], sender=sender)
            handshake = decode.handshake().hex()
            await prefill.ask("accept", sealed=landing.sealed.hex(), handshake=handshake)
            waiting = asyncio.create_task(landing.landed(10))
            await prefill.ask("push", blocks=[3, 4])
            await prefill.ask("push", blocks=[5, 60])
            assert await prefill.ask("finish") == 4 * LAYOUT.block_bytes
            assert (await waiting).num_bytes == 4 * LAYOUT.block_bytes
            theirs = await prefill.ask("blocks")
            goals = {30: 3, 31: 4, 32: 5, 9: 60}
            for block in range(NUM_BLOCKS):
                digest = hashlib.sha256(block_bytes(decode.pool, block)).hexdigest()
                assert digest == (theirs[goals[block]] if block in goals else CANARY_DIGEST)
            again = await prefill.try_ask("accept", sealed=landing.sealed[:-1].hex(), handshake=handshake)
            assert again == {"error": "TicketRefused"}

    run(body, 60)


@TRANSPORTS
def test_killed_receiver_is_noticed_and_its_name_stays_dead(transport: str) -> None:
    async def body() -> None:
        async with remote("decode") as decode, local("prefill") as prefill:
            handshake = await decode.handshake()
            peer = await prefill.connect(handshake)
            await prefill.write(peer, [1], [1], timeout_s=10)
            gone = prefill.peer_gone(peer)
            await asyncio.sleep(0.1)
            assert not gone.done()
            decode.signal(signal.SIGKILL)
            killed_s = time.monotonic()
            with pytest.raises(PeerDown):
                await write_for_ever(prefill, peer)
            await gone
            assert time.monotonic() - killed_s < 3
            assert not prefill.is_peer_alive(peer)
            assert prefill.stats().live_writes == 0
            with pytest.raises(PeerDown):
                await prefill.connect(handshake)
            if transport == "tcp":
                return
            async with remote("decode") as restarted:
                name = await prefill.connect(await restarted.handshake())
                assert name != peer
                await prefill.write(name, [1], [2], timeout_s=10)
                assert await restarted.ask("blocks") == expected_blocks(prefill, {2: 1})

    run(body, 60)


@TRANSPORTS
def test_killed_sender_is_a_fence_for_what_it_was_writing(transport: str) -> None:
    async def body() -> None:
        async with remote("prefill") as prefill, local("decode") as decode:
            sender = await decode.connect(await prefill.handshake())
            ends = make_ends(Pair(sender=decode, receiver=decode))
            landing = ends.issue([30, 31], sender=sender)
            await prefill.ask("accept", sealed=landing.sealed.hex(), handshake=decode.handshake().hex())
            await prefill.ask("push", blocks=[3])
            waiting = asyncio.create_task(landing.landed(20))
            await asyncio.sleep(0.2)
            prefill.signal(signal.SIGKILL)
            killed_s = time.monotonic()
            with pytest.raises(LandingRefused) as caught:
                await waiting
            assert caught.value.fault is HandoffFault.PEER_DOWN
            assert caught.value.is_fenced
            assert time.monotonic() - killed_s < 3
            freed: list[str] = []
            landing.release_when_fenced(lambda: freed.append("freed"))
            assert freed == ["freed"]

    run(body, 60)


# Over shared memory the writer copies by itself, so a small write to a stopped process simply completes.
@pytest.mark.parametrize("transport", ["tcp"])
def test_stalled_receiver_fails_the_deadline_and_the_fence_comes_when_it_wakes(transport: str) -> None:
    async def body() -> None:
        async with remote("decode") as decode, local("prefill") as prefill:
            peer = await prefill.connect(await decode.handshake())
            await prefill.write(peer, [0], [0], timeout_s=10)
            await decode.stop()
            try:
                started_s = time.monotonic()
                with pytest.raises(TransferTimeout) as caught:
                    await prefill.write(peer, [1, 2], [10, 12], timeout_s=0.5)
                assert 0.45 < time.monotonic() - started_s < 1.5
                fence = caught.value.fence
                await asyncio.sleep(0.3)
                assert not fence.done()
                assert prefill.stats().overdue_writes == prefill.stats().live_writes == 1
            finally:
                decode.signal(signal.SIGCONT)
            assert await asyncio.wait_for(fence, 5) is Fence.DONE
            assert prefill.stats().late_fences == 1
            assert await decode.ask("blocks") == expected_blocks(prefill, {0: 0, 10: 1, 12: 2})

    run(body, 60)


@pytest.mark.parametrize("transport", ["tcp"])
def test_close_with_a_stalled_peer_is_bounded_and_says_that_it_is_not_clean(transport: str) -> None:
    async def body() -> None:
        async with remote("decode") as decode, remote("prefill") as prefill:
            peer = await prefill.ask("connect", handshake=(await decode.handshake()).hex())
            assert await prefill.ask("write", peer=peer, local=[1, 2], remote=[1, 2], timeout_s=10) == 1
            await decode.stop()
            try:
                refused = await prefill.try_ask("write", peer=peer, local=[3], remote=[3], timeout_s=0.2)
                assert refused == {"error": "TransferTimeout"}
                started_s = time.monotonic()
                assert await prefill.ask("close", timeout_s=0.5) is False
                assert time.monotonic() - started_s < 2
                assert prefill.process.stdin is not None
                prefill.process.stdin.close()
                await asyncio.wait_for(prefill.process.wait(), 5)
                assert prefill.process.returncode == 0
            finally:
                decode.signal(signal.SIGCONT)

    run(body, 60)


@TRANSPORTS
def test_writes_in_flight_as_the_receiver_dies_all_end(transport: str) -> None:
    async def body() -> None:
        async with remote("decode") as decode, local("prefill") as prefill:
            peer = await prefill.connect(await decode.handshake())
            writes = [prefill.submit(peer, list(range(64)), list(range(64)), timeout_s=10) for _ in range(50)]
            decode.signal(signal.SIGKILL)
            fences = await asyncio.gather(*(write.fence for write in writes))
            assert set(fences) <= {Fence.DONE, Fence.PEER_GONE, Fence.NEVER_POSTED}
            await until(lambda: prefill.stats().live_writes == 0)

    run(body, 60)
