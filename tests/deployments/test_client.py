"""The way to a decode replica: one retry while nothing was seen, deadlines, and nothing left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from deployments import client as client_module
from deployments.client import MAX_DECODE_ATTEMPTS, DecodeClient
from deployments.errors import (
    AuditUnavailable,
    BadRequest,
    DeadlineExceeded,
    InternalFault,
    NoCapacity,
    ReplicaLost,
    ServeError,
)
from deployments.messages import GenerateCall, RouteHint, TokenEvent
from deployments.metrics import PREFIX, IngressMetrics
from tests.deployments.support import (
    Clock,
    Handle,
    Hold,
    Response,
    Script,
    Selection,
    last,
    lines_of,
    local_config,
    make_call,
    run,
    settle,
    token,
)


def rpc_error(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="member 4711")


GONE: list[Callable[[], BaseException]] = [
    ActorDiedError,
    lambda: ActorUnavailableError("away", None),
    lambda: ReplicaUnavailableError("gone"),
    lambda: RayTaskError("generate", "traceback", ActorDiedError()).as_instanceof_cause(),
    asyncio.CancelledError,  # as Serve reports a call that the replica itself cancelled
    *(
        partial(rpc_error, code)
        for code in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.UNKNOWN,
        )
    ),
]


class Client:
    """A client over a scripted handle."""

    def __init__(
        self,
        *scripts: Script,
        clock: Clock | None = None,
        kind: type[Handle] = Handle,
        dead: frozenset[str] = frozenset(),
        **handle: Any,
    ) -> None:
        self.handle = kind(list(scripts), **handle)
        self.metrics = IngressMetrics()
        routing = local_config(routing={"choose_timeout_s": 0.05}).routing

        async def is_dead(actor: str) -> bool:
            return actor in dead

        self.client = DecodeClient(self.handle, routing, self.metrics, clock or time.monotonic, is_dead)

    async def events(self, timeout_s: float = 5.0) -> list[TokenEvent]:
        return [event async for event in self.client.generate(make_call(timeout_s=timeout_s))]

    async def fails(self, kind: type[ServeError], timeout_s: float = 5.0) -> tuple[list[TokenEvent], ServeError]:
        seen: list[TokenEvent] = []

        async def read() -> None:
            async for event in self.client.generate(make_call(timeout_s=timeout_s)):
                seen.append(event)  # noqa: PERF401

        with pytest.raises(kind) as error:
            await read()
        assert type(error.value) is kind
        self.handle.check_left_clean()
        return seen, error.value

    @property
    def num_retries(self) -> float:
        return self.metrics.registry.get_sample_value(PREFIX + "decode_retries_total") or 0.0


def test_events_come_in_order_and_the_context_is_left() -> None:
    async def body() -> None:
        script: Script = [token(1), token(2), last(3)]
        client = Client(script)
        assert await client.events() == script
        client.handle.check_left_clean()
        assert not client.handle.responses[0].is_cancelled
        assert client.num_retries == 0

    run(body)


def test_router_sees_sizes_and_a_digest_and_no_content() -> None:
    async def body() -> None:
        client = Client([last(1)])
        await client.events()
        assert client.handle.hints == [RouteHint("r-1", num_prompt_tokens=3, max_tokens=4, affinity=b"affinity")]
        assert client.handle.calls == [make_call()]

    run(body)


@pytest.mark.parametrize("gone", GONE)
def test_replica_lost_before_the_first_event_is_retried_once(gone: Callable[[], BaseException]) -> None:
    async def body() -> None:
        client = Client([gone()], [token(1), last(2)])
        assert await client.events() == [token(1), last(2)]
        assert client.num_retries == 1
        assert [response.is_cancelled for response in client.handle.responses] == [True, False]
        client.handle.check_left_clean()

    run(body)


@pytest.mark.parametrize("gone", GONE)
def test_replica_lost_after_the_first_event_is_an_error(gone: Callable[[], BaseException]) -> None:
    async def body() -> None:
        client = Client([token(1), gone()], [token(1), last(2)])
        seen, error = await client.fails(ReplicaLost)
        assert seen == [token(1)]
        assert error.retry_after_s is not None
        assert len(client.handle.responses) == 1
        assert client.num_retries == 0

    run(body)


@pytest.mark.parametrize("gone", GONE)
def test_second_loss_is_an_error(gone: Callable[[], BaseException]) -> None:
    async def body() -> None:
        client = Client([gone()], [gone()], [last(1)])
        seen, _ = await client.fails(ReplicaLost)
        assert seen == []
        assert len(client.handle.responses) == MAX_DECODE_ATTEMPTS == 2
        assert client.num_retries == 1

    run(body)


def test_replica_that_is_gone_when_dispatched_to_is_retried() -> None:
    async def body() -> None:
        client = Client(dispatch_error=ReplicaUnavailableError("gone"))
        await client.fails(ReplicaLost)
        assert len(client.handle.contexts) == 2

    run(body)


def test_no_replica_in_time_is_no_capacity() -> None:
    async def body() -> None:
        client = Client(choose_hangs=True)
        _, error = await client.fails(NoCapacity)
        assert error.retry_after_s is not None
        assert client.handle.responses == []

    run(body)


def test_deadline_while_choosing_is_a_deadline() -> None:
    async def body() -> None:
        await Client(choose_hangs=True).fails(DeadlineExceeded, timeout_s=0.01)

    run(body)


def test_no_time_left_for_the_retry_is_a_deadline() -> None:
    clock = Clock()

    class Late(Handle):
        """The first attempt takes the whole time, and fails; the second would wait for ever."""

        def dispatch(self, selection: Selection, call: GenerateCall) -> Response:
            clock.now += 100.0
            self.choose_hangs = True
            return super().dispatch(selection, call)

    async def body() -> None:
        client = Client([ActorDiedError()], clock=clock, kind=Late)
        await client.fails(DeadlineExceeded)
        assert len(client.handle.responses) == 1

    run(body)


@pytest.mark.parametrize("script", [[Hold()], [token(1), Hold()]])
def test_deadline_in_the_stream_cancels_the_call(script: Script) -> None:
    async def body() -> None:
        client = Client(script, [last(1)])
        seen, _ = await client.fails(DeadlineExceeded, timeout_s=0.03)
        assert len(seen) == len(script) - 1
        assert client.handle.responses[0].is_cancelled
        assert len(client.handle.responses) == 1

    run(body)


def test_silent_replica_that_ray_says_is_dead_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENCE_S", 0.001)

    async def body() -> None:
        client = Client([Hold()], [token(1), last(2)], dead=frozenset({"actor of replica-0"}))
        assert await client.events() == [token(1), last(2)]
        assert client.num_retries == 1
        client.handle.check_left_clean()
        client = Client([token(1), Hold()], dead=frozenset({"actor of replica-0"}))
        seen, _ = await client.fails(ReplicaLost)
        assert seen == [token(1)]

    run(body)


def test_silent_replica_that_lives_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENCE_S", 0.001)

    async def body() -> None:
        await Client([Hold()], dead=frozenset({"actor of replica-1"})).fails(DeadlineExceeded, timeout_s=0.05)

    run(body)


@pytest.mark.parametrize(
    "error",
    [
        lambda: BackPressureError(num_queued_requests=1, max_queued_requests=1),
        lambda: DeploymentUnavailableError(DeploymentID("decode")),
    ],
)
def test_pool_that_takes_no_more_is_no_capacity(error: Callable[[], BaseException]) -> None:
    async def body() -> None:
        await Client(choose_error=error()).fails(NoCapacity)
        await Client([error()]).fails(NoCapacity)

    run(body)


@pytest.mark.parametrize(
    "cause",
    [
        ValueError("member 4711"),
        TimeoutError("member 4711"),
        RayTaskError("generate", "traceback", ValueError("member 4711")).as_instanceof_cause(),
        rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED),  # a message too large for any replica
        rpc_error(grpc.StatusCode.UNAUTHENTICATED),
    ],
)
def test_what_the_replica_raises_is_an_internal_fault_without_its_text(cause: Exception) -> None:
    async def body() -> None:
        for script in ([cause], [token(1), cause]):
            client = Client(list(script), [last(1)])
            with lines_of("ray.serve.zoneserve.client") as lines:
                _, error = await client.fails(InternalFault)
            assert "4711" not in error.message
            assert lines
            assert not any("4711" in line for line in lines)
            assert client.num_retries == 0

    run(body)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("invalid_request: the schema does not compile", BadRequest, "the schema does not compile"),
        ("no_capacity: no KV blocks", NoCapacity, "no KV blocks"),
        ("no_capacity: prefill: and decode", NoCapacity, "prefill: and decode"),
        ("deadline_exceeded: too slow", DeadlineExceeded, "too slow"),
        ("audit_unavailable: it cannot be written", AuditUnavailable, "it cannot be written"),
        ("internal_error: KeyError", InternalFault, "KeyError"),
    ],
)
def test_error_event_becomes_the_error_it_names(text: str, kind: type[ServeError], message: str) -> None:
    async def body() -> None:
        for before in ([], [token(1)]):
            client = Client([*before, TokenEvent(error=text)], [last(1)])
            seen, error = await client.fails(kind)
            assert seen == before
            assert error.message == message
            assert (error.retry_after_s is not None) == (kind is NoCapacity)

    run(body)


def test_a_replica_whose_engine_has_stopped_is_left_for_another_before_the_first_token() -> None:
    async def body() -> None:
        stopped = TokenEvent(error="replica_lost: the decode replica has stopped")
        client = Client([stopped], [token(1), last(2)])
        assert await client.events() == [token(1), last(2)]
        assert client.num_retries == 1
        for script in ([[token(1), stopped], [last(2)]], [[stopped], [stopped]]):
            _, error = await Client(*script).fails(ReplicaLost)
            assert error.message == "the decode replica has stopped"

    run(body)


def test_error_event_of_no_known_kind_is_an_internal_fault_without_its_text() -> None:
    async def body() -> None:
        _, error = await Client([TokenEvent(error="ValueError: member 4711")]).fails(InternalFault)
        assert "4711" not in error.message

    run(body)


@pytest.mark.parametrize("num_read", [0, 1])
def test_cancelled_reader_cancels_the_call_and_leaves_the_context(num_read: int) -> None:
    async def body() -> None:
        client = Client([*[token(1)] * num_read, Hold()])
        task = asyncio.create_task(client.events())
        await settle()
        assert client.handle.responses
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.handle.responses[0].is_cancelled
        client.handle.check_left_clean()
        assert client.num_retries == 0

    run(body)


def test_reader_that_stops_between_events_has_cleaned_up_when_it_is_told_so() -> None:
    async def body() -> None:
        client = Client([token(1), token(2), last(3)])
        events = client.client.generate(make_call())
        await anext(events)
        await events.aclose()
        assert client.handle.responses[0].is_cancelled
        client.handle.check_left_clean()

    run(body)


def test_cancelled_while_choosing_nothing_is_dispatched() -> None:
    async def body() -> None:
        client = Client(choose_hangs=True)
        task = asyncio.create_task(client.events())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.handle.calls == []
        client.handle.check_left_clean()

    run(body)


def test_call_that_is_given_up_while_it_is_being_sent_is_cancelled() -> None:
    """Serve's `cancel` forgets a call whose sending it has not seen through."""

    async def body() -> None:
        client = Client([token(1), Hold()])
        task = asyncio.create_task(client.events())
        while not client.handle.responses:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not client.handle.responses[0].is_sent
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.handle.responses[0].is_cancelled
        client.handle.check_left_clean()

    run(body)


def test_leaving_the_context_is_not_cut_short_by_a_cancellation() -> None:
    async def body() -> None:
        client = Client([token(1), Hold()])
        task = asyncio.create_task(client.events())
        await settle()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await settle()
        client.handle.check_left_clean()

    run(body)
