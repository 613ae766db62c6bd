"""The router inside Serve's own `choose_replica` and `dispatch`, with replicas that are doubles. No cluster."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private import router as serve_router
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.router import AsyncioRouter
from ray.serve.exceptions import ReplicaUnavailableError

from deployments.messages import RouteHint
from deployments.routing import serve_router as ours
from deployments.routing.policy import choose_replica
from deployments.routing.serve_router import ZoneAffinityRouter
from tests.deployments.support import reaches, run, settle

DEPLOYMENT = DeploymentID("decode", "zoneserve")
MAX_IMBALANCE = 2


class Result:
    """Of a dispatched call: ends, and frees its slot, when the test says so."""

    def __init__(self, free: Callable[[], None]) -> None:
        self.callbacks: list[Callable[[object], None]] = [lambda _: free()]

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        self.callbacks.append(callback)

    def finish(self) -> None:
        for callback in self.callbacks:
            callback(None)


@dataclass(eq=False)
class Replica:
    """As Serve's `RunningReplica`: grants slots, takes calls."""

    name: str
    capacity: int = 1000
    error: Exception | None = None
    held: set[str] = field(default_factory=set)
    num_asked: int = 0
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.replica_id = ReplicaID(self.name, DEPLOYMENT)
        self.actor_id = None
        self.node_id = "node"
        self.availability_zone = None
        self.replica_metadata: dict[str, str] = {}
        self.max_ongoing_requests = self.capacity
        self._replica_info = SimpleNamespace(node_ip="127.0.0.1", port=None)

    async def reserve_slot(self, metadata: RequestMetadata) -> tuple[str, Any]:
        await asyncio.sleep(0)
        self.num_asked += 1
        if self.error is not None:
            raise self.error
        slot = f"slot-{self.num_asked}"
        is_accepted = len(self.held) < self.capacity
        if is_accepted:
            self.held.add(slot)
        return slot, SimpleNamespace(accepted=is_accepted, num_ongoing_requests=len(self.held))

    async def release_slot(self, slot: str) -> int:
        await asyncio.sleep(0)
        self.held.discard(slot)
        return len(self.held)

    def try_send_request(self, pending: PendingRequest, with_rejection: bool) -> Result:
        assert not with_rejection
        slot = pending.metadata._reserved_slot_token
        assert slot in self.held
        self.results.append(Result(lambda: self.held.discard(slot)))
        return self.results[-1]

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return len(self.held)


class Uncounted:
    """Serve's own metrics, which need a controller."""

    def __init__(self, *_: object) -> None:
        self.inc_reserved_slots = self.dec_reserved_slots = self.ignore
        self.inc_num_running_requests_for_replica = self.dec_num_running_requests_for_replica = self.ignore
        self.wrap_request_assignment = self.wrap_queued_request = lambda *_, **__: contextlib.nullcontext()

    def ignore(self, *_: object) -> None: ...


