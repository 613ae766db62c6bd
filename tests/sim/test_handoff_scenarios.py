"""Each thing that can go wrong in a handoff, alone: the right tokens or an honest error, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import ReplicaUnavailableError

from deployments.messages import FirstToken, PrefillCall, PrefillDone, PrefillEvent, PrefillRefused
from engine.zone import PUBLIC, ZoneSpan
from tests.deployments.support import lines_of
from tests.engine.toy_model import BLOCK_SIZE, CASE, EOS, OTHER_CASE, PLAN, ToyModel, tokens_of
from tests.sim.cluster import Answer, Cluster, fail_next_step, running_cluster, sim_config
from tests.sim.serve_double import Response
from tests.sim.virtual_time import run_in_virtual_time
from transfer.local_connector import Fault

PROMPT = tokens_of(1, 30)
NUM_BLOCKS = 8  # of PROMPT
NUM_WRITES = 4  # of PROMPT, in chunks of 8 tokens


def on_a_cluster(body: Callable[[Cluster], Awaitable[None]], **options: object) -> None:
    async def job() -> None:
        async with running_cluster(**options) as cluster:
            await body(cluster)

    run_in_virtual_time(job())


def assert_landed(answer: Answer, **origins: int) -> None:
    assert answer.provenance is not None
    assert answer.provenance.fallback is None
    assert answer.provenance.recomputed_tokens == 0
    assert {name: count for name, count in answer.provenance.origins.items() if count} == origins


def assert_recomputed(cluster: Cluster, answer: Answer, *reasons: str) -> None:
    """All of the prompt was computed on decode, and the fallback counted under the reason that was noticed first."""
    assert answer.provenance is not None
    reason = answer.provenance.fallback
    assert reason in reasons
    assert answer.provenance.origins["decode_computed"] == len(answer.prompt)
    assert cluster.fallbacks() == {reason: 1}
    assert cluster.outcomes() == {"failed": 1}


def test_a_handoff_pushes_every_block_and_computes_nothing_on_decode() -> None:
    async def body(cluster: Cluster) -> None:
        answer = await cluster.answer(PROMPT)
        assert answer.tokens == ToyModel.continuation(PROMPT, 6, ignore_eos=True)
        assert_landed(answer, prefill_computed=30)
        assert answer.provenance is not None
        assert answer.provenance.pushed_blocks == NUM_BLOCKS
        assert cluster.outcomes() == {"landed": 1}
        assert cluster.decode.runner.executed[0][0].start == 30  # type: ignore[attr-defined]

    on_a_cluster(body)


def test_blocks_that_decode_holds_are_not_sent_again() -> None:
    async def body(cluster: Cluster) -> None:
        await cluster.answer(PROMPT, zone=CASE)
        longer = PROMPT + tokens_of(2, 20)
        answer = await cluster.answer(longer, zone=CASE)
        assert answer.provenance is not None
        assert answer.provenance.origins["decode_cache"] == 28
        assert answer.provenance.pushed_blocks == 13 - 7
        other = await cluster.answer(longer, zone=OTHER_CASE)
        assert_landed(other, prefill_computed=50)

    on_a_cluster(body)


def test_kv_of_another_arithmetic_is_refused_by_name_and_computed_again() -> None:
    async def body(cluster: Cluster) -> None:
        answer = await cluster.answer(PROMPT)
        assert answer.tokens == ToyModel.continuation(PROMPT, 6, ignore_eos=True)
        assert_recomputed(cluster, answer, "incompatible")
        assert cluster.prefill.replica.runner.executed == []  # type: ignore[attr-defined]

    with lines_of("ray.serve.zoneserve.handoff") as lines:
        on_a_cluster(body, prefill_arithmetic="another")
    (line,) = lines
    assert "the peer differs in arithmetic: ours 'toy', theirs 'another'" in line


def test_requests_at_once_share_a_public_beginning_and_no_case() -> None:
    async def body(cluster: Cluster) -> None:
        head = tokens_of(3, 2 * BLOCK_SIZE)
        asked = []
        for index in range(12):
            spans = (ZoneSpan(len(head), PUBLIC), ZoneSpan(30, (PLAN, CASE, OTHER_CASE)[index % 3]))
            asked.append(cluster.ask(head + tokens_of(index % 4, 22), zone=spans, max_tokens=9))
        await asyncio.gather(*(task for _, task in asked))
        assert all(answer.finish_reason == "length" for answer, _ in asked)

    on_a_cluster(body, num_prefill=2)


@pytest.mark.parametrize("max_tokens", [1, 6])
def test_a_request_that_its_first_token_ends_frees_its_blocks_behind_the_fence(max_tokens: int) -> None:
    """By the end-of-sequence token, or by max_tokens: in either case before the last write has landed."""
    prompt = PROMPT if max_tokens == 1 else next(
        prompt for seed in range(9999) if ToyModel.continuation(prompt := tokens_of(seed, 30), 1) == [EOS]
    )  # fmt: skip

    async def body(cluster: Cluster) -> None:
        cluster.fabric.draw_fault = lambda: Fault(delay_s=0.5)
        answer, task = cluster.ask(prompt, max_tokens=max_tokens, ignore_eos=False)
        await task
        assert len(answer.tokens) == 1
        await asyncio.sleep(0.1)
        assert cluster.fabric.may_write(cluster.decode.connector.name), "the writes are over: nothing is shown"
        assert cluster.decode.host._engine.stats().blocks_quarantined == NUM_BLOCKS
        await cluster.come_to_rest()
        assert cluster.fences().total() == 1

    on_a_cluster(body)


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
def test_a_request_that_ends_just_after_its_blocks_have_landed_frees_them(pause_s: float) -> None:
    """Its first token comes last and is its only one; a slow reader lets the handoff complete before the end."""

    async def body(cluster: Cluster) -> None:
        cluster.network.delays_event = lambda event: 1.0
        assert len((await cluster.answer(PROMPT, max_tokens=1, pause_s=pause_s)).tokens) == 1

    for seed in range(30):
        on_a_cluster(body, seed=seed)


def test_a_call_that_is_revoked_before_it_begins_computes_nothing() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.network.loses_cancel = 1.0
        cluster.network.delays_call_s = 1.0
        task = cluster.ask(PROMPT)[1]
        await asyncio.sleep(0.1)
        assert cluster.pool.counts["dispatched"] == 1
        task.cancel()
        await cluster.come_to_rest()
        assert cluster.fences() == {"confirmed": 1}
        assert cluster.prefill.replica.host._engine.stats().steps == 0

    on_a_cluster(body)


def test_a_step_that_fails_on_prefill_is_made_good_on_decode() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.break_engine(cluster.prefill)
        assert_recomputed(cluster, await cluster.answer(PROMPT), "aborted", "prefill_failed")

    on_a_cluster(body)


def test_a_step_that_fails_on_decode_is_an_error_and_prefill_is_told() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.ask(PROMPT)
        fail_next_step(cluster.decode)
        await cluster.come_to_rest()
        assert cluster.answers[0].error == "replica_lost: the decode replica has stopped"

    on_a_cluster(body)


@pytest.mark.parametrize("event_type", [FirstToken, PrefillDone])
def test_prefill_that_dies_at_an_event_is_made_good_or_no_longer_needed(event_type: type[PrefillEvent]) -> None:
    async def body(cluster: Cluster) -> None:
        def watch(response: Response, event: PrefillEvent) -> None:
            if isinstance(event, event_type):
                asyncio.get_running_loop().call_later(0.01, cluster.kill_prefill, cluster.prefill)

        cluster.pool.watch = watch
        cluster.fabric.draw_fault = lambda: Fault(delay_s=0.05)
        answer = await cluster.answer(PROMPT)
        if event_type is FirstToken:
            assert_recomputed(cluster, answer, "peer_down")
        else:
            assert_landed(answer, prefill_computed=30)

    on_a_cluster(body)


def test_prefill_that_dies_with_every_event_lost_is_made_good() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.network.delays_event = lambda event: 1.0
        cluster.fabric.draw_fault = lambda: Fault(delay_s=1.0)
        answer, task = cluster.ask(PROMPT)
        await asyncio.sleep(0.04)
        assert cluster.prefill.responses
        cluster.kill_prefill(cluster.prefill)
        await task
        assert_recomputed(cluster, answer, "peer_down")

    on_a_cluster(body)


@pytest.mark.parametrize(
    "error",
    [
        ActorUnavailableError("away", None),
        grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata()),
    ],
)
def test_prefill_that_cannot_be_reached_may_still_write_so_blocks_wait_for_their_fence(error: Exception) -> None:
    """Only an ActorDiedError says that it is dead."""

    async def body(cluster: Cluster) -> None:
        decode = cluster.decode.host._engine
        cluster.fabric.stall(cluster.decode.connector.name)
        cluster.network.loses_settle = 1.0
        answer, task = cluster.ask(PROMPT)
        await asyncio.sleep(0.04)
        cluster.prefill.responses[0]._send(error)
        await task
        assert answer.provenance is not None
        assert answer.provenance.origins["decode_computed"] == 30
        await asyncio.sleep(60.0)
        assert decode.stats().blocks_quarantined == NUM_BLOCKS
        cluster.network.loses_settle = 0.0
        cluster.fabric.resume(cluster.decode.connector.name)
        await cluster.come_to_rest()
        assert "peer_gone" not in cluster.fences()

    on_a_cluster(body)


def test_prefill_that_gives_a_call_up_is_made_good() -> None:
    """Serve reports it like a cancellation, and nobody here has cancelled anything."""

    async def body(cluster: Cluster) -> None:
        cluster.fabric.loses_message = 1.0
        cluster.network.breaks_call = 1.0
        assert_recomputed(cluster, await cluster.answer(PROMPT), "prefill_gave_up")

    on_a_cluster(body)


def test_a_first_token_that_comes_after_the_blocks_is_waited_for() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.network.delays_event = lambda event: 4.0
        assert_landed(await cluster.answer(PROMPT), prefill_computed=30)

    on_a_cluster(body)


def test_a_first_token_that_never_comes_is_sampled_again_on_decode() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.network.delays_event = lambda event: 30.0
        answer = await cluster.answer(PROMPT)
        assert_recomputed(cluster, answer, "first_token_lost")

    on_a_cluster(body)


def test_a_stream_that_ends_without_a_first_token_is_not_waited_for() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.network.loses_first_token = True
        answer = await cluster.answer(PROMPT)
        assert asyncio.get_running_loop().time() < 1.0
        assert_recomputed(cluster, answer, "first_token_lost")

    on_a_cluster(body)


def test_a_corrupted_block_is_found_before_the_first_step() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.fabric.faults.extend([Fault(), Fault(corrupt_block=1)])
        assert_recomputed(cluster, await cluster.answer(PROMPT), "digest_mismatch")

    on_a_cluster(body)


def test_a_write_that_fails_is_made_good() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.fabric.faults.extend([Fault(), Fault(fails=True)])
        assert_recomputed(cluster, await cluster.answer(PROMPT), "aborted", "prefill_failed")

    on_a_cluster(body)


def test_a_lost_notice_costs_seconds_not_the_whole_handoff_timeout() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.fabric.loses_message = 1.0
        loop = asyncio.get_running_loop()
        answer, task = cluster.ask(PROMPT)
        await task
        assert loop.time() < 5.5
        assert_recomputed(cluster, answer, "notice_lost")
        await cluster.come_to_rest()
        assert cluster.fences() == {"confirmed": 1}

    on_a_cluster(body, config=sim_config(handoff_timeout_s=60.0))


def test_repeated_and_forged_notices_change_nothing() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.fabric.repeats_message = cluster.fabric.forges_message = 1.0
        assert_landed(await cluster.answer(PROMPT), prefill_computed=30)
        assert cluster.decode._receiver.stats().forged_notices == 1

    on_a_cluster(body)


def test_stalled_writes_keep_blocks_on_both_sides_until_they_have_landed() -> None:
    async def body(cluster: Cluster) -> None:
        decode, prefill = cluster.decode.host._engine, cluster.prefill.replica.host._engine
        cluster.fabric.stall(cluster.decode.connector.name)
        assert_recomputed(cluster, await cluster.answer(PROMPT), "timeout")
        await asyncio.sleep(60.0)
        assert decode.stats().blocks_quarantined == NUM_BLOCKS
        assert prefill.stats().held == 1
        cluster.fabric.resume(cluster.decode.connector.name)
        await cluster.come_to_rest()
        assert decode.stats().blocks_quarantined == prefill.stats().held == 0

    on_a_cluster(body)


def test_a_fence_is_asked_for_until_it_is_had() -> None:
    """Both the notice and every answer of prefill are lost for minutes; then one comes through."""

    async def body(cluster: Cluster) -> None:
        cluster.fabric.loses_message = cluster.network.loses_settle = 1.0
        await cluster.answer(PROMPT)
        await asyncio.sleep(300.0)
        assert cluster.decode.host._engine.stats().blocks_quarantined == NUM_BLOCKS
        cluster.network.loses_settle = 0.0
        await cluster.come_to_rest()
        assert cluster.fences() == {"confirmed": 1}
        assert cluster.pool.counts["settle"] < 30, "prefill is asked too often"

    on_a_cluster(body)


def test_no_prefill_replica_is_made_good_within_the_wait_for_one() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.kill_prefill(cluster.prefill, replacement_s=60.0)
        assert_recomputed(cluster, await cluster.answer(PROMPT), "no_prefill_replica")

    on_a_cluster(body)


def test_prefill_replica_that_is_gone_when_dispatched_to_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sending_fails(response: Response) -> None:
        response.cancel()
        raise ReplicaUnavailableError("gone")

    async def body(cluster: Cluster) -> None:
        monkeypatch.setattr(Response, "_fetch_future_result_async", sending_fails)
        assert_recomputed(cluster, await cluster.answer(PROMPT), "prefill_unavailable")

    on_a_cluster(body)


def test_requests_wait_their_turn_for_room_on_decode() -> None:
    async def body(cluster: Cluster) -> None:
        asked = [cluster.ask(tokens_of(index, 60), max_tokens=20) for index in range(8)]
        await asyncio.sleep(0.01)
        assert cluster.decode.host._engine.stats().reserved < 4
        await asyncio.gather(*(task for _, task in asked))
        assert all(answer.finish_reason == "length" for answer, _ in asked)

    on_a_cluster(body)


def test_no_room_on_decode_is_an_error_within_its_limit() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.fabric.stall(cluster.decode.connector.name)
        first = [cluster.ask(tokens_of(index, 80))[1] for index in range(2)]
        await asyncio.sleep(0.1)
        last, task = cluster.ask(tokens_of(9, 60))
        await task
        assert last.error == "no_capacity: no KV blocks became free on decode"
        cluster.fabric.resume(cluster.decode.connector.name)
        await asyncio.gather(*first)

    on_a_cluster(body)


def test_a_request_tried_again_on_another_decode_replica_meets_nothing_of_its_earlier_self() -> None:
    """Prefill may still compute for the first attempt, or have revoked it: the second is another handoff."""

    async def body(cluster: Cluster) -> None:
        cluster.network.loses_cancel = 1.0
        task = cluster.ask(PROMPT, request_id="gen-a")[1]
        await asyncio.sleep(0.01)
        assert cluster.prefill.responses
        second, second_task = cluster.ask(PROMPT, request_id="gen-a", replica=cluster.add_decode())
        await asyncio.sleep(0.001)
        task.cancel()
        await second_task
        assert_landed(second, prefill_cache=28, prefill_computed=2)

    on_a_cluster(body)


def test_a_request_tried_again_on_the_same_decode_replica_does_not_wait_for_a_fence() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.fabric.faults.append(Fault(delay_s=3.0))
        task = cluster.ask(PROMPT, request_id="gen-a")[1]
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.sleep(0.02)
        assert cluster.decode.host._engine.stats().blocks_quarantined == NUM_BLOCKS
        assert_landed(await cluster.answer(PROMPT, request_id="gen-a"), prefill_cache=28, prefill_computed=2)

    on_a_cluster(body)


def test_a_call_delivered_twice_is_refused_and_does_not_lift_the_fence_of_the_first() -> None:
    async def body(cluster: Cluster) -> None:
        calls: list[PrefillCall] = []
        dispatch = cluster.pool.dispatch
        cluster.pool.dispatch = lambda selection, call: (calls.append(call), dispatch(selection, call))[1]  # type: ignore[method-assign]
        cluster.fabric.stall(cluster.decode.connector.name)
        task = cluster.ask(PROMPT)[1]
        await asyncio.sleep(0.1)
        events = [event async for event in cluster.prefill.replica.prefill(calls[0])]  # type: ignore[attr-defined]
        assert events == [PrefillRefused("replayed")]
        task.cancel()
        await asyncio.sleep(20.0)
        assert cluster.decode.host._engine.stats().blocks_quarantined == NUM_BLOCKS
        cluster.fabric.resume(cluster.decode.connector.name)

    on_a_cluster(body)


def test_tokens_that_prefill_computes_although_decode_held_them_are_counted() -> None:
    async def body(cluster: Cluster) -> None:
        await cluster.answer(PROMPT, zone=CASE)
        cluster.kill_prefill(cluster.prefill, replacement_s=0.01)
        await asyncio.sleep(0.1)
        await cluster.answer(PROMPT + tokens_of(2, 20), zone=CASE)
        assert cluster.decode.metrics.duplicated._value.get() == 28

    on_a_cluster(body)
