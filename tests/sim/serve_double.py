"""A Serve handle inside one process, for the calls that `DecodeHandoff` makes, with what may go wrong between actors.

Calls, events and cancellations take time of their own, so they pass each other as they do over a network.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.messages import FirstToken, PrefillCall, PrefillEvent, RouteHint
from deployments.prefill import PrefillReplica

CHOOSE_PAUSE_S = 0.05


@dataclass
class Network:
    """How long messages take and which are lost. `slow`: the share of messages that take up to `slow_s`."""

    random: random.Random
    fast_s: float = 0.002
    slow: float = 0.0
    slow_s: float = 1.0
    loses_cancel: float = 0.0
    loses_settle: float = 0.0
    breaks_call: float = 0.0  # the replica itself ends a call, as one that is shut down does
    refuses_choice: float = 0.0
    loses_first_token: bool = False
    delays_call_s: float = 0.0
    delays_event: Callable[[PrefillEvent], float] = lambda event: 0.0  # besides its lag

    def lag_s(self) -> float:
        return self.random.uniform(0, self.slow_s if self.happens(self.slow) else self.fast_s)

    def happens(self, share: float) -> bool:
        return share > 0 and self.random.random() < share


@dataclass(eq=False)
class ServedReplica:
    """One prefill replica as Serve sees it."""

    name: str
    replica: PrefillReplica
    is_alive: bool = True
    responses: list[Response] = field(default_factory=list)


@dataclass(frozen=True)
class Selection:
    served: ServedReplica

    @property
    def replica_metadata(self) -> dict[str, str]:
        return self.served.replica.record_replica_metadata()


class Response:
    """As `DeploymentResponseGenerator`: events in order, each after its own delay; can be cancelled."""

    def __init__(self, network: Network, served: ServedReplica, call: PrefillCall, watch: Watch) -> None:
        self._network = network
        self._served = served
        self._call = call
        self._watch = watch
        self._arrived: asyncio.Queue[PrefillEvent | BaseException] = asyncio.Queue()
        self._last_arrival_s = 0.0
        self._is_over = False
        self._task = asyncio.get_running_loop().create_task(self._serve())
        self._task.add_done_callback(self._note_end)
        served.responses.append(self)

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> PrefillEvent:
        if self._is_over:
            raise StopAsyncIteration
        item = await self._arrived.get()
        if isinstance(item, BaseException):
            self._is_over = True
            raise item
        return item

    async def _fetch_future_result_async(self) -> None:
        """The call is sent as soon as it is made."""

    def cancel(self) -> None:
        if not self._network.happens(self._network.loses_cancel):
            asyncio.get_running_loop().call_later(self._network.lag_s(), self._task.cancel)

    def give_up(self) -> None:
        """The replica ends the call by itself, as one that is shut down does."""
        self._task.cancel()

    def cut(self, error: BaseException) -> None:
        """The replica's process ends: what it had sent still arrives, then the caller learns of it."""
        self._task.cancel()
        self._send(error)

    async def _serve(self) -> None:
        try:
            # A call that is cancelled here never begins.
            await asyncio.sleep(self._network.lag_s() + self._network.delays_call_s)
            if not self._served.is_alive:
                raise ActorDiedError
            if self._network.happens(self._network.breaks_call):
                asyncio.get_running_loop().call_later(self._network.lag_s(), self.give_up)
            async with aclosing(self._served.replica.prefill(self._call)) as events:  # type: ignore[type-var]
                async for event in events:
                    self._send(event)
                    self._watch(self, event)
            self._send(StopAsyncIteration())
        except ActorDiedError as error:
            self._send(error)
        except Exception as error:
            self._send(RayTaskError("prefill", "", error).as_instanceof_cause())

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._served.responses.remove(self)
        if task.cancelled():
            self._send(asyncio.CancelledError())  # as Serve does, whoever cancelled it

    def _send(self, item: PrefillEvent | BaseException) -> None:
        if isinstance(item, FirstToken) and self._network.loses_first_token:
            return
        loop = asyncio.get_running_loop()
        lag_s = self._network.lag_s()
        if not isinstance(item, BaseException):
            lag_s += self._network.delays_event(item)
        self._last_arrival_s = max(self._last_arrival_s, loop.time() + lag_s)
        loop.call_at(self._last_arrival_s, self._arrived.put_nowait, item)


Watch = Callable[[Response, PrefillEvent], None]


class PrefillHandle:
    """As the handle of the prefill deployment and of its `prefill` method."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.replicas: list[ServedReplica] = []
        self.counts: Counter[str] = Counter()
        self.watch: Watch = lambda response, event: None
        self.is_over_ray = False  # only then is an ActorDiedError of a call Ray's word

    def options(self, *, stream: bool = False, _by_reference: bool = False) -> PrefillHandle:
        self.is_over_ray |= _by_reference
        return self

    @property
    def prefill(self) -> PrefillHandle:
        return self

    def choose_replica(self, hint: RouteHint) -> _Choice:
        assert hint.num_prompt_tokens > 0
        return _Choice(self)

    def dispatch(self, selection: Selection, call: PrefillCall) -> Response:
        assert self.is_over_ray
        self.counts["dispatched"] += 1
        return Response(self.network, selection.served, call, lambda response, event: self.watch(response, event))

    def broadcast(self, method: str, *args: Any) -> _Broadcast:
        assert method == "settle"
        assert self.is_over_ray
        self.counts["settle"] += 1
        return _Broadcast(self, args)


class _Choice:
    """A place on a replica from entry to exit. A class: a generator would be left when it is collected, too."""

    def __init__(self, handle: PrefillHandle) -> None:
        self._handle = handle

    async def __aenter__(self) -> Selection:
        handle, network = self._handle, self._handle.network
        await asyncio.sleep(network.lag_s())
        if network.happens(network.refuses_choice):
            raise DeploymentUnavailableError("prefill")
        while not (alive := [served for served in handle.replicas if served.is_alive]):  # noqa: ASYNC110
            await asyncio.sleep(CHOOSE_PAUSE_S)  # as Serve does, without a limit of its own
        handle.counts["chosen"] += 1
        return Selection(network.random.choice(alive))

    async def __aexit__(self, *_: object) -> None:
        self._handle.counts["left"] += 1


class _Broadcast:
    def __init__(self, handle: PrefillHandle, args: tuple[Any, ...]) -> None:
        self._handle = handle
        self._args = args

    async def results_async(self, *, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        alive = [served for served in self._handle.replicas if served.is_alive]
        return list(await asyncio.gather(*(self._ask(served) for served in alive)))

    async def _ask(self, served: ServedReplica) -> Any:
        network = self._handle.network
        await asyncio.sleep(network.lag_s())
        if network.happens(network.loses_settle) or not served.is_alive:
            return ActorDiedError()
        answer = await served.replica.settle(*self._args)
        await asyncio.sleep(network.lag_s())
        return answer