class Pool:
    """Serve's router around ours, over some replicas."""

    def __init__(self, *replicas: Replica) -> None:
        loop = asyncio.get_running_loop()
        self.policy = ZoneAffinityRouter(
            deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        self.policy.initialize_state(max_imbalance=MAX_IMBALANCE)
        self.update(*replicas)
        self.router = AsyncioRouter(
            controller_handle=MagicMock(),
            deployment_id=DEPLOYMENT,
            handle_id="handle",
            self_actor_id="actor",
            handle_source=DeploymentHandleSource.REPLICA,
            event_loop=loop,
            enable_strict_max_ongoing_requests=True,
            node_id="node",
            availability_zone=None,
            prefer_local_node_routing=False,
            request_router=self.policy,
            _request_router_initialized_event=asyncio.Event(),
        )

    def update(self, *replicas: Replica) -> None:
        self.policy.update_replicas(list(replicas))

    def choose(self, affinity: bytes = b"", parent: str = "parent") -> Any:
        """The calls of one parent share their internal request id: so Serve does it."""
        self.metadata = RequestMetadata(request_id=parent, internal_request_id=parent, call_method="generate")
        return self.router.choose_replica(self.metadata, RouteHint("r", 10, 10, affinity))

    async def chosen(self, affinity: bytes = b"", parent: str = "parent") -> tuple[Any, str]:
        context = self.choose(affinity, parent)
        selection = await context.__aenter__()
        return context, selection.replica_id

    @property
    def inflight(self) -> Counter[str]:
        return self.policy.num_inflight()


@pytest.fixture(autouse=True)
def _no_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LongPollClient", "SharedRouterLongPollClient"):
        monkeypatch.setattr(serve_router, name, MagicMock())
    monkeypatch.setattr(serve_router, "RouterMetricsManager", Uncounted)


async def leave(*contexts: Any) -> None:
    for context in contexts:
        await context.__aexit__(None, None, None)


def affine(*names: str, key: bytes) -> str:
    chosen = choose_replica(dict.fromkeys(names, 0), key, max_imbalance=0)
    assert chosen is not None
    return chosen


def test_requests_of_one_prefix_go_to_the_policys_replica() -> None:
    async def body() -> None:
        pool = Pool(Replica("a"), Replica("b"), Replica("c"))
        for key in (b"one", b"two", b"three", b"four"):
            for _ in range(3):
                context, name = await pool.chosen(key)
                assert name == affine("a", "b", "c", key=key)
                await leave(context)
        assert not pool.inflight

    run(body)


def test_busy_affine_replica_is_left_at_the_imbalance() -> None:
    async def body() -> None:
        pool = Pool(Replica("a"), Replica("b"))
        favourite = affine("a", "b", key=b"hot")
        contexts, names = zip(*[await pool.chosen(b"hot", parent=str(index)) for index in range(8)], strict=True)
        assert names[: MAX_IMBALANCE + 1] == (favourite,) * (MAX_IMBALANCE + 1)
        assert abs(names.count("a") - names.count("b")) <= MAX_IMBALANCE
        await leave(*contexts)
        assert not pool.inflight

    run(body)


def test_calls_without_a_hint_go_to_the_least_busy() -> None:
    async def body() -> None:
        pool = Pool(Replica("a"), Replica("b"))
        contexts = []
        for _ in range(4):
            context = pool.router.choose_replica(RequestMetadata("r", "r", call_method="generate"))
            await context.__aenter__()
            contexts.append(context)
        assert pool.inflight == {"a": 2, "b": 2}
        await leave(*contexts)

    run(body)


def test_concurrent_calls_of_one_parent_are_all_counted_and_all_given_back() -> None:
    async def body() -> None:
        pool = Pool(Replica("a"), Replica("b"))
        found = await asyncio.gather(*(pool.chosen(parent="one review call") for _ in range(6)))
        assert pool.inflight == {"a": 3, "b": 3}
        await leave(*(context for context, _ in found[:4]))
        assert pool.inflight.total() == 2
        await leave(*(context for context, _ in found[4:]))
        assert not pool.inflight

    run(body)


def test_dispatched_call_counts_until_its_context_is_left() -> None:
    async def body() -> None:
        replica = Replica("a")
        pool = Pool(replica)
        async with pool.choose() as selection:
            await pool.router.dispatch(selection, pool.metadata, "call")
            assert pool.inflight == {"a": 1}
            replica.results[0].finish()
            await settle()
        assert not pool.inflight
        assert not replica.held

    run(body)


def test_dispatch_to_a_replica_that_is_gone_gives_its_place_back() -> None:
    async def body() -> None:
        pool = Pool(Replica("a"))
        context = pool.choose()
        selection = await context.__aenter__()
        pool.update(Replica("b"))
        with pytest.raises(ReplicaUnavailableError):
            await pool.router.dispatch(selection, pool.metadata, "call")
        await leave(context)
        assert not pool.inflight

    run(body)


def test_choice_that_is_never_dispatched_gives_its_place_back() -> None:
    async def body() -> None:
        pool = Pool(Replica("a"))
        async with pool.choose():
            assert pool.inflight == {"a": 1}
        assert not pool.inflight

    run(body)


def test_caller_cancelled_while_every_replica_is_full_gives_its_place_back() -> None:
    async def body() -> None:
        full = Replica("a", capacity=0)
        pool = Pool(full)
        waiting = [asyncio.create_task(pool.chosen(parent="p")) for _ in range(3)]
        await reaches(lambda: full.num_asked >= 6)
        assert pool.inflight.total() <= 3
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        del waiting, task
        await settle()
        assert not pool.inflight
        assert not pool.policy._choices

    run(body)


def test_caller_waits_for_the_first_replica_and_may_stop_waiting() -> None:
    async def body() -> None:
        pool = Pool()
        waiting, leaving = (asyncio.create_task(pool.chosen()) for _ in range(2))
        await settle()
        assert not waiting.done()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        pool.update(Replica("late"))
        context, name = await waiting
        assert name == "late"
        assert pool.inflight == {"late": 1}
        await leave(context)

    run(body)


def test_refused_request_tries_the_other_replicas_before_it_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "REFUSAL_PAUSE_S", 60.0)

    async def body() -> None:
        names = ("a", "b", "c", "d")
        favourite = affine(*names, key=b"hot")
        last = "d" if favourite != "d" else "a"
        replicas = [Replica(name, capacity=int(name == last)) for name in names]
        context, name = await Pool(*replicas).chosen(b"hot")
        assert name == last
        assert all(replica.num_asked <= 1 for replica in replicas)
        await leave(context)

    run(body)


