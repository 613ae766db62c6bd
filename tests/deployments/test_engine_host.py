"""The host of an engine: one thread, commands between steps, streams in order, and nobody left waiting."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import pytest

from deployments import engine_host
from deployments.engine_host import EngineHost, EngineStopped, OutputStream
from engine.cache_events import CacheEvent
from engine.engine import Engine, RequestOutput
from engine.errors import IntegrityError, QueueFullError
from engine.request import FinishReason, Request, RequestStatus, SamplingParams
from engine.zone import Zone
from tests.deployments.support import reaches, run

WAIT_S = 5.0


class FakeEngine:
    """One token a step for each request until `max_tokens`. Notes who calls it and when."""

    def __init__(self) -> None:
        self.live: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.num_steps = 0
        self.num_expiries = 0
        self.num_closes = 0
        self.is_stepping = False
        self.threads: set[str] = set()
        self.cache_events: list[CacheEvent] = []
        self.step_error: BaseException | None = None
        self.may_step = threading.Event()
        self.may_step.set()
        self.in_step = threading.Event()

    def _note(self) -> None:
        assert not self.is_stepping, "called in the middle of a step"
        self.threads.add(threading.current_thread().name)

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def add_request(self, request: Request) -> None:
        self._note()
        if request.request_id == "one too many":
            raise QueueFullError("too many are waiting")
        self.live[request.request_id] = request

    def abort(self, request_id: str) -> None:
        self._note()
        self.live.pop(request_id, None)
        self.aborted.append(request_id)

    def expire(self) -> int:
        self._note()
        self.num_expiries += 1
        return 0

    def take_cache_events(self) -> list[CacheEvent]:
        self._note()
        taken, self.cache_events = self.cache_events, []
        return taken

    def close(self) -> None:
        self.num_closes += 1

    def check(self) -> None:
        self._note()
        raise IntegrityError("two owners of one block")

    def step(self) -> list[RequestOutput]:
        self._note()
        self.is_stepping = True
        self.in_step.set()
        assert self.may_step.wait(WAIT_S), "the test forgot a step"
        self.is_stepping = False
        self.num_steps += 1
        if self.step_error is not None:
            raise self.step_error
        return [self._advance(request) for request in list(self.live.values())]

    def _advance(self, request: Request) -> RequestOutput:
        if request.status is RequestStatus.WAITING:
            request.transition(RequestStatus.RUNNING)
        request.output_token_ids.append(len(request.output_token_ids))
        is_last = len(request.output_token_ids) == request.sampling.max_tokens
        if is_last:
            del self.live[request.request_id]
        return RequestOutput(
            request.request_id,
            token_ids=(request.output_token_ids[-1],),
            finish_reason=FinishReason.LENGTH if is_last else None,
        )


class Observer:
    def __init__(self) -> None:
        self.steps: list[float] = []
        self.queued: list[tuple[str, float]] = []
        self.cache_events: list[CacheEvent] = []

    def cache_changed(self, events: list[CacheEvent]) -> None:
        self.cache_events.extend(events)

    def step_took(self, seconds: float) -> None:
        self.steps.append(seconds)

    def request_queued_for(self, request_id: str, seconds: float) -> None:
        self.queued.append((request_id, seconds))


class Hosted:
    """A host over a fake engine."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.observer = Observer()
        self.host = EngineHost(cast(Engine, self.engine), self.observer)


@contextmanager
def hosted() -> Iterator[Hosted]:
    """Stop the host at the end, whatever happened; its thread must be gone then."""
    pair = Hosted()
    try:
        yield pair
    finally:
        pair.engine.may_step.set()
        pair.host.stop()
    assert not pair.host._thread.is_alive()


def request(request_id: str, max_tokens: int = 3) -> Request:
    return Request(request_id, (1, 2), SamplingParams(max_tokens=max_tokens))


async def started(pair: Hosted, request_id: str, max_tokens: int = 3) -> OutputStream:
    stream = pair.host.open(request(request_id, max_tokens))
    await pair.host.add(stream.request)
    return stream


async def tokens(stream: OutputStream) -> list[int]:
    return [token_id async for output in stream for token_id in output.token_ids]


