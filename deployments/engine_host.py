"""Runs one engine on its own thread and lets asyncio code talk to it.

The engine stays synchronous and single-threaded: callers hand functions to the thread, which runs
them between two steps, and read a request's outputs from its stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeVar

from engine.cache_events import CacheEvent
from engine.engine import Engine, RequestOutput
from engine.errors import IntegrityError
from engine.request import Request, RequestStatus

T = TypeVar("T")
logger = logging.getLogger("ray.serve.zoneserve.engine_host")

IDLE_WAIT_S = 0.25
MAX_COMMANDS_BETWEEN_STEPS = 64
STEPS_BETWEEN_EXPIRY = 64
JOIN_TIMEOUT_S = 10.0


class EngineStopped(Exception):
    """The engine's thread has ended: after a fault that it must not survive, or at shutdown."""


class HostObserver(Protocol):
    """What the host reports of its work; all calls come from the engine's thread."""

    def step_took(self, seconds: float) -> None: ...
    def request_queued_for(self, request_id: str, seconds: float) -> None: ...
    def cache_changed(self, events: list[CacheEvent]) -> None: ...


class OutputStream:
    """Outputs of one request, in order, ending with the one that carries a finish reason."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.queue_s: float | None = None
        self._loop = loop
        self._queue: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

    def push(self, item: RequestOutput | Exception) -> None:
        """Deliver from any thread. Bounded by the request's own max_tokens and chunk count."""
        _deliver(self._loop, self._queue.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        while True:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish_reason is not None:
                return


class EngineHost:
    """Owner of the engine and of its thread."""

    def __init__(self, engine: Engine, observer: HostObserver, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._observer = observer
        self._clock = clock
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, OutputStream] = {}
        self._queued_since: dict[str, float] = {}
        self._stopping = False
        self._num_turns = 0
        self._gate = threading.Lock()  # no command enters the queue after `_fail` has emptied it
        self.fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run `function(engine)` on the engine's thread, between two steps.

        Raises:
            EngineStopped: The thread has ended; the function did not run.
            Whatever the function raises; IntegrityError also ends the thread.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def command() -> None:
            try:
                self._require_running()
                result = function(self._engine)
            except Exception as error:
                _deliver(loop, _set_exception, future, error)
                if isinstance(error, IntegrityError):
                    raise
            else:
                _deliver(loop, _set_result, future, result)

        with self._gate:
            self._require_running()
            self._commands.put(command)
        return await future

    def post(self, function: Callable[[Engine], object]) -> None:
        """As `call`, but nobody waits: for clean-up on paths that may themselves be cancelled."""

        def command() -> None:
            if self.fault is not None:
                return
            try:
                function(self._engine)
            except IntegrityError:
                raise
            except Exception:
                logger.exception("engine command failed")

        if self.fault is None and not self._stopping:
            self._commands.put(command)

    def open(self, request: Request) -> OutputStream:
        """Stream for a request that is about to be added or reserved."""
        stream = OutputStream(request, asyncio.get_running_loop())
        self._streams[request.request_id] = stream
        return stream

    def close(self, request_id: str) -> None:
        """End a stream; the request is aborted if it still runs. Idempotent, never waits."""
        self._streams.pop(request_id, None)
        self.post(lambda engine: self._abort(engine, request_id))

    def fail(self, request_id: str, error: Exception) -> None:
        """End an open stream with `error`; its reader closes it."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.push(error)

    def publish(self, output: RequestOutput) -> None:
        """Deliver an output that was made outside a step."""
        stream = self._streams.get(output.request_id)
        if stream is not None:
            stream.push(output)

    async def add(self, request: Request) -> None:
        """Queue a request in the engine. Raises what `Engine.add_request` raises."""

        def add(engine: Engine) -> None:
            engine.add_request(request)
            self._queued_since[request.request_id] = self._clock()

        await self.call(add)

    @property
    def is_alive(self) -> bool:
        return self.fault is None and self._thread.is_alive()

    def stop(self) -> None:
        """End the thread; open streams get EngineStopped."""
        self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join(JOIN_TIMEOUT_S)

    def _require_running(self) -> None:
        if self.fault is not None or self._stopping:
            raise EngineStopped(f"the engine has stopped: {self.fault or 'shutting down'}")

    def _abort(self, engine: Engine, request_id: str) -> None:
        self._queued_since.pop(request_id, None)
        engine.abort(request_id)

    # -- the engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            self._fail(EngineStopped("the replica is shutting down"))
        except Exception as error:
            logger.exception("the engine cannot go on")
            self._fail(error)
        finally:
            self._engine.close()

    def _turn(self) -> None:
        """The commands that wait, then one step; where there is nothing to compute, wait for a command."""
        self._run_commands(wait=not self._engine.has_work)
        if self._engine.has_work and not self._stopping:
            self._step()
        self._num_turns += 1
        if self._num_turns % STEPS_BETWEEN_EXPIRY == 0 or not self._engine.has_work:
            self._engine.expire()
        events = self._engine.take_cache_events()
        if events:
            self._observer.cache_changed(events)

    def _run_commands(self, *, wait: bool) -> None:
        for _ in range(MAX_COMMANDS_BETWEEN_STEPS):
            try:
                command = self._commands.get(timeout=IDLE_WAIT_S) if wait else self._commands.get_nowait()
            except queue.Empty:
                return
            command()
            wait = False

    def _step(self) -> None:
        started = self._clock()
        outputs = self._engine.step()
        self._observer.step_took(self._clock() - started)
        self._note_scheduled(started)
        for output in outputs:
            self.publish(output)

    def _note_scheduled(self, now: float) -> None:
        for request_id, since in list(self._queued_since.items()):
            stream = self._streams.get(request_id)
            if stream is None or stream.request.status is not RequestStatus.WAITING:
                del self._queued_since[request_id]
                if stream is not None:
                    stream.queue_s = now - since
                    self._observer.request_queued_for(request_id, now - since)

    def _fail(self, error: Exception) -> None:
        with self._gate:
            self.fault = error
        for stream in list(self._streams.values()):
            stream.push(EngineStopped(str(error)))
        while True:  # commands that were queued meanwhile find the engine gone
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                return


def _deliver(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """Call on the loop's thread; a loop that is closed has nobody left to tell."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