def test_affine_replica_that_stays_full_does_not_hide_one_that_became_free() -> None:
    async def body() -> None:
        favourite = affine("a", "b", key=b"hot")
        other = "b" if favourite == "a" else "a"
        replicas = {name: Replica(name, capacity=0) for name in ("a", "b")}
        pool = Pool(*replicas.values())
        waiting = asyncio.create_task(pool.chosen(b"hot"))
        await reaches(lambda: replicas["a"].num_asked + replicas["b"].num_asked >= 6)
        replicas[other].capacity = 1
        async with asyncio.timeout(1):
            context, name = await waiting
        assert name == other
        await leave(context)

    run(body)


def test_full_replica_is_asked_at_most_once_a_pause() -> None:
    async def body() -> None:
        full = Replica("a", capacity=0)
        waiting = asyncio.create_task(Pool(full).chosen())
        await asyncio.sleep(0.25)
        assert 2 <= full.num_asked <= 0.25 / ours.REFUSAL_PAUSE_S + 2
        full.capacity = 1
        await leave((await waiting)[0])

    run(body)


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("away", None)])
def test_replica_that_does_not_answer_is_passed_over(error: Exception) -> None:
    async def body() -> None:
        favourite = affine("a", "b", key=b"hot")
        replicas = [Replica(name, error=error if name == favourite else None) for name in ("a", "b")]
        context, name = await Pool(*replicas).chosen(b"hot")
        assert name != favourite
        await leave(context)

    run(body)


def test_load_of_a_replica_that_is_gone_is_not_held_against_its_successor() -> None:
    async def body() -> None:
        pool = Pool(Replica("old"))
        held = [(await pool.chosen(parent=str(index)))[0] for index in range(5)]
        pool.update(Replica("new-1"), Replica("new-2"))
        names = []
        for index in range(4):
            context, name = await pool.chosen(parent=f"later-{index}")
            names.append(name)
            held.append(context)
        assert sorted(names) == ["new-1", "new-1", "new-2", "new-2"]
        await leave(*held)
        assert not pool.inflight

    run(body)


def test_random_comings_and_goings_leave_no_count_behind() -> None:
    async def body() -> None:
        replicas = [Replica(name, capacity=3) for name in ("a", "b", "c")]
        pool = Pool(*replicas)

        async def one(index: int) -> None:
            context = pool.choose(bytes([index % 5]), parent=str(index % 7))
            async with context as selection:
                result = await pool.router.dispatch(selection, pool.metadata, "call") if index % 3 else None
                try:
                    await asyncio.sleep(0.001 * (index % 4))
                finally:
                    if result is not None:
                        cast(Result, result).finish()

        tasks = [asyncio.create_task(one(index)) for index in range(120)]
        for index, task in enumerate(tasks):
            if index % 5 == 0:
                await asyncio.sleep(0)
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        del tasks, task, results
        await settle()
        assert not pool.policy._choices
        assert not any(replica.held for replica in replicas)

    run(body)


def test_selection_without_a_reservation_takes_any_replica() -> None:
    async def body() -> None:
        pool = Pool(Replica("a"))
        choose = cast("Callable[..., Awaitable[list[list[Any]]]]", pool.policy.choose_replicas)
        assert await choose(pool.policy._replicas_list, None) == [pool.policy._replicas_list]

    run(body)
