"""What a prefill and a decode replica have in common: engine, host, connector, health, metrics."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException

from deployments.affinity import can_pin, pin_process, usable_cpus
from deployments.config import PoolSection, ZoneserveConfig
from deployments.engine_host import EngineHost, EngineStopped, HostObserver
from deployments.metrics import AuditCollector, EngineCollector, ReplicaMetrics, exposition
from deployments.settings import read_settings
from deployments.startup import StartupClock
from deployments.trust.epochs import EPOCHS_NAME, EpochStore
from deployments.trust.keyring import KeyringWatch
from deployments.trust.receipts import ReplicaPurge
from deployments.trust.trail import AuditTrail
from deployments.trust.upkeep import GRANT_KEY_INFO, TRANSFER_KEY_INFO, Upkeep, note_cache_events, quotas_of
from deployments.trust.warm import Warmer
from deployments.trust.zone_grant import KEY_SETTLE_PERIODS, GrantVerifier
from engine.block_hash import BlockHasher, HashContext
from engine.cache_events import CacheEvent
from engine.checkpoint import load_checkpoint
from engine.engine import Engine, EngineStats
from engine.model_runner import ModelRunner, load_runner
from engine.scheduler import SchedulerConfig
from engine.tokenizer import Tokenizer
from transfer.nixl_connector import NixlConnector
from transfer.protocol import KVConnector, KVPool
from transfer.ticket import TicketSealer

logger = logging.getLogger("ray.serve.zoneserve.replica")


@dataclass(frozen=True, slots=True)
class ReplicaParts:
    """What a replica is built on. `build_parts` makes the real ones; a simulation hands in its own.

    `transfer_keys`, `grant_keys`: newest first. `make_host`: puts the engine on its thread. `unix_time_s`: tickets
    expire by it. `cores`: the kernel's numbers of those that the process is pinned to. `startup`: runs since the
    process started. `trail`: this replica's audit log. `upkeep`: what it looks after while it runs.
    """

    engine: Engine
    runner: ModelRunner
    tokenizer: Tokenizer
    connector: KVConnector
    transfer_keys: tuple[bytes, ...]
    grant_keys: tuple[bytes, ...]
    make_host: Callable[[Engine, HostObserver], EngineHost] = EngineHost
    unix_time_s: Callable[[], float] = time.time
    cores: tuple[int, ...] = ()
    startup: StartupClock | None = None
    trail: AuditTrail = field(default_factory=lambda: AuditTrail(None))
    metrics: ReplicaMetrics = field(default_factory=ReplicaMetrics)
    upkeep: Upkeep | None = None


class EngineReplica:
    """Base of both pools' replicas.

    Attributes:
        host: The engine behind its thread.
        connector: This process's end of the KV transfer, over the engine's own blocks.
        metrics: Registry scraped through `metrics_text`.
        trail: This replica's own audit log.
        grants: Checks what the ingress sealed.
    """

    role: str

    def __init__(self, config: ZoneserveConfig, parts: ReplicaParts) -> None:
        self.config = config
        self.runner = parts.runner
        self.tokenizer = parts.tokenizer
        self.connector = parts.connector
        self.metrics = parts.metrics
        self.trail = parts.trail
        self.grants = GrantVerifier(parts.grant_keys, parts.unix_time_s)
        settle_s = KEY_SETTLE_PERIODS * config.trust.policy_reload_s
        self._sealer = TicketSealer(parts.transfer_keys, parts.unix_time_s, settle_s)
        self._upkeep = parts.upkeep
        self._upkeep_task: asyncio.Task[None] | None = None
        self.metrics.engine_info.labels(self.runner.arithmetic).set(1)
        if self.runner.fallback_reason is not None:
            self.metrics.backend_fallbacks.labels(short_reason(self.runner.fallback_reason)).inc()
        self.metrics.pinned_cpus.set(len(parts.cores))
        self._startup = parts.startup
        self.host = parts.make_host(parts.engine, self)
        self._background: set[asyncio.Task[None]] = set()

    def step_took(self, seconds: float) -> None:
        self.metrics.step_time.observe(seconds)

    def request_queued_for(self, request_id: str, seconds: float) -> None:
        self.metrics.queue_time.observe(seconds)

    def cache_changed(self, events: list[CacheEvent]) -> None:
        note_cache_events(self.trail, events)

    def rotate(self, transfer_keys: tuple[bytes, ...], grant_keys: tuple[bytes, ...]) -> None:
        """Take new rings, newest key first. Work under way keeps the keys that it began with. Raises ValueError."""
        self._sealer.set_keys(transfer_keys)
        self.grants.set_keys(grant_keys)

    async def purge(self, zone_path: str, epoch: int) -> ReplicaPurge:
        """Forget a zone up to `epoch`; its blocks are scrubbed, those in use when they are given back."""
        count = await self.host.call(lambda engine: engine.purge(zone_path, epoch))
        return ReplicaPurge(
            replica=_replica_name(),
            num_findable=count.num_findable - count.num_pinned,
            num_scrubbed=count.num_scrubbed,
            num_in_use=count.num_in_use,
            num_pinned=count.num_pinned,
        )

    def __del__(self) -> None:
        """Serve calls it when the replica shuts down in order."""
        if hasattr(self, "trail"):
            self.trail.close()

    def in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run clean-up that must outlive the request that started it."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def health(self) -> dict[str, object]:
        """`backend_fallback`: why torch runs where another backend was configured; None where it does not."""
        fallback = self.runner.fallback_reason
        return {
            "replica": _replica_name(),
            "alive": self.host.is_alive,
            "pid": os.getpid(),
            "arithmetic": self.runner.arithmetic,
            "backend_fallback": None if fallback is None else short_reason(fallback),
        }

    async def check_health(self) -> None:
        """Serve's probe: a replica whose engine has stopped is replaced. Serve sends requests after the first one."""
        if not self.host.is_alive:
            raise RuntimeError(f"the engine has stopped: {self.host.fault}")
        if self._startup is not None:
            self._startup.lap("health")
            self.metrics.start.set(self._startup.total_s)
            logger.info(
                "%s ready %.2f s after its process started, %s (%s)",
                self.role, self._startup.total_s, self.runner.arithmetic, self._startup,
            )  # fmt: skip
            self._startup = None
        if self._upkeep is not None and self._upkeep_task is None:
            # Not in_background: it never ends, and what counts there is clean-up that must.
            self._upkeep_task = asyncio.get_running_loop().create_task(self._look_after(self._upkeep))

    async def _look_after(self, upkeep: Upkeep) -> None:
        while self.host.is_alive:
            await asyncio.sleep(upkeep.period_s)
            try:
                if await upkeep.look(self.host, self.rotate):
                    self.metrics.key_rotations.inc()
            except EngineStopped:
                return
            except Exception:
                logger.exception("keys and shared texts stay as they were")

    async def engine_stats(self) -> dict[str, Any]:
        """Engine and transfer counts; `background` counts clean-up under way."""
        stats: EngineStats = await self.host.call(lambda engine: engine.stats())
        return {**asdict(stats), **self.transfer_counts(), "background": len(self._background)}

    async def check_integrity(self) -> None:
        await self.host.call(lambda engine: engine.check())

    async def metrics_text(self) -> tuple[str, str]:
        stats: EngineStats = await self.host.call(lambda engine: engine.stats())
        counts = self.trail.counts()
        audit = None if counts is None else AuditCollector(counts, is_writable=self.trail.failure is None)
        engine = EngineCollector(stats, self.transfer_counts())
        return _replica_name(), exposition(self.metrics.registry, engine, audit)

    def transfer_counts(self) -> Mapping[str, float]:
        """KV transfer counts by metric name."""
        stats = self.connector.stats()
        return {
            "pushed_bytes": stats.bytes_written,
            "pushed_blocks": stats.blocks_written,
            "pushed_descriptors": stats.descriptors_written,
            "transfer_failures": stats.writes_failed,
            "transfer_timeouts": stats.writes_timed_out,
        }


