"""A decode pool and a prefill pool in one process: the real replicas over toy engines and a local fabric.

Everything runs on one loop in virtual time, engines included, so a seed repeats a run exactly. After each turn of an
engine the ground truth of the fabric is held against the block pools.
"""

from __future__ import annotations

import asyncio
import queue
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import ActorDiedError

from deployments.config import ZoneserveConfig
from deployments.decode import DecodeReplica
from deployments.engine_host import EngineHost, HostObserver
from deployments.errors import AuditUnavailable
from deployments.messages import GenerateCall, Provenance
from deployments.prefill import PrefillReplica
from deployments.replica import EngineReplica, ReplicaParts, compatibility, kv_pool, scheduler_config
from deployments.trust.audit import AuditEvent
from deployments.trust.epochs import EpochStore, stamped
from deployments.trust.trail import AuditTrail
from deployments.trust.zone_grant import GrantSealer
from engine.engine import Engine
from engine.errors import IntegrityError
from engine.request import SamplingParams
from engine.zone import PUBLIC, Zone, ZoneSpan, joined_zone
from tests.deployments.support import GRANT_KEY, local_config
from tests.engine.toy_model import BLOCK_SIZE, ToyModel, ToyRunner, toy_hasher, toy_tokenizer
from tests.sim.serve_double import Network, PrefillHandle, ServedReplica
from transfer.local_connector import NO_FAULT, Fault, LocalConnector, LocalFabric, _Flight

TRANSFER_KEY, NEW_TRANSFER_KEY = bytes(range(32)), bytes(range(1, 33))
NEW_GRANT_KEY = b"h" * 32
MAX_MODEL_LEN = 96
STEP_S = 0.003
QUIET_LIMIT_S = 400.0  # longer than every named limit of a handoff taken together
REPLACEMENT_S = 3.0
HEALTH_CHECK_S = 2.0


def sim_config(**transfer: Any) -> ZoneserveConfig:
    """Small pools and chunks, so that prompts take several steps and requests wait for blocks."""
    return local_config(
        model={"max_model_len": MAX_MODEL_LEN},
        engine={"block_size": BLOCK_SIZE, "max_num_batched_tokens": 16, "max_prefill_chunk": 8, "max_num_seqs": 6},
        prefill={"num_blocks": 40},
        decode={"num_blocks": 48},
        transfer={
            "write_timeout_s": 2.0,
            "handoff_timeout_s": 6.0,
            "fence_timeout_s": 4.0,
            "ticket_ttl_s": 8.0,
            **transfer,
        },
        routing={"local_prefill_max_tokens": 6, "reserve_timeout_s": 5.0, "choose_timeout_s": 2.0},
    )


class LoopFabric(LocalFabric):
    """A fabric on the loop's own clock that also loses, delays, repeats and forges messages.

    `draw_fault`: what happens to a write that has no fault of its own in `faults`.
    """

    def __init__(self, network: Network) -> None:
        super().__init__(asyncio.get_running_loop().time)
        self._network = network
        self.draw_fault: Callable[[], Fault] = lambda: NO_FAULT
        self.loses_message = 0.0
        self.repeats_message = 0.0
        self.forges_message = 0.0

    def schedule(self, delay_s: float, action: Callable[[], None]) -> None:
        super().schedule(delay_s, action)
        asyncio.get_running_loop().call_later(delay_s, self.pump)

    def launch(self, flight: _Flight, timeout_s: float) -> None:
        if not self.faults:
            self.faults.append(self.draw_fault())
        super().launch(flight, timeout_s)

    def deliver(self, receiver: str, message: bytes) -> None:
        network = self._network
        if network.happens(self.forges_message):
            super().deliver(receiver, message[:-1] + bytes([message[-1] ^ 1]))
        if network.happens(self.loses_message):
            return
        for _ in range(2 if network.happens(self.repeats_message) else 1):
            self.schedule(network.lag_s(), lambda: super(LoopFabric, self).deliver(receiver, message))


