"""The scheduler: budget, order, seats, growth, preemption, and every way out of every state."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from engine.block_pool import BlockPool
from engine.errors import IntegrityError, QueueFullError, RequestError, RequestStateError
from engine.kv_cache_manager import KVCacheManager
from engine.request import Request, RequestStatus
from engine.scheduler import ScheduledChunk, Scheduler, SchedulerConfig
from tests.engine.toy_model import CASE, OTHER_CASE, FakeClock, make_request, tokens_of, toy_hasher


class Bench:
    """A scheduler with its cache, and a `step` that pretends to compute: each sample is token 7."""

    def __init__(self, num_blocks: int = 64, **config: int) -> None:
        cache = KVCacheManager(
            BlockPool(num_blocks, lambda _: None), toy_hasher(), 4, clock=FakeClock(), case_idle_ttl_s=900.0
        )
        config.setdefault("local_output_reserve", 0)
        self.cache = cache
        self.scheduler = Scheduler(SchedulerConfig(**config), cache)
        self._seed = 0

    def request(self, name: str, num_tokens: int, **fields: object) -> Request:
        self._seed += 1
        zone = fields.pop("zone", CASE)
        return make_request(name, tokens_of(self._seed, num_tokens), zone, **fields)  # type: ignore[arg-type]

    def add(self, name: str, num_tokens: int, **fields: object) -> Request:
        request = self.request(name, num_tokens, **fields)
        self.scheduler.add(request)
        return request

    def schedule(self) -> tuple[ScheduledChunk, ...]:
        chunks = self.scheduler.schedule()
        self.scheduler.check()
        return chunks

    def step(self) -> dict[str, int]:
        """One step; how many tokens of each request it computed."""
        chunks = self.schedule()
        self.scheduler.update(chunks)
        for chunk in chunks:
            request = self.scheduler.get(chunk.request_id)
            assert request is not None
            if chunk.samples:
                request.output_token_ids.append(7)
                if request.is_prefill_only or len(request.output_token_ids) == request.sampling.max_tokens:
                    self.scheduler.finish(request)
        for request in self.scheduler.take_outgrown():
            self.scheduler.finish(request)
        self.scheduler.check()
        return {chunk.request_id: len(chunk.token_ids) for chunk in chunks}

    def steps(self, count: int) -> list[dict[str, int]]:
        return [self.step() for _ in range(count)]


def names(chunks: Iterable[ScheduledChunk]) -> list[str]:
    return [chunk.request_id for chunk in chunks]


def test_a_prompt_is_computed_in_chunks_and_only_the_last_one_samples() -> None:
    bench = Bench(max_prefill_chunk=8)
    request = bench.add("a", 20)
    seen = []
    for _ in range(3):
        [chunk] = bench.schedule()
        seen.append((chunk.start, len(chunk.token_ids), chunk.samples))
        assert chunk.token_ids == request.token_ids(chunk.start, chunk.start + len(chunk.token_ids))
        assert len(chunk.block_ids) * 4 >= chunk.start + len(chunk.token_ids)
        bench.scheduler.update([chunk])
    assert seen == [(0, 8, False), (8, 8, False), (16, 4, True)]


def test_a_step_keeps_to_its_token_budget_and_serves_decodes_first() -> None:
    bench = Bench(max_num_batched_tokens=10, max_prefill_chunk=8, max_num_seqs=4)
    bench.add("a", 3)
    bench.add("b", 3)
    bench.step()
    bench.add("c", 30)
    bench.add("d", 30)
    chunks = bench.schedule()
    assert [(chunk.request_id, len(chunk.token_ids)) for chunk in chunks] == [("a", 1), ("b", 1), ("c", 8)]


def test_two_prefills_share_a_step() -> None:
    bench = Bench(max_num_batched_tokens=10, max_prefill_chunk=8, max_num_seqs=4)
    bench.add("a", 12)
    bench.add("b", 12)
    assert bench.steps(3) == [{"a": 8, "b": 2}, {"a": 4, "b": 6}, {"a": 1, "b": 4}]


def test_a_decode_is_never_starved_by_prefills() -> None:
    bench = Bench(max_num_batched_tokens=8, max_prefill_chunk=8, max_num_seqs=4)
    bench.add("a", 2, max_tokens=20)
    bench.step()
    for index in range(3):
        bench.add(f"long{index}", 50)
    assert all("a" in step for step in bench.steps(10))


def test_requests_run_in_order_of_arrival() -> None:
    bench = Bench(max_num_seqs=1)
    for name in "abc":
        bench.add(name, 4, max_tokens=1)
    assert bench.steps(3) == [{"a": 4}, {"b": 4}, {"c": 4}]


def test_a_smaller_priority_overtakes_in_the_queue() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("first", 4, max_tokens=1)
    bench.add("low", 4, max_tokens=1, priority=5)
    bench.add("high", 4, max_tokens=1, priority=-5)
    assert [next(iter(step)) for step in bench.steps(3)] == ["high", "first", "low"]


def test_a_prompt_of_higher_priority_goes_before_prefills_under_way() -> None:
    bench = Bench(max_num_batched_tokens=8, max_prefill_chunk=8, max_num_seqs=4)
    bench.add("low", 40, priority=1)
    bench.step()
    bench.add("equal", 8, priority=1)
    bench.add("high", 8, priority=0)
    assert bench.steps(3) == [{"high": 8}, {"high": 1, "low": 7}, {"high": 1, "low": 7}]


def test_a_request_that_does_not_fit_is_not_overtaken_by_a_later_one() -> None:
    bench = Bench(num_blocks=8)
    bench.add("a", 16, max_tokens=3)
    bench.step()
    bench.add("big", 24, max_tokens=1)
    bench.add("small", 4, max_tokens=1)
    assert bench.steps(2) == [{"a": 1}, {"a": 1}]
    assert bench.step() == {"big": 24, "small": 4}


def test_seats_limit_how_many_run() -> None:
    bench = Bench(max_num_seqs=2)
    for name in "abc":
        bench.add(name, 4, max_tokens=3)
    assert [sorted(step) for step in bench.steps(4)] == [["a", "b"]] * 3 + [["c"]]


def test_the_queue_is_bounded() -> None:
    bench = Bench(max_waiting=2)
    bench.add("a", 4)
    bench.add("b", 4)
    with pytest.raises(QueueFullError):
        bench.add("c", 4)
    bench.step()
    bench.add("c", 4)
    bench.scheduler.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 40}, "context"),
        ({"num_tokens": 39, "output_token_ids": [1]}, "context"),
        ({"num_tokens": 36}, "KV cache"),
        ({"num_tokens": 4, "max_tokens": 1, "output_token_ids": [1]}, "all its"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused(changes: dict[str, object], message: str) -> None:
    bench = Bench(num_blocks=8, max_model_len=40)
    with pytest.raises(RequestError, match=message):
        bench.add("a", **changes)  # type: ignore[arg-type]
    assert not bench.scheduler.has_work


def test_a_prompt_that_just_fits_is_served() -> None:
    bench = Bench(num_blocks=8, max_model_len=40)
    bench.add("a", 32, max_tokens=1)
    assert bench.step() == {"a": 32}


def test_a_live_id_is_refused_and_a_forgotten_one_is_not() -> None:
    bench = Bench()
    bench.add("a", 4, max_tokens=1)
    with pytest.raises(RequestError, match="already"):
        bench.add("a", 4)
    bench.step()
    bench.add("a", 4)


def test_a_request_object_is_served_once() -> None:
    bench = Bench()
    request = bench.add("a", 4, max_tokens=1)
    bench.step()
    with pytest.raises(RequestError, match="before"):
        bench.scheduler.add(request)


def test_a_decode_that_cannot_grow_preempts_the_latest_of_lowest_priority() -> None:
    bench = Bench(num_blocks=5)
    first = bench.add("first", 4, max_tokens=50)
    second = bench.add("second", 4, priority=-1, max_tokens=50)
    third = bench.add("third", 4, max_tokens=50)
    assert bench.step() == {"second": 4, "first": 4, "third": 4}
    assert bench.step() == {"second": 1, "first": 1}  # each needs a second block; two are free
    assert (third.status, third.num_computed_tokens, third.num_lost_tokens) == (RequestStatus.WAITING, 0, 4)
    bench.steps(3)
    assert bench.step() == {"second": 1}  # and a third block; one is free
    assert (first.status, first.num_preemptions) == (RequestStatus.WAITING, 1)
    assert second.num_preemptions == 0
    assert bench.scheduler.num_preemptions == 2


def test_a_decode_takes_the_blocks_of_another_that_matters_less() -> None:
    bench = Bench(num_blocks=6)
    high = bench.add("high", 4, max_tokens=50)
    low = bench.add("low", 13, priority=1, max_tokens=50)
    bench.add("sender", 4, priority=2, is_prefill_only=True)  # takes the last block and keeps it
    assert bench.step() == {"high": 4, "low": 13, "sender": 4}
    assert bench.step() == {"high": 1}
    assert (low.status, high.num_preemptions) == (RequestStatus.WAITING, 0)


def test_a_preempted_request_keeps_its_place_and_its_tokens() -> None:
    bench = Bench(num_blocks=3, local_output_reserve=0)
    bench.add("a", 4, max_tokens=4)
    late = bench.add("b", 4, max_tokens=4)
    bench.step()
    bench.step()
    assert late.status is RequestStatus.WAITING
    assert late.output_token_ids == [7]
    bench.add("c", 4)
    while late.status is RequestStatus.WAITING:
        bench.step()
    assert bench.scheduler.num_waiting == 1  # c is still behind it
    while late.status is not RequestStatus.FINISHED:
        bench.step()
    assert late.output_token_ids == [7] * 4
    assert late.num_recomputed_tokens <= 4


def test_a_victim_that_was_chosen_for_this_step_already_leaves_it_and_returns_its_budget() -> None:
    bench = Bench(num_blocks=8, max_num_batched_tokens=16, max_prefill_chunk=16, max_num_seqs=4)
    bench.add("low", 16, priority=1, max_tokens=30)
    bench.step()
    bench.add("high", 16, priority=0)
    chunks = bench.schedule()
    assert names(chunks) == ["high"]
    assert len(chunks[0].token_ids) == 16


def test_a_waiting_request_takes_the_seat_of_a_running_one_of_lower_priority() -> None:
    bench = Bench(max_num_seqs=2)
    low = bench.add("low", 4, priority=2, max_tokens=50)
    bench.add("mid", 4, priority=1, max_tokens=50)
    bench.step()
    bench.add("high", 4, priority=0, max_tokens=2)
    assert sorted(bench.step()) == ["high", "mid"]
    assert low.status is RequestStatus.WAITING
    bench.steps(2)
    assert low.status is RequestStatus.RUNNING


def test_equal_priority_never_preempts_on_arrival() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("a", 4, max_tokens=5)
    bench.step()
    bench.add("b", 4)
    assert bench.step() == {"a": 1}
    assert bench.scheduler.num_preemptions == 0


def test_nobody_is_preempted_for_a_request_that_would_not_fit_even_so() -> None:
    bench = Bench(num_blocks=8)
    bench.add("held", 12, is_prefill_only=True)
    bench.step()  # holds three blocks from now on
    low = bench.add("low", 8, priority=1, max_tokens=9)
    bench.step()
    bench.add("high", 24, priority=0)
    bench.step()
    assert low.status is RequestStatus.RUNNING
    assert bench.scheduler.num_preemptions == 0


def test_a_prefill_only_request_is_never_preempted() -> None:
    bench = Bench(num_blocks=5, max_num_batched_tokens=8, max_num_seqs=4, max_prefill_chunk=4)
    decode = bench.add("decode", 4, max_tokens=50)
    sender = bench.add("sender", 16, is_prefill_only=True, priority=9)
    assert bench.step() == {"decode": 4, "sender": 4}
    blocks = bench.cache.table("sender").as_tuple()
    assert len(blocks) == 4
    assert bench.step() == {"sender": 4}  # the decode cannot grow, and gives way although it matters more
    assert (decode.status, sender.num_preemptions) == (RequestStatus.WAITING, 0)
    bench.steps(4)
    assert sender.status is RequestStatus.HELD
    assert bench.cache.table("sender").as_tuple() == blocks
    bench.scheduler.release("sender")
    assert bench.step() == {"decode": 1}  # its full block was still in the cache


def test_a_sequence_that_outgrows_the_whole_pool_ends() -> None:
    bench = Bench(num_blocks=2)
    request = bench.add("a", 5, max_tokens=100)
    bench.steps(5)
    assert request.status is RequestStatus.FINISHED
    assert len(request.output_token_ids) == 4  # eight positions hold five and three; the ninth was sampled
    assert not bench.scheduler.has_work


def test_two_requests_that_cannot_both_grow_end_one_after_the_other() -> None:
    bench = Bench(num_blocks=4)
    requests = [bench.add(name, 7, max_tokens=9) for name in "ab"]
    for _ in range(60):
        bench.step()
    assert [len(request.output_token_ids) for request in requests] == [9, 9]
    assert bench.cache.pool.num_used == 0


def test_admission_beside_others_leaves_room_to_grow() -> None:
    bench = Bench(num_blocks=8, local_output_reserve=8)
    bench.add("a", 16, max_tokens=8)
    bench.step()
    late = bench.add("b", 12, max_tokens=8)
    bench.step()
    assert late.status is RequestStatus.WAITING  # 3 + 2 for its output + 1 for a's growth > 4
    while late.status is RequestStatus.WAITING:
        bench.step()
    assert bench.scheduler.num_preemptions == 0


def test_alone_a_request_may_use_the_whole_pool() -> None:
    bench = Bench(num_blocks=4, local_output_reserve=64)
    bench.add("a", 16, max_tokens=1)
    assert bench.step() == {"a": 16}


def test_a_cached_prefix_is_not_computed_again() -> None:
    bench = Bench()
    prompt = tokens_of(1, 14)
    bench.scheduler.add(make_request("a", prompt, CASE, max_tokens=1))
    bench.step()
    bench.scheduler.add(make_request("b", prompt, CASE, max_tokens=1))
    bench.scheduler.add(make_request("c", prompt, OTHER_CASE, max_tokens=1))
    assert bench.step() == {"b": 2, "c": 14}


def test_a_reservation_takes_a_seat_and_blocks_for_its_first_output() -> None:
    bench = Bench(num_blocks=16, max_num_seqs=1, local_output_reserve=8)
    assert bench.scheduler.reserve(bench.request("a", 8, max_tokens=20))
    assert len(bench.cache.table("a").block_ids) == 4
    assert not bench.scheduler.reserve(bench.request("b", 8))
    bench.add("c", 4)
    assert bench.schedule() == ()
    assert not bench.scheduler.has_work


def test_a_reservation_is_refused_without_trace_when_there_is_no_room() -> None:
    bench = Bench(num_blocks=4, local_output_reserve=0)
    bench.add("a", 8, max_tokens=9)
    bench.step()
    request = bench.request("b", 8)
    assert not bench.scheduler.reserve(request)  # a may grow into one of the two blocks left
    assert request.status is RequestStatus.WAITING
    assert bench.scheduler.get("b") is None
    assert bench.scheduler.reserve(bench.request("c", 4))
    bench.scheduler.check()


def test_reservations_do_not_overtake_the_queue() -> None:
    bench = Bench(num_blocks=8, max_num_seqs=4)
    bench.scheduler.reserve(bench.request("first", 16))
    bench.add("queued", 16)
    assert not bench.scheduler.reserve(bench.request("late", 4))
    assert bench.scheduler.reserve(bench.request("urgent", 4, priority=-1))


def test_reservations_leave_the_queue_its_seats() -> None:
    bench = Bench(max_num_seqs=2)
    bench.scheduler.reserve(bench.request("first", 4))
    bench.add("queued", 4)
    assert not bench.scheduler.reserve(bench.request("late", 4))
    bench.scheduler.finish(bench.scheduler.reserved("first"))
    assert bench.scheduler.reserve(bench.request("next", 4))


def test_a_reservation_larger_than_the_pool_with_its_output_takes_what_there_is() -> None:
    bench = Bench(num_blocks=4, local_output_reserve=64)
    assert bench.scheduler.reserve(bench.request("a", 14, max_tokens=64))
    assert bench.cache.pool.num_available == 0


@pytest.mark.parametrize("fields", [{"is_prefill_only": True}, {"output_token_ids": [1]}])
def test_what_cannot_wait_for_a_remote_prefill_is_refused(fields: dict[str, object]) -> None:
    bench = Bench()
    with pytest.raises(RequestError, match="remote prefill"):
        bench.scheduler.reserve(bench.request("a", 8, **fields))


def test_an_id_in_quarantine_cannot_be_reserved_again() -> None:
    bench = Bench()
    request = bench.request("a", 8)
    bench.scheduler.reserve(request)
    bench.scheduler.finish(request)
    with pytest.raises(RequestError, match="quarantine"):
        bench.scheduler.reserve(bench.request("a", 8))
    bench.cache.pool.release_quarantine("a")
    assert bench.scheduler.reserve(bench.request("a", 8))


def test_a_landed_request_decodes_in_the_next_step() -> None:
    bench = Bench()
    request = bench.request("a", 10, max_tokens=3)
    bench.scheduler.reserve(request)
    request.output_token_ids.append(7)
    assert bench.schedule() == ()
    bench.scheduler.land("a")
    assert bench.scheduler.has_work
    assert bench.steps(2) == [{"a": 1}, {"a": 1}]
    assert request.num_local_prompt_tokens == 0


def test_a_handoff_that_failed_is_computed_here_from_its_first_token() -> None:
    bench = Bench()
    request = bench.request("a", 10, max_tokens=3)
    bench.scheduler.reserve(request)
    request.output_token_ids.append(7)
    bench.scheduler.fall_back("a")
    assert bench.cache.pool.num_quarantined == 3
    assert bench.steps(2) == [{"a": 11}, {"a": 1}]
    assert (request.num_local_prompt_tokens, request.num_recomputed_tokens) == (10, 10)
    assert bench.cache.pool.num_quarantined == 3
    assert bench.cache.pool.release_quarantine("a") == 3


def test_a_fall_back_is_not_refused_by_a_full_queue() -> None:
    bench = Bench(max_waiting=1)
    bench.scheduler.reserve(bench.request("a", 8))
    bench.add("b", 8)
    bench.scheduler.fall_back("a")
    bench.scheduler.check()
    assert bench.scheduler.num_waiting == 2


@pytest.mark.parametrize("call", ["land", "fall_back"])
def test_a_handoff_that_is_over_cannot_end_again(call: str) -> None:
    bench = Bench()
    request = bench.request("a", 8)
    bench.scheduler.reserve(request)
    bench.scheduler.finish(request)
    with pytest.raises(RequestStateError, match="no reservation"):
        getattr(bench.scheduler, call)("a")


@pytest.mark.parametrize("state", list(RequestStatus))
def test_finishing_in_any_state_leaves_no_used_block_but_held_ones(state: RequestStatus) -> None:
    bench = Bench()
    request = bench.request("a", 10, is_prefill_only=state is RequestStatus.HELD)
    if state is RequestStatus.RESERVED:
        bench.scheduler.reserve(request)
    else:
        bench.scheduler.add(request)
        if state is not RequestStatus.WAITING:
            bench.step()
        if state is RequestStatus.FINISHED:
            bench.scheduler.finish(request)
    assert request.status is state
    bench.scheduler.finish(request)
    bench.scheduler.check()
    is_held = state is RequestStatus.HELD
    assert bench.cache.pool.num_used == (3 if is_held else 0)
    assert bench.cache.pool.num_quarantined == (3 if state is RequestStatus.RESERVED else 0)
    bench.scheduler.release("a")
    bench.scheduler.release("a")
    assert bench.cache.pool.num_used == 0
    assert bench.scheduler.get("a") is None


def test_a_request_that_is_being_served_cannot_be_released() -> None:
    bench = Bench(max_prefill_chunk=4)
    bench.add("a", 10, is_prefill_only=True)
    bench.step()
    with pytest.raises(RequestStateError, match="RUNNING"):
        bench.scheduler.release("a")


def test_a_queue_that_waits_for_a_call_from_outside_is_no_work() -> None:
    bench = Bench(num_blocks=4)
    bench.add("sender", 16, is_prefill_only=True)
    bench.step()
    bench.add("a", 16, max_tokens=1)
    assert bench.scheduler.has_work
    assert bench.schedule() == ()
    assert not bench.scheduler.has_work
    bench.scheduler.release("sender")
    assert bench.scheduler.has_work
    assert bench.step() == {"a": 16}


def test_a_new_head_of_the_queue_is_work_again() -> None:
    bench = Bench(num_blocks=4)
    bench.add("sender", 8, is_prefill_only=True)
    bench.step()
    bench.add("big", 16)
    assert bench.schedule() == ()
    bench.add("small", 4, priority=-1, max_tokens=1)
    assert bench.scheduler.has_work
    assert bench.step() == {"small": 4}


def test_a_seat_that_a_reservation_leaves_is_work_again() -> None:
    bench = Bench(max_num_seqs=1)
    bench.scheduler.reserve(bench.request("reserved", 8))
    bench.add("a", 4, max_tokens=1)
    assert bench.schedule() == ()
    assert not bench.scheduler.has_work
    bench.scheduler.finish(bench.scheduler.reserved("reserved"))  # its blocks are in quarantine still
    assert bench.scheduler.has_work
    assert bench.step() == {"a": 4}


def test_computing_out_of_order_is_an_integrity_error() -> None:
    bench = Bench(max_prefill_chunk=4)
    bench.add("a", 10)
    chunks = bench.schedule()
    bench.scheduler.update(chunks)
    with pytest.raises(IntegrityError, match="not the next"):
        bench.scheduler.update(chunks)


def test_pending_tokens_count_queue_and_running() -> None:
    bench = Bench(max_num_seqs=1, max_prefill_chunk=4)
    bench.add("a", 10)
    bench.add("b", 5)
    assert bench.scheduler.num_pending_tokens == 15
    bench.step()
    assert bench.scheduler.num_pending_tokens == 11


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 0},
        {"max_num_batched_tokens": 8, "max_num_seqs": 9},
        {"max_num_seqs": 0},
        {"max_prefill_chunk": 0},
        {"max_model_len": 1},
        {"max_waiting": 0},
        {"local_output_reserve": -1},
    ],
)
def test_limits_that_make_no_sense_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        SchedulerConfig(**changes)


def test_check_notices_a_request_in_two_places() -> None:
    bench = Bench()
    request = bench.add("a", 4)
    bench.scheduler._running.append(request)
    with pytest.raises(IntegrityError):
        bench.scheduler.check()
