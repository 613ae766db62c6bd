"""The loop that the simulations stand on."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.sim.virtual_time import Hang, run_in_virtual_time, virtual_loop


def test_an_hour_passes_at_once() -> None:
    async def body() -> float:
        await asyncio.sleep(3600.0)
        return virtual_loop().time()

    started = time.monotonic()
    assert 3600.0 <= run_in_virtual_time(body()) < 3600.1
    assert time.monotonic() - started < 5.0


def test_a_wait_that_nothing_can_end_is_an_error() -> None:
    async def body() -> None:
        asyncio.get_running_loop().call_soon(lambda: None)
        await asyncio.Event().wait()

    with pytest.raises(Hang):
        run_in_virtual_time(body())


def test_an_interruption_comes_between_two_turns() -> None:
    async def body() -> list[str]:
        seen: list[str] = []
        virtual_loop().interrupt(3, lambda: seen.append("now"))
        for index in range(5):
            seen.append(str(index))
            await asyncio.sleep(0)
        return seen

    assert run_in_virtual_time(body()) == ["0", "1", "2", "3", "now", "4"]
