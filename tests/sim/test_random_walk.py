"""Hundreds of seeded runs in which everything that can go wrong between two pools goes wrong together."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial

import pytest

from engine.engine import Engine
from engine.zone import PUBLIC, Zone, ZoneSpan
from tests.deployments.support import GRANT_KEY
from tests.engine.toy_model import CASE, EOS, OTHER_CASE, PLAN, tokens_of
from tests.sim.cluster import NEW_GRANT_KEY, TRANSFER_KEY, Cluster, fail_next_step, running_cluster
from tests.sim.virtual_time import run_in_virtual_time
from transfer.local_connector import Fault

NUM_SEEDS = 200
SEEDS_A_TEST = 50
NUM_REQUESTS = 10
ZONES: tuple[Zone, ...] = (PUBLIC, PLAN, CASE, OTHER_CASE)
EXERCISED = {  # by every test below, or it shows less than it says
    "handoff landed", "handoff failed", "handoff cancelled", "fence notice", "fence confirmed", "fence peer_gone",
    "fallback aborted", "fallback digest_mismatch", "fallback prefill_failed", "fallback prefill_gave_up",
    "ended length", "ended stop", "left",
}  # fmt: skip


def set_the_weather(cluster: Cluster) -> None:
    """Which faults this run has, and how often; a third of the runs has none of a kind."""
    draw = cluster.random

    def share(most: float) -> float:
        return draw.choice((0.0, draw.uniform(0, most), draw.uniform(0, most)))

    network, fabric = cluster.network, cluster.fabric
    network.slow, network.slow_s = share(0.5), draw.choice((0.02, 0.3, 8.0))
    network.loses_cancel, network.loses_settle = share(0.3), share(0.3)
    network.breaks_call, network.refuses_choice = share(0.2), share(0.1)
    fabric.loses_message, fabric.repeats_message, fabric.forges_message = share(0.2), share(0.3), share(0.2)
    rates = [share(0.3) for _ in range(5)]

    def draw_fault() -> Fault:
        hits = [draw.random() < rate for rate in rates]
        return Fault(
            delay_s=draw.choice((0.01, 0.3, 4.0)) if hits[0] else draw.uniform(0, 0.004),
            notification_delay_s=draw.uniform(0, 1.0) if hits[1] else 0.0,
            drops_notification=hits[2],
            corrupt_block=0 if hits[3] and draw.random() < 0.5 else None,
            fails=hits[4] and draw.random() < 0.5,
        )

    fabric.draw_fault = draw_fault


def draw_prompt(cluster: Cluster) -> tuple[tuple[int, ...], tuple[ZoneSpan, ...]]:
    """One of a few shared beginnings and a tail that is sometimes shared too, each part with its zone."""
    draw = cluster.random
    head = tokens_of(draw.randint(0, 2), draw.choice((0, 4, 8, 13)))
    tail = tokens_of(draw.randint(10, 14), draw.randint(1, 40))
    if not head:
        return tail, (ZoneSpan(len(tail), draw.choice(ZONES)),)
    return head + tail, (ZoneSpan(len(head), PUBLIC), ZoneSpan(len(head) + len(tail), draw.choice(ZONES)))


async def clients(cluster: Cluster) -> None:
    draw = cluster.random
    for _ in range(NUM_REQUESTS):
        prompt, spans = draw_prompt(cluster)
        task = cluster.ask(
            prompt,
            zone=spans,
            max_tokens=draw.choice((1, 3, 12, 30)),
            ignore_eos=draw.random() < 0.5,
            priority=draw.choice((0, 0, 1)),
            pause_s=draw.choice((0.0, 0.0, 0.05)),
        )[1]
        if draw.random() < 0.4:
            asyncio.get_running_loop().call_later(draw.choice((0.0, 0.01, 0.05, 1.0)) * draw.random(), task.cancel)
        await asyncio.sleep(draw.choice((0.0, 0.01, 0.5)) * draw.random())


async def disasters(cluster: Cluster) -> None:
    draw, decode = cluster.random, cluster.decode
    for _ in range(draw.randint(0, 3)):
        await asyncio.sleep(draw.uniform(0, 0.4))
        alive = [served for served in cluster.pool.replicas if served.is_alive]
        match draw.choice(("kill", "break prefill", "break decode", "stall", "stall", "purge", "purge", "rotate")):
            case "kill" if alive:
                cluster.kill_prefill(draw.choice(alive))
            case "break prefill" if alive:
                cluster.break_engine(draw.choice(alive))
            case "break decode" if draw.random() < 0.3:
                fail_next_step(decode)
            case "stall":
                cluster.fabric.stall(decode.connector.name)
                delay_s = draw.choice((0.1, 3.0, 20.0))
                asyncio.get_running_loop().call_later(delay_s, cluster.fabric.resume, decode.connector.name)
            case "purge":
                zone = draw.choice(ZONES)
                epoch = cluster.epochs.raise_epoch(zone)
                for replica in (decode, *(served.replica for served in alive)):
                    replica.host.post(partial(Engine.purge, zone_path=zone.path, epoch=epoch))
            case "rotate":
                ring = (cluster.random.randbytes(32), TRANSFER_KEY)[: draw.choice((1, 2))]
                cluster.rotate(ring, (NEW_GRANT_KEY, GRANT_KEY))


async def one_run(seed: int) -> Counter[str]:
    async with running_cluster(seed, num_prefill=1 + seed % 2) as cluster:
        set_the_weather(cluster)
        await asyncio.gather(clients(cluster), disasters(cluster))
    counts = Counter({f"handoff {name}": count for name, count in cluster.outcomes().items()})
    counts.update({f"fallback {name}": count for name, count in cluster.fallbacks().items()})
    counts.update({f"fence {name}": count for name, count in cluster.fences().items()})
    for answer in cluster.answers:
        counts["left" if answer.has_left else f"ended {answer.finish_reason or answer.error}"] += 1
        counts["ended by the end token"] += bool(answer.tokens and answer.tokens[-1] == EOS)
    return counts


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_A_TEST))
def test_no_schedule_of_faults_gives_a_wrong_token_or_leaves_anything_behind(first: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(first, first + SEEDS_A_TEST):
        try:
            counts += run_in_virtual_time(one_run(seed))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert counts.keys() >= EXERCISED, EXERCISED - counts.keys()
