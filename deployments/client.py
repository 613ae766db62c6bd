"""The ingress's way to a decode replica: choose, dispatch, stream, and one bounded retry.

A request goes to another replica only while the client has seen nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)

from deployments.calls import dispatch, is_cut, is_dead, over_grpc
from deployments.config import RoutingSection
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
from deployments.metrics import IngressMetrics

logger = logging.getLogger("ray.serve.zoneserve.client")

MAX_DECODE_ATTEMPTS = 2
REPLACEMENT_RETRY_AFTER_S = 5.0
SILENCE_S = 10.0  # after which Ray is asked whether the replica lives


class StreamCut(Exception):
    """The replica gave a request up by itself, as it does when it is shut down, or the way to it is gone."""


REPLICA_GONE = (ActorDiedError, ActorUnavailableError, RayActorError, ReplicaUnavailableError, StreamCut)


class DecodeClient:
    """Generates through whichever decode replica the router picks."""

    def __init__(
        self,
        decode: Any,
        routing: RoutingSection,
        metrics: IngressMetrics,
        clock: Callable[[], float] = time.monotonic,
        is_dead: Callable[[str], Awaitable[bool]] = is_dead,
    ) -> None:
        self._generate = over_grpc(decode).generate
        self._routing = routing
        self._metrics = metrics
        self._clock = clock
        self._is_dead = is_dead

    async def generate(self, call: GenerateCall) -> AsyncGenerator[TokenEvent, None]:
        """Events of one sequence; the last carries a finish reason.

        Raises:
            BadRequest, NoCapacity, ReplicaLost, DeadlineExceeded, InternalFault: Before the first event or
                after it.
        """
        hint = RouteHint(call.request_id, len(call.prompt_token_ids), call.sampling.max_tokens, call.affinity)
        deadline = self._clock() + call.timeout_s
        for attempt in range(1, MAX_DECODE_ATTEMPTS + 1):
            has_emitted = False
            try:
                async with aclosing(self._attempt(call, hint, deadline)) as events:
                    async for event in events:
                        if event.error is not None:
                            error = _error_of(event.error)
                            if isinstance(error, ReplicaLost) and not has_emitted and attempt < MAX_DECODE_ATTEMPTS:
                                raise StreamCut from error  # its engine has stopped: another one may do it
                            raise error
                        has_emitted = True
                        yield event
                return
            except REPLICA_GONE as error:
                logger.warning("%s: decode replica lost: %s", call.request_id, type(error).__name__)
                if has_emitted or attempt == MAX_DECODE_ATTEMPTS:
                    raise ReplicaLost("the decode replica was lost", retry_after_s=REPLACEMENT_RETRY_AFTER_S) from error
                self._metrics.decode_retries.inc()
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise NoCapacity("the decode pool is not available", retry_after_s=1.0) from error
            except ServeError:
                raise
            except Exception as error:  # the replica's own, which gRPC hands on as it was raised
                logger.error("%s: decode failed: %s", call.request_id, type(error).__name__)
                raise InternalFault("generation failed") from error

    async def _attempt(self, call: GenerateCall, hint: RouteHint, deadline: float) -> AsyncGenerator[TokenEvent, None]:
        context = self._generate.choose_replica(hint)
        try:
            async with asyncio.timeout(min(self._routing.choose_timeout_s, deadline - self._clock())):
                selection = await context.__aenter__()
        except TimeoutError as error:
            if self._clock() >= deadline:
                raise DeadlineExceeded("the request did not start within its time limit") from error
            raise NoCapacity("no decode replica became available", retry_after_s=REPLACEMENT_RETRY_AFTER_S) from error
        try:
            response = await dispatch(self._generate, selection, call)
            num_events = 0
            is_complete = False
            watch = asyncio.create_task(
                self._end_when_dead(response, selection.replica_metadata["actor"], lambda: num_events)
            )
            try:
                while True:
                    event = await _next_before(response, deadline - self._clock())
                    if event is None:
                        break
                    num_events += 1
                    yield event
                is_complete = True
            finally:
                watch.cancel()
                if not is_complete:
                    response.cancel()
        finally:
            await asyncio.shield(context.__aexit__(None, None, None))

    async def _end_when_dead(self, response: Any, actor: str, num_events: Callable[[], int]) -> None:
        """A machine that vanishes resets no connection: gRPC alone would wait for it to the deadline."""
        num_seen = -1
        while num_seen != num_events() or not await self._is_dead(actor):
            num_seen = num_events()
            await asyncio.sleep(SILENCE_S)
        response.cancel()


async def _next_before(response: Any, remaining_s: float) -> TokenEvent | None:
    try:
        async with asyncio.timeout(remaining_s) as limit:
            event: TokenEvent = await anext(response)
            return event
    except StopAsyncIteration:
        return None
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise StreamCut from error  # so Ray reports a call that its replica cancelled
    except TimeoutError as error:
        if not limit.expired():  # the replica's own
            raise
        raise DeadlineExceeded("the request did not end within its time limit") from error
    except Exception as error:
        if is_cut(error) or isinstance(error, RequestCancelledError):  # the latter by _end_when_dead
            raise StreamCut from error
        raise


def _error_of(error: str) -> ServeError:
    code, _, message = error.partition(": ")
    known = (AuditUnavailable, BadRequest, NoCapacity, ReplicaLost, DeadlineExceeded, InternalFault)
    kinds: dict[str, type[ServeError]] = {kind.code: kind for kind in known}
    if code not in kinds:
        return InternalFault("generation failed")
    return kinds[code](message, retry_after_s=1.0 if code == NoCapacity.code else None)