class _WakingQueue(queue.SimpleQueue[Callable[[], None]]):
    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def put(self, item: Callable[[], None], block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        self._wake()


class SteppedHost(EngineHost):
    """The real host with turns of the loop in the place of its thread."""

    def __init__(
        self, engine: Engine, observer: HostObserver, network: Network, after_turn: Callable[[], None]
    ) -> None:
        self._network = network
        self._after_turn = after_turn
        self.is_awake = False
        super().__init__(engine, observer)
        self._thread.join()
        self._commands = _WakingQueue(self._wake)

    def _run(self) -> None:
        """The thread has nothing to do."""

    def _wake(self) -> None:
        if not self.is_awake and self.fault is None:
            self.is_awake = True
            asyncio.get_running_loop().call_later(self._network.random.uniform(0, STEP_S), self._take_turn)

    def _take_turn(self) -> None:
        self.is_awake = False
        try:
            self._turn()
        except Exception as error:
            self._fail(error)
        self._after_turn()
        if self._engine.has_work or not self._commands.empty():
            self._wake()

    def _run_commands(self, *, wait: bool) -> None:
        for _ in range(self._network.random.randint(1, 3)):
            if self._commands.empty():
                return
            self._commands.get()()

    def die(self) -> None:
        """The process ends: no command runs any more."""
        self.fault = RuntimeError("killed")


class Log:
    """In the place of an audit log's writer: keeps the events in the order in which they came."""

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []
        self.is_writable = True

    def require_writable(self) -> None:
        if not self.is_writable:
            raise AuditUnavailable("the audit log cannot be written")

    def append(self, event: AuditEvent) -> None:
        self.events.append(event)

    def close(self) -> None:
        """Nothing is open."""

    def fields(self, kind: str) -> list[dict[str, Any]]:
        return [dict(event.fields) for event in self.events if event.kind == kind]


@dataclass
class Answer:
    """What one client saw."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    provenance: Provenance | None = None
    has_left: bool = False

    def note_end(self, reader: asyncio.Task[None]) -> None:
        self.has_left = reader.cancelled()

    def check(self) -> None:
        """Right tokens, or an honest end: never a wrong one, never a wrong sum."""
        expected = ToyModel.continuation(self.prompt, self.sampling.max_tokens, ignore_eos=self.sampling.ignore_eos)
        assert self.tokens == expected[: len(self.tokens)], "a wrong token"
        if self.has_left:
            return
        assert (self.error is None) != (self.finish_reason is None), "neither an answer nor an error, or both"
        if self.error is None:
            assert self.tokens == expected
            assert self.provenance is not None
            assert sum(self.provenance.origins.values()) == len(self.prompt)
            assert min(self.provenance.origins.values()) >= 0


class Cluster:
    """One decode replica and some prefill replicas. Build it on the loop that runs it: `running_cluster`."""

    def __init__(
        self,
        seed: int = 0,
        *,
        num_prefill: int = 1,
        config: ZoneserveConfig | None = None,
        has_threads: bool = False,
        prefill_arithmetic: str = "toy",
    ) -> None:
        """`has_threads`: the engines run on threads of their own, in real time; a seed does not repeat such a run."""
        self.prefill_arithmetic = prefill_arithmetic
        self.has_threads = has_threads
        self.random = random.Random(seed)
        self.config = config or sim_config()
        self.network = Network(self.random)
        self.fabric = LoopFabric(self.network)
        self.pool = PrefillHandle(self.network)
        self.answers: list[Answer] = []
        self.log = Log()
        self.epochs = EpochStore(None)
        self.grants = GrantSealer((GRANT_KEY,), asyncio.get_running_loop().time)
        self.engines: dict[str, Engine] = {}
        self.hosts: list[EngineHost] = []
        for _ in range(num_prefill):
            self.add_prefill()
        self.decodes: list[DecodeReplica] = []
        self.decode = self.add_decode()

    # What runs.

    def add_prefill(self) -> ServedReplica:
        runner = ToyRunner(self.config.prefill.num_blocks)
        runner.arithmetic = self.prefill_arithmetic
        parts = self._parts("prefill", runner)
        served = ServedReplica(parts.connector.name, PrefillReplica(self.config, "", parts))
        self.pool.replicas.append(served)
        return served

    def add_decode(self) -> DecodeReplica:
        parts = self._parts("decode", ToyRunner(self.config.decode.num_blocks))
        self.decodes.append(DecodeReplica(self.config, "", self.pool, parts))
        return self.decodes[-1]

    @property
    def prefill(self) -> ServedReplica:
        """The replica that is alive, where one is."""
        return next(served for served in self.pool.replicas if served.is_alive)

    def kill_prefill(self, served: ServedReplica, replacement_s: float = REPLACEMENT_S) -> None:
        served.is_alive = False
        host = served.replica.host
        host.die() if isinstance(host, SteppedHost) else host.stop()
        self.fabric.kill(served.name)
        for response in list(served.responses):
            response.cut(ActorDiedError())
        asyncio.get_running_loop().call_later(replacement_s, self.add_prefill)

    def break_engine(self, served: ServedReplica) -> None:
        """Its next step raises: the engine stops, the process lives on until Serve's health check replaces it."""
        fail_next_step(served.replica)
        asyncio.get_running_loop().call_later(HEALTH_CHECK_S, self._check_health, served)

    def _check_health(self, served: ServedReplica) -> None:
        if served.is_alive and served.replica.host.fault is not None:
            self.kill_prefill(served)

    def _parts(self, role: str, runner: ToyRunner) -> ReplicaParts:
        tokenizer = toy_tokenizer()
        engine = Engine(
            config=scheduler_config(self.config),
            runner=runner,
            tokenizer=tokenizer,
            hasher=toy_hasher(),
            num_blocks=runner.num_blocks,
        )
        facts = compatibility(self.config, runner, tokenizer)
        connector = LocalConnector(role, kv_pool(runner), self.fabric, compatibility=facts)
        self.engines[connector.name] = engine
        return ReplicaParts(
            engine=engine,
            runner=runner,
            tokenizer=tokenizer,
            connector=connector,
            transfer_keys=(TRANSFER_KEY,),
            grant_keys=(GRANT_KEY,),
            trail=AuditTrail(self.log),  # type: ignore[arg-type]
            make_host=self._make_host,
            unix_time_s=asyncio.get_running_loop().time,
        )

    def _make_host(self, engine: Engine, observer: HostObserver) -> EngineHost:
        if self.has_threads:
            host = EngineHost(engine, observer)
        else:
            host = SteppedHost(engine, observer, self.network, self.check_fences)
        self.hosts.append(host)
        return host

    # What clients do.

    def ask(
        self,
        prompt: tuple[int, ...],
        *,
        zone: Zone | tuple[ZoneSpan, ...] = PUBLIC,
        request_id: str | None = None,
        replica: DecodeReplica | None = None,
        priority: int = 0,
        pause_s: float = 0.0,
        spoil: Callable[[GenerateCall], GenerateCall] = lambda call: call,
        **sampling: Any,
    ) -> tuple[Answer, asyncio.Task[None]]:
        """Start one request; cancelling the task is the client leaving. `pause_s`: how long it takes over an event.

        `spoil`: what becomes of the call after the ingress has sealed it.
        """
        params = SamplingParams(**{"ignore_eos": True, "max_tokens": 6, **sampling})
        spans = stamped((ZoneSpan(len(prompt), zone),) if isinstance(zone, Zone) else zone, self.epochs)
        own = joined_zone(spans)
        call = GenerateCall(
            request_id or f"gen-{len(self.answers)}", prompt, params, spans, timeout_s=60.0, priority=priority,
            epoch=self.epochs.epoch_of(own), tenant=own.tenant,
        )  # fmt: skip
        call = spoil(replace(call, grant=self.grants.seal(call)))
        answer = Answer(prompt, params)
        self.answers.append(answer)
        task = asyncio.get_running_loop().create_task(self._read(replica or self.decode, call, answer, pause_s))
        task.add_done_callback(answer.note_end)
        return answer, task

    async def answer(self, prompt: tuple[int, ...], **options: Any) -> Answer:
        answer, task = self.ask(prompt, **options)
        await asyncio.wait([task])
        return answer

    async def _read(self, replica: DecodeReplica, call: GenerateCall, answer: Answer, pause_s: float) -> None:
        async with aclosing(replica.generate(call)) as events:  # type: ignore[type-var]
            async for event in events:
                assert answer.finish_reason is None, "an event after the last"
                answer.tokens += event.token_ids
                answer.error = event.error
                if event.finish_reason is not None:
                    answer.finish_reason, answer.provenance = event.finish_reason, event.provenance
                await asyncio.sleep(pause_s)

    # What must hold.

    def check_fences(self) -> None:
        """No block that a write reads or may still change is anybody else's, or free."""
        for name, engine in self.engines.items():
            if self.fabric.is_dead(name):
                continue
            cache = engine._cache
            exposed = {
                block_id for table in cache._tables.values() for block_id in table.block_ids[slice(*table.exposed)]
            }
            quarantined = {block for blocks in engine._pool._quarantined.values() for block in blocks}
            in_danger = self.fabric.may_write(name)
            assert in_danger <= exposed | quarantined, (
                f"{name}: a write may land in {in_danger - exposed - quarantined}"
            )
            for flight in self.fabric._flights:
                if flight.sender.name == name:
                    assert all(engine._pool.ref_count(block) > 0 for block in flight.local), "a source block was freed"

    async def come_to_rest(self, limit_s: float = QUIET_LIMIT_S) -> float:
        """Seconds until no task is left and no engine is awake; fails where that takes longer than every limit."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        while (others := asyncio.all_tasks() - {asyncio.current_task()}) or any(map(_is_awake, self.hosts)):
            assert loop.time() - started_s < limit_s, f"still running after {limit_s} s: {others}"
            await asyncio.wait(others or {loop.create_task(asyncio.sleep(STEP_S))}, timeout=limit_s)
        for host in self.hosts:
            if self.has_threads and host.is_alive:
                await host.call(lambda engine: None)  # behind what was posted to it
        await asyncio.sleep(0)  # what hears of the end of the last task
        return loop.time() - started_s

    def check_clean(self) -> None:
        """Nothing of any request is left anywhere, and everything is counted once."""
        for answer in self.answers:
            answer.check()
        for decode in self.decodes:
            self._check_replica(decode)
            decode._receiver.ledger.check()
            ledger = decode._receiver.stats().ledger
            assert (ledger.writing_handoffs, ledger.quarantined_handoffs) == (0, 0)
            assert not decode._receiver._tasks
        for served in self.pool.replicas:
            if served.is_alive:
                self._check_replica(served.replica)
                assert not served.replica._calls
                assert not served.responses
        assert self.pool.counts["chosen"] == self.pool.counts["left"], "a replica's slot was not given back"
        self._check_counts()
        self._check_log()

    def _check_log(self) -> None:
        """What landed is recorded once, under the name by which the other side knows it."""
        received, sent = self.log.fields("transfer.recv"), self.log.fields("transfer.send")
        sent_digests = Counter(record["ticket_digest"] for record in sent)
        assert len(received) >= self.outcomes()["landed"]
        assert max((sent_digests + Counter(record["ticket_digest"] for record in received)).values(), default=0) <= 2
        for record in received:
            other = next((item for item in sent if item["ticket_digest"] == record["ticket_digest"]), record)
            assert record | {"peer": other["peer"]} == other, "both sides tell the same of one transfer"

    def _check_replica(self, replica: EngineReplica) -> None:
        host = replica.host
        assert not host._streams
        assert not replica._background
        assert replica.connector.stats().live_writes == 0
        assert not replica.connector.inbox.has_waiters
        if host.fault is not None:
            return
        assert not host._queued_since
        host._engine.check()
        stats = host._engine.stats()
        left = (stats.running, stats.waiting, stats.reserved, stats.held, stats.blocks_used, stats.blocks_quarantined)
        assert left == (0,) * 6, f"{replica.role}: {left}"

    def _check_counts(self) -> None:
        outcomes, fallbacks = self.outcomes(), self.fallbacks()
        assert outcomes["failed"] == sum(fallbacks.values()), (outcomes, fallbacks)
        told = Counter(
            answer.provenance.fallback for answer in self.answers if answer.provenance and answer.provenance.fallback
        )
        assert not told - fallbacks, "a fallback that was not counted"
        recomputed = sum(answer.provenance.recomputed_tokens for answer in self.answers if answer.provenance)
        assert sum(decode.metrics.recomputed._value.get() for decode in self.decodes) == recomputed

    def rotate(self, transfer_keys: tuple[bytes, ...], grant_keys: tuple[bytes, ...]) -> None:
        """Every process takes the new rings at once."""
        self.grants.set_keys(grant_keys)
        for replica in (*self.decodes, *(served.replica for served in self.pool.replicas)):
            replica.rotate(transfer_keys, grant_keys)

    def grant_refusals(self, replica: EngineReplica) -> Counter[str]:
        return _counter(replica.metrics.grant_refusals, "reason")

    def outcomes(self) -> Counter[str]:
        return sum((_counter(decode.metrics.handoffs, "outcome") for decode in self.decodes), Counter())

    def fallbacks(self) -> Counter[str]:
        return sum((_counter(decode.metrics.fallbacks, "reason") for decode in self.decodes), Counter())

    def fences(self) -> Counter[str]:
        """Of all decode replicas, by what proved them."""
        return sum((Counter(decode._receiver.stats().ledger.fences) for decode in self.decodes), Counter())


def _is_awake(host: EngineHost) -> bool:
    return isinstance(host, SteppedHost) and host.is_awake


def fail_next_step(replica: EngineReplica) -> None:
    assert isinstance(replica.runner, ToyRunner)
    replica.runner.fault = RuntimeError("injected")


def stop_engine(replica: EngineReplica) -> None:
    """It finds its own state broken, and must not go on."""

    def find_fault(engine: Engine) -> None:
        raise IntegrityError("injected")

    replica.host.post(find_fault)


def _counter(metric: Any, label: str) -> Counter[str]:
    samples = [sample for family in metric.collect() for sample in family.samples if sample.name.endswith("_total")]
    return Counter({sample.labels[label]: int(sample.value) for sample in samples if sample.value})


@asynccontextmanager
async def running_cluster(seed: int = 0, **options: Any) -> AsyncIterator[Cluster]:
    """A cluster that must be clean when the body has ended and everything has come to rest."""
    cluster = Cluster(seed, **options)
    try:
        yield cluster
        await cluster.come_to_rest()
        cluster.check_clean()
    finally:
        for host in cluster.hosts:
            if cluster.has_threads:
                host.stop()
