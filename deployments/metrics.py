"""Prometheus metrics: one registry a replica, merged at the ingress, exact sums. No zone, no content in labels.

Stems are vLLM's where vLLM has the quantity, so dashboards carry over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from deployments.trust.audit.log import AuditCounts
from engine.engine import EngineStats

PREFIX = "zoneserve_"
LATENCY_BUCKETS = (
    0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0
)  # fmt: skip
GAP_BUCKETS = (
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.0,
    5.0,
)
ORIGINS = ("decode_cache", "prefill_cache", "prefill_computed", "decode_computed")

disable_created_metrics()  # type: ignore[no-untyped-call]


class IngressMetrics:
    """What a client feels, measured at the edge."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests by route and status", ["route", "status"])
        self.refusals = self._counter("refusals", "Requests refused, by reason", ["reason"])
        self.stripped = self._counter(
            "stripped_client_parameters",
            "Client-sent zone or transfer parameters that were ignored",
            ["name"],
        )
        self.decode_retries = self._counter("decode_retries", "Requests sent to another decode replica", [])
        self.finished = self._counter("request_success", "Generations by finish reason", ["finished_reason"])
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens by where their KV came from", ["origin"])
        self.generation_tokens = self._counter("generation_tokens", "Tokens streamed to clients", [])
        self.reviews = self._counter("reviews", "Claim reviews by recommended action", ["action"])
        self.dispositions = self._counter("dispositions", "Claim inputs not reviewed, by reason", ["reason"])
        self.auth_denials = self._counter("auth_denials", "Requests that named no principal, by reason", ["reason"])
        self.zone_denials = self._counter(
            "zone_denials", "Zones denied to a call, by reason: a contradiction (403), or the policy", ["reason"]
        )
        self.segment_denials = self._counter(
            "segment_denials", "Texts that were to be shared and are private, by reason", ["reason"]
        )
        self.key_rotations = self._counter("key_rotations", "Master keys taken into use while running", [])
        self.purges = self._counter("purges", "Purges of a zone, by outcome", ["outcome"])
        self.policy_reloads = self._counter("policy_reloads", "Policy files read, by outcome", ["outcome"])
        self.manifest_refusals = self._counter(
            "manifest_refusals", "Manifests that are refused, or in force no longer, by reason", ["reason"]
        )
        self.manifests_in_force = Gauge(
            PREFIX + "manifests_in_force", "Zones that a manifest shares text in", registry=self.registry
        )
        self.jwks_fetches = self._counter("jwks_fetches", "Reads of the token signers' keys, by outcome", ["outcome"])
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token")
        self.itl = self._histogram("inter_token_latency_seconds", "Gap between two tokens", GAP_BUCKETS)
        self.tpot = self._histogram("request_time_per_output_token_seconds", "Mean gap of a request", GAP_BUCKETS)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token")
        for origin in ORIGINS:
            self.prompt_tokens.labels(origin)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = LATENCY_BUCKETS) -> Histogram:
        return Histogram(PREFIX + name, text, registry=self.registry, buckets=buckets)


@cache
def ingress_metrics() -> IngressMetrics:
    """This process's; an ingress replica has a process of its own."""
    return IngressMetrics()