async def in_a_step(pair: Hosted) -> OutputStream:
    """A running request whose first step does not end before `may_step` is set."""
    pair.engine.may_step.clear()
    stream = await started(pair, "busy")
    await reaches(pair.engine.in_step.is_set)
    return stream


def test_the_fake_has_the_engines_own_interface() -> None:
    for name, member in vars(FakeEngine).items():
        if name.startswith("_"):
            continue
        real = inspect.getattr_static(Engine, name)
        assert type(real) is type(member), name
        if inspect.isfunction(real):
            assert list(inspect.signature(real).parameters) == list(inspect.signature(member).parameters), name


def test_outputs_reach_their_own_stream_in_order_and_end_with_the_reason() -> None:
    async def body() -> None:
        with hosted() as pair:
            streams = [await started(pair, f"r-{index}", max_tokens=index + 1) for index in range(5)]
            found = await asyncio.gather(*(tokens(stream) for stream in streams))
            assert found == [list(range(index + 1)) for index in range(5)]
            assert pair.host.is_alive

    run(body)


def test_only_the_hosts_thread_touches_the_engine() -> None:
    async def body() -> None:
        with hosted() as pair:
            stream = await started(pair, "r")
            await pair.host.call(lambda engine: engine.abort("other"))
            await tokens(stream)
            pair.host.close("r")
            await reaches(lambda: "r" in pair.engine.aborted)
            assert pair.engine.threads == {"engine"}

    run(body)


def test_call_runs_between_two_steps_and_returns_the_result() -> None:
    async def body() -> None:
        with hosted() as pair:
            stream = await in_a_step(pair)
            calls = [
                asyncio.create_task(pair.host.call(lambda engine: cast(FakeEngine, engine).num_steps)) for _ in range(3)
            ]
            await asyncio.sleep(0.02)
            assert not any(call.done() for call in calls)
            pair.engine.may_step.set()
            assert await asyncio.gather(*calls) == [1, 1, 1]
            assert await tokens(stream) == [0, 1, 2]

    run(body)


def test_what_a_command_does_to_the_cache_is_reported_once_with_or_without_a_step() -> None:
    event = CacheEvent("evict", Zone.parse("tenant/acme/case/1"), 3, "purge")

    async def body() -> None:
        with hosted() as pair:
            await pair.host.call(lambda engine: cast(FakeEngine, engine).cache_events.append(event))
            await pair.host.call(lambda engine: None)  # a turn later
            assert pair.observer.cache_events == [event]

    run(body)