def build_parts(role: str, config: ZoneserveConfig, pool: PoolSection, model_path: str) -> ReplicaParts:
    """Pin the process, load the checkpoint, make an engine on it, and join its KV cache to the NIXL transfer."""
    startup = StartupClock()
    cores = _pin(role, pool)
    checkpoint = load_checkpoint(Path(model_path))
    tokenizer = Tokenizer.from_path(checkpoint.tokenizer_source)
    startup.lap("tokenizer")
    runner = load_runner(
        checkpoint,
        dtype=config.model.dtype,
        block_size=config.engine.block_size,
        num_blocks=pool.num_blocks,
        backend=config.engine.backend,
        device=pool.device,
        num_threads=pool.num_threads,
        cache_dir=read_settings().cache,
    )
    startup.lap("model")
    trust, metrics = config.trust, ReplicaMetrics()
    keys = KeyringWatch(trust.master_key_file)
    context = hash_context(runner, tokenizer, str(checkpoint.config.rope))
    max_model_len = config.model.max_model_len
    engine = Engine(
        config=scheduler_config(config),
        runner=runner,
        tokenizer=tokenizer,
        hasher=BlockHasher(keys.keyring.current, context),
        num_blocks=pool.num_blocks,
        case_idle_ttl_s=config.engine.case_idle_ttl_s,
        quotas=quotas_of(
            trust.quotas,
            num_blocks=pool.num_blocks,
            num_longest=runner.layout.num_blocks_for(max_model_len),
        ),
    )
    startup.lap("digests")
    warmer = Warmer(
        trust,
        tokenizer,
        block_size=config.engine.block_size,
        num_blocks=pool.num_blocks,
        max_model_len=max_model_len,
        epochs=EpochStore(None if trust.state_dir is None else trust.state_dir / EPOCHS_NAME),
        on_failure=lambda reason: metrics.prewarm_failures.labels(reason).inc(),
    )
    warmer.warm_engine(engine)
    startup.lap("shared texts")
    connector = NixlConnector(role, kv_pool(runner), compatibility=compatibility(config, runner, tokenizer))
    startup.lap("transfer")
    return ReplicaParts(
        engine,
        runner,
        tokenizer,
        connector,
        transfer_keys=keys.keyring.derive(TRANSFER_KEY_INFO),
        grant_keys=keys.keyring.derive(GRANT_KEY_INFO),
        cores=cores,
        startup=startup,
        trail=AuditTrail.open(trust.audit, _stream_name(role), keys.keyring.current),
        metrics=metrics,
        upkeep=Upkeep(keys, warmer, lambda key: BlockHasher(key, context), trust.policy_reload_s),
    )