class ReplicaMetrics:
    """What an engine replica does. Gauges and engine counts are read from the engine when scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.queue_time = Histogram(
            PREFIX + "request_queue_time_seconds",
            "Arrival at the engine to the first step that computes for it",
            registry=self.registry,
            buckets=LATENCY_BUCKETS,
        )
        self.step_time = Histogram(
            PREFIX + "engine_step_seconds", "One engine step", registry=self.registry, buckets=GAP_BUCKETS
        )
        self.handoff = Histogram(
            PREFIX + "handoff_seconds",
            "Reservation on decode to verified landing",
            registry=self.registry,
            buckets=LATENCY_BUCKETS,
        )
        self.landing_wait = Histogram(
            PREFIX + "handoff_tail_seconds",
            "First token on decode to verified landing: what the transfer adds to the second token",
            registry=self.registry,
            buckets=GAP_BUCKETS,
        )
        self.handoffs = Counter(PREFIX + "handoffs", "Handoffs by outcome", ["outcome"], registry=self.registry)
        self.fallbacks = Counter(
            PREFIX + "local_prefill_fallbacks", "Handoffs that ended in prefill on decode", ["reason"],
            registry=self.registry,
        )  # fmt: skip
        self.grant_refusals = Counter(
            PREFIX + "grant_refusals", "Calls without a valid zone grant, by reason", ["reason"],
            registry=self.registry,
        )  # fmt: skip
        self.recomputed = Counter(
            PREFIX + "recomputed_tokens",
            "Tokens computed again after preemption or fallback",
            registry=self.registry,
        )
        self.duplicated = Counter(
            PREFIX + "duplicated_prefill_tokens",
            "Prompt tokens prefill computed although decode held them",
            registry=self.registry,
        )
        self.engine_info = Gauge(
            PREFIX + "engine_info", "1, by the arithmetic that runs", ["arithmetic"], registry=self.registry
        )
        self.backend_fallbacks = Counter(
            PREFIX + "backend_fallbacks", "Start-ups on torch instead of the configured backend", ["reason"],
            registry=self.registry,
        )  # fmt: skip
        self.pinned_cpus = Gauge(
            PREFIX + "pinned_cpus", "Cores the replica is pinned to; 0: it is not", registry=self.registry
        )
        self.start = Gauge(
            PREFIX + "replica_start_seconds",
            "Start of the process to the first health check that it passes; 0 until then",
            registry=self.registry,
        )
        self.key_rotations = Counter(
            PREFIX + "key_rotations", "Master keys taken into use while running", registry=self.registry
        )
        self.prewarm_failures = Counter(
            PREFIX + "prewarm_failures", "Shared texts that are not resident, by reason", ["reason"],
            registry=self.registry,
        )  # fmt: skip


class EngineCollector(Collector):
    """Engine and transfer counts at scrape time."""

    def __init__(self, stats: EngineStats, transfer: Mapping[str, float]) -> None:
        self._stats = stats
        self._transfer = transfer

    def collect(self) -> Iterator[Metric]:
        stats = asdict(self._stats)
        used = stats["blocks_used"] + stats["blocks_quarantined"]
        total = used + stats["blocks_free"] + stats["blocks_cached"] + stats["blocks_pinned"]
        yield GaugeMetricFamily(PREFIX + "num_requests_running", "Requests being computed", stats["running"])
        yield GaugeMetricFamily(PREFIX + "num_requests_waiting", "Requests queued", stats["waiting"])
        yield GaugeMetricFamily(PREFIX + "num_requests_reserved", "Waiting for KV from prefill", stats["reserved"])
        yield GaugeMetricFamily(PREFIX + "num_requests_held", "Prefilled, blocks being pushed", stats["held"])
        yield GaugeMetricFamily(PREFIX + "kv_cache_usage_perc", "Blocks in use, 0 to 1", used / max(total, 1))
        yield GaugeMetricFamily(
            PREFIX + "kv_blocks_quarantined", "Blocks awaiting a fence", stats["blocks_quarantined"]
        )
        yield GaugeMetricFamily(
            PREFIX + "kv_blocks_pinned", "Blocks of shared texts kept resident", stats["blocks_pinned"]
        )
        for name, text in _ENGINE_COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, text, stats[name])
        for name, value in self._transfer.items():
            yield CounterMetricFamily(PREFIX + name, "KV transfer count", value)


class AuditCollector(Collector):
    """An audit log's counts at scrape time."""

    def __init__(self, counts: AuditCounts, *, is_writable: bool) -> None:
        self._counts = counts
        self._is_writable = is_writable

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(PREFIX + "audit_writable", "1 while the audit log can be written", self._is_writable)
        for name, value in asdict(self._counts).items():
            yield CounterMetricFamily(PREFIX + "audit_" + name, _AUDIT_COUNTERS[name], value)


_AUDIT_COUNTERS = {
    "appended": "Audit records that reached the medium",
    "fsyncs": "Commits of the audit log",
    "rotations": "Audit files closed for size or age",
    "anchors": "Anchors of the audit log",
    "failures": "Commits of the audit log that failed, and outages for a full queue",
    "refused": "Callers refused because the audit log cannot be written",
    "lost": "Events that no audit record was written of",
}
_ENGINE_COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache",
    "preemptions": "Requests preempted for recompute",
    "steps": "Engine steps",
    "scrubbed_blocks": "Blocks zeroed before reuse",
    "evictions": "Cached blocks given up for new ones",
    "quota_evictions": "Cached blocks given up because their owner's cap was reached",
    "expired_blocks": "Cached blocks of cases given up after their time to live",
    "stale_epochs": "Requests labelled before a purge: served, not cached",
    "lost_cache_events": "Cache events that no audit record was written of",
}


def exposition(registry: CollectorRegistry, *extras: Collector | None) -> str:
    """Text exposition of one replica."""
    text = generate_latest(registry).decode()
    for extra in extras:
        if extra is not None:
            scratch = CollectorRegistry()
            scratch.register(extra)
            text += generate_latest(scratch).decode()
    return text


def merge_expositions(texts: Iterable[tuple[Mapping[str, str], str]]) -> bytes:
    """One exposition from many, each sample with its replica's labels added."""
    merged: dict[str, Metric] = {}
    for labels, text in texts:
        for family in text_string_to_metric_families(text):
            target = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                target.add_sample(sample.name, {**sample.labels, **labels}, sample.value)

    class _Merged(Collector):
        def collect(self) -> Iterator[Metric]:
            yield from merged.values()

    registry = CollectorRegistry()
    registry.register(_Merged())
    return generate_latest(registry)
