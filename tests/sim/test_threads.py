"""The same replicas with each engine on its own thread, in real time: what turns of one loop cannot show."""

from __future__ import annotations

import asyncio

import pytest

from tests.engine.toy_model import CASE, OTHER_CASE, tokens_of
from tests.sim.cluster import running_cluster
from transfer.local_connector import Fault

NUM_REQUESTS = 24


@pytest.mark.parametrize("seed", range(6))
def test_requests_that_come_leave_and_fall_back_at_once_are_right_and_leave_nothing(seed: int) -> None:
    async def body() -> None:
        async with asyncio.timeout(20), running_cluster(seed, num_prefill=2, has_threads=True) as cluster:
            draw = cluster.random
            cluster.fabric.draw_fault = lambda: Fault(
                delay_s=draw.uniform(0, 0.01), corrupt_block=0 if draw.random() < 0.1 else None
            )
            cluster.network.breaks_call = 0.1
            for index in range(NUM_REQUESTS):
                prompt = tokens_of(index % 5, draw.randint(8, 60))
                task = cluster.ask(prompt, zone=draw.choice((CASE, OTHER_CASE)), max_tokens=draw.choice((1, 8, 20)))[1]
                if draw.random() < 0.4:
                    asyncio.get_running_loop().call_later(draw.uniform(0, 0.05), task.cancel)
                await asyncio.sleep(draw.uniform(0, 0.01))
                if index == NUM_REQUESTS // 2:
                    cluster.kill_prefill(cluster.prefill, replacement_s=0.02)
        assert cluster.outcomes()["landed"] > 0

    asyncio.run(body())
