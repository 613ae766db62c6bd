"""One request, interrupted before every single turn of the event loop: no moment is the wrong one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from tests.engine.toy_model import tokens_of
from tests.sim.cluster import Cluster, running_cluster, stop_engine
from tests.sim.virtual_time import run_in_virtual_time, virtual_loop
from transfer.local_connector import Fault

PROMPT = tokens_of(1, 30)
MIN_TURNS = 60

Interruption = Callable[[Cluster, "asyncio.Task[None]"], object]


def client_leaves(cluster: Cluster, client: asyncio.Task[None]) -> None:
    client.cancel()


def prefill_dies(cluster: Cluster, client: asyncio.Task[None]) -> None:
    cluster.kill_prefill(cluster.prefill)


def prefill_gives_up(cluster: Cluster, client: asyncio.Task[None]) -> None:
    for response in list(cluster.prefill.responses):
        response.give_up()


def prefill_engine_fails(cluster: Cluster, client: asyncio.Task[None]) -> None:
    cluster.break_engine(cluster.prefill)


def decode_engine_fails(cluster: Cluster, client: asyncio.Task[None]) -> None:
    stop_engine(cluster.decode)


def prefill_dies_and_the_client_leaves(cluster: Cluster, client: asyncio.Task[None]) -> None:
    """The client leaves while the fallback is under way."""
    prefill_dies(cluster, client)
    virtual_loop().interrupt(cluster.random.randint(1, 12), client.cancel)


INTERRUPTIONS: tuple[Interruption, ...] = (
    client_leaves,
    prefill_dies,
    prefill_gives_up,
    prefill_engine_fails,
    decode_engine_fails,
    prefill_dies_and_the_client_leaves,
)


async def interrupted(interruption: Interruption, num_turns: int, fault: Fault) -> tuple[int, Counter[str]]:
    """Turns that the request took, and the outcome of its handoff."""
    async with running_cluster(num_turns) as cluster:
        cluster.fabric.draw_fault = lambda: fault
        loop = virtual_loop()
        started = loop.num_turns
        answer, client = cluster.ask(PROMPT, max_tokens=3)
        loop.interrupt(num_turns, lambda: interruption(cluster, client))
        await asyncio.wait([client])
        taken = loop.num_turns - started
        if interruption in (prefill_dies, prefill_gives_up, prefill_engine_fails):
            assert answer.finish_reason == "length", "the client felt it"
    return taken, cluster.outcomes()


@pytest.mark.parametrize("fault", [Fault(), Fault(delay_s=0.05), Fault(drops_notification=True)], ids=str)
@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=lambda value: value.__name__)
def test_an_interruption_at_any_moment_leaves_nothing_behind(interruption: Interruption, fault: Fault) -> None:
    num_turns, is_over = 0, False
    outcomes: Counter[str] = Counter()
    while not is_over:
        try:
            taken, counted = run_in_virtual_time(interrupted(interruption, num_turns, fault))
        except BaseException as error:
            error.add_note(f"interrupted after {num_turns} turns")
            raise
        outcomes += counted
        is_over = taken < num_turns
        num_turns += 1
    assert num_turns > MIN_TURNS
    if fault == Fault():
        assert outcomes.keys() >= {"landed", "failed"} or outcomes.keys() >= {"landed", "cancelled"}, outcomes