def test_what_a_command_raises_reaches_its_caller_and_nobody_else() -> None:
    async def body() -> None:
        with hosted() as pair:
            other = await started(pair, "other", max_tokens=50)
            pair.host.open(request("one too many"))
            with pytest.raises(QueueFullError, match="too many are waiting"):
                await pair.host.add(request("one too many"))
            with pytest.raises(ZeroDivisionError):
                await pair.host.call(lambda engine: 1 // 0)
            assert len(await tokens(other)) == 50
            assert pair.host.is_alive

    run(body)


def test_posted_command_that_raises_is_logged_and_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        with hosted() as pair:
            pair.host.post(lambda engine: 1 // 0)
            assert await pair.host.call(lambda engine: 5) == 5
            assert "engine command failed" in caplog.text

    run(body)


def test_close_aborts_and_later_outputs_are_dropped() -> None:
    async def body() -> None:
        with hosted() as pair:
            stream = await started(pair, "r", max_tokens=1_000_000)
            reader = asyncio.create_task(tokens(stream))
            await reaches(lambda: pair.engine.num_steps > 3)
            pair.host.close("r")
            pair.host.close("r")
            await pair.host.call(lambda engine: None)
            assert set(pair.engine.aborted) == {"r"}
            assert not pair.engine.has_work
            assert pair.host._streams == {}
            assert pair.host._queued_since == {}
            pair.host.publish(RequestOutput("r", token_ids=(9,)))
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    run(body)


def test_close_right_after_a_cancelled_add_leaves_nothing_in_the_engine() -> None:
    async def body() -> None:
        with hosted() as pair:
            await in_a_step(pair)
            pair.host.open(request("r"))
            adding = asyncio.create_task(pair.host.add(request("r")))
            await asyncio.sleep(0.01)
            adding.cancel()
            await asyncio.gather(adding, return_exceptions=True)
            pair.host.close("r")
            looking = asyncio.create_task(pair.host.call(lambda engine: set(pair.host._queued_since)))
            await asyncio.sleep(0)
            pair.engine.may_step.set()
            assert await looking == set()
            assert "r" not in pair.engine.live
            assert "r" in pair.engine.aborted

    run(body)


def test_output_made_by_a_command_reaches_the_stream() -> None:
    async def body() -> None:
        with hosted() as pair:
            stream = pair.host.open(request("r"))
            pair.host.publish(RequestOutput("r", token_ids=(7,), finish_reason=FinishReason.STOP))
            assert await tokens(stream) == [7]

    run(body)


def test_queue_time_runs_from_add_to_the_first_step_that_computes() -> None:
    async def body() -> None:
        with hosted() as pair:
            stream = await started(pair, "r")
            await tokens(stream)
            assert [request_id for request_id, _ in pair.observer.queued] == ["r"]
            assert stream.queue_s is not None
            assert 0 <= stream.queue_s < WAIT_S
            assert len(pair.observer.steps) == 3
            assert pair.host._queued_since == {}

    run(body)


@pytest.mark.parametrize("error", [RuntimeError("the runner broke"), IntegrityError("two owners")])
def test_step_that_raises_ends_every_stream_and_the_host(error: Exception) -> None:
    async def body() -> None:
        with hosted() as pair:
            streams = [await started(pair, f"r-{index}", max_tokens=1_000_000) for index in range(3)]
            readers = [asyncio.create_task(tokens(stream)) for stream in streams]
            pair.engine.step_error = error
            results = await asyncio.gather(*readers, return_exceptions=True)
            assert [type(result) for result in results] == [EngineStopped] * 3
            assert not pair.host.is_alive
            assert pair.host.fault is error

    run(body)


def test_after_a_fault_calls_are_refused_and_clean_up_is_harmless() -> None:
    async def body() -> None:
        with hosted() as pair:
            pair.engine.step_error = RuntimeError("the runner broke")
            stream = await started(pair, "r")
            with pytest.raises(EngineStopped, match="the runner broke"):
                await tokens(stream)
            with pytest.raises(EngineStopped):
                await pair.host.call(lambda engine: 1)
            with pytest.raises(EngineStopped):
                await pair.host.add(request("late"))
            pair.host.post(lambda engine: engine.abort("late"))
            pair.host.close("r")
            assert pair.engine.aborted == []

    run(body)


def test_command_queued_behind_the_fatal_step_is_refused_and_never_touches_the_broken_engine() -> None:
    async def body() -> None:
        with hosted() as pair:
            await in_a_step(pair)
            pair.host.open(request("late"))
            late = asyncio.create_task(pair.host.add(request("late")))
            pair.host.post(lambda engine: engine.abort("late"))
            await asyncio.sleep(0.01)
            pair.engine.step_error = IntegrityError("two owners")
            pair.engine.may_step.set()
            with pytest.raises(EngineStopped):
                await late
            assert "late" not in pair.engine.live
            assert pair.engine.aborted == []

    run(body)


def test_broken_invariant_found_by_a_command_ends_the_host() -> None:
    async def body() -> None:
        with hosted() as pair:
            stream = await started(pair, "r", max_tokens=1_000_000)
            reader = asyncio.create_task(tokens(stream))
            check = asyncio.create_task(pair.host.call(lambda engine: engine.check()))
            with pytest.raises(IntegrityError):
                await check
            with pytest.raises(EngineStopped, match="two owners"):
                await reader
            assert not pair.host.is_alive

    run(body)


def test_broken_invariant_found_while_cleaning_up_ends_the_host() -> None:
    async def body() -> None:
        with hosted() as pair:
            pair.host.post(lambda engine: engine.check())
            await reaches(lambda: not pair.host.is_alive)
            assert isinstance(pair.host.fault, IntegrityError)

    run(body)


def test_stop_ends_streams_calls_and_thread() -> None:
    async def body() -> None:
        with hosted() as pair:
            stream = await started(pair, "r", max_tokens=1_000_000)
            reader = asyncio.create_task(tokens(stream))
            await asyncio.sleep(0)
            pair.host.stop()
            with pytest.raises(EngineStopped, match="shutting down"):
                await reader
            with pytest.raises(EngineStopped):
                await pair.host.call(lambda engine: 1)
            assert not pair.host.is_alive
            pair.host.stop()
            assert pair.engine.num_closes == 1

    run(body)


@pytest.mark.parametrize("ends_by", ["fault", "stop"])
def test_callers_racing_with_the_end_all_get_an_answer(ends_by: str) -> None:
    async def body() -> None:
        for _ in range(5):
            with hosted() as pair:
                await started(pair, "r", max_tokens=1_000_000)
                calls = [asyncio.create_task(pair.host.call(lambda engine: 1)) for _ in range(20)]
                await asyncio.sleep(0)
                if ends_by == "fault":
                    pair.engine.step_error = RuntimeError("broke")
                else:
                    pair.host.stop()
                while pair.host.fault is None or len(calls) < 60:
                    calls.append(asyncio.create_task(pair.host.call(lambda engine: 1)))
                    await asyncio.sleep(0)
                for result in await asyncio.gather(*calls, return_exceptions=True):
                    assert result == 1 or isinstance(result, EngineStopped)

    run(body)


def test_call_that_passed_its_check_just_before_a_fault_is_answered_too() -> None:
    async def body() -> None:
        with hosted() as pair:
            await in_a_step(pair)
            commands, put = pair.host._commands, pair.host._commands.put

            class AsTheFaultComes:
                """The engine's thread faults, and ends if it can, before the command is in the queue."""

                get, get_nowait = commands.get, commands.get_nowait

                @staticmethod
                def put(command: Callable[[], None]) -> None:
                    pair.engine.step_error = RuntimeError("broke")
                    pair.engine.may_step.set()
                    pair.host._thread.join(0.1)
                    put(command)

            pair.host._commands = AsTheFaultComes  # type: ignore[assignment]
            with pytest.raises(EngineStopped):
                async with asyncio.timeout(WAIT_S):
                    await pair.host.call(lambda engine: 1)
            pair.host._commands = commands

    run(body)


def test_idle_host_lets_the_engine_expire_and_uses_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_host, "IDLE_WAIT_S", 0.005)

    async def body() -> None:
        with hosted() as pair:
            await reaches(lambda: pair.engine.num_expiries > 3)
            assert pair.engine.num_steps == 0

    run(body)


def test_busy_host_lets_the_engine_expire_too() -> None:
    async def body() -> None:
        with hosted() as pair:
            await started(pair, "r", max_tokens=10_000_000)
            await reaches(lambda: pair.engine.num_steps > 500)
            assert pair.engine.num_expiries >= 3

    run(body)


def test_flood_of_commands_does_not_keep_the_engine_from_stepping() -> None:
    async def body() -> None:
        with hosted() as pair:
            stream = await in_a_step(pair)
            for _ in range(1000):
                pair.host.post(lambda engine: None)
            last = asyncio.create_task(pair.host.call(lambda engine: cast(FakeEngine, engine).num_steps))
            await asyncio.sleep(0)
            pair.engine.may_step.set()
            assert await last == 3
            assert await tokens(stream) == [0, 1, 2]

    run(body)


def test_reader_whose_loop_is_gone_does_not_take_the_engine_down() -> None:
    pairs = []

    async def leave_a_stream_open() -> None:
        pair = Hosted()
        pairs.append(pair)
        pair.engine.may_step.clear()
        await started(pair, "orphan", max_tokens=1_000_000)

    asyncio.run(leave_a_stream_open())
    pair = pairs[0]

    async def body() -> None:
        pair.engine.may_step.set()
        stream = await started(pair, "r")
        assert await tokens(stream) == [0, 1, 2]
        assert pair.host.is_alive

    try:
        run(body)
    finally:
        pair.host.stop()