def _pin(role: str, pool: PoolSection) -> tuple[int, ...]:
    """Before the engine's, OpenMP's and NIXL's threads exist, which then start on the same cores."""
    if not pool.cpus:
        return ()
    if not can_pin(pool.cpus):
        available = len(usable_cpus())
        logger.warning("%s is not pinned: cpus %s, of %d that it may use", role, list(pool.cpus), available)
        return ()
    return pin_process(pool.cpus)


def short_reason(reason: str) -> str:
    """A fallback's reason without what a compiler or a loader said, which may name files; the log has it whole."""
    return reason.partition(":")[0].partition(" (")[0]


def scheduler_config(config: ZoneserveConfig) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_batched_tokens=config.engine.max_num_batched_tokens,
        max_num_seqs=config.engine.max_num_seqs,
        max_prefill_chunk=config.engine.max_prefill_chunk,
        max_model_len=config.model.max_model_len,
        max_waiting=config.engine.max_waiting,
    )


def compatibility(config: ZoneserveConfig, runner: ModelRunner, tokenizer: Tokenizer) -> dict[str, str]:
    """What both ends of a handoff must share besides the KV layout; a difference is refused by name."""
    return {
        "weights_digest": runner.weights_digest,
        "tokenizer_digest": tokenizer.digest,
        "arithmetic": runner.arithmetic,  # KV of two arithmetics would not be one request's
        "transfer_mode": config.transfer.mode,
    }


def hash_context(runner: ModelRunner, tokenizer: Tokenizer, rope: str) -> HashContext:
    return HashContext(
        weights_digest=runner.weights_digest,
        tokenizer_digest=tokenizer.digest,
        layout_fingerprint=runner.layout.fingerprint(),
        rope=rope,
    )


def kv_pool(runner: ModelRunner) -> KVPool:
    """The runner's KV cache as the transfer sees it."""
    buffer = runner.kv_buffer
    if buffer.device.type == "cpu":
        return KVPool.from_buffer(buffer.numpy(), runner.layout)
    size = runner.layout.block_bytes
    return KVPool(
        address=buffer.data_ptr(),
        num_blocks=runner.num_blocks,
        layout=runner.layout,
        block=lambda index: buffer[index * size : (index + 1) * size].cpu().numpy().data,
        memory="VRAM",
        device_id=buffer.device.index or 0,
        owner=buffer,
    )


def _stream_name(role: str) -> str:
    """Of this replica's audit log; unique among those that write at the same time."""
    try:
        return f"{role}-{_replica_name()}"
    except RayServeException:  # not in a Serve replica: a test, or a look at the parts alone
        return f"{role}-{os.getpid()}"


def _replica_name() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)
