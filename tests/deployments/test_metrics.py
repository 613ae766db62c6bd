"""Metrics: exact sums over replicas, text that parses back, labels without content."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import (
    GAP_BUCKETS,
    LATENCY_BUCKETS,
    ORIGINS,
    PREFIX,
    EngineCollector,
    IngressMetrics,
    ReplicaMetrics,
    exposition,
    merge_expositions,
)
from engine.engine import EngineStats

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str | bytes) -> Samples:
    """Every sample of an exposition; a series that occurs twice is an error."""
    found: Samples = {}
    for family in text_string_to_metric_families(text if isinstance(text, str) else text.decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def stats(**changes: int) -> EngineStats:
    return EngineStats(**{field.name: changes.get(field.name, 0) for field in fields(EngineStats)})


def test_merged_samples_are_the_replicas_own_with_their_labels_added() -> None:
    texts = []
    rng = random.Random(3)
    for replica in range(3):
        metrics = ReplicaMetrics()
        for _ in range(50):
            metrics.step_time.observe(rng.random())
            metrics.queue_time.observe(rng.random() * 100)
            metrics.handoffs.labels(rng.choice(["landed", "failed"])).inc(rng.randrange(5))
        texts.append(({"role": "decode", "replica": f"r-{replica}"}, exposition(metrics.registry)))
    merged = samples(merge_expositions(texts))
    expected: Samples = {}
    for labels, text in texts:
        for (name, own), value in samples(text).items():
            expected[name, tuple(sorted([*own, *labels.items()]))] = value
    assert merged == expected


def test_histogram_sums_stay_exact_through_the_merge() -> None:
    observed = [0.1, 0.2, 1e-9, 3.3333333333333335, 1234.5678]
    metrics = IngressMetrics()
    for value in observed:
        metrics.ttft.observe(value)
    merged = samples(merge_expositions([({"replica": "a"}, exposition(metrics.registry))]))
    name = PREFIX + "time_to_first_token_seconds"
    assert merged[name + "_sum", (("replica", "a"),)] == sum(observed)
    assert merged[name + "_count", (("replica", "a"),)] == 5
    assert merged[name + "_bucket", (("le", "+Inf"), ("replica", "a"))] == 5
    assert merged[name + "_bucket", (("le", "0.2"), ("replica", "a"))] == 3


def test_each_family_is_described_once_and_stands_together() -> None:
    texts = [({"replica": str(index)}, exposition(ReplicaMetrics().registry)) for index in range(4)]
    lines = merge_expositions(texts).decode().splitlines()
    for mark in ("# HELP ", "# TYPE "):
        named = [line.removeprefix(mark).split()[0] for line in lines if line.startswith(mark)]
        assert len(named) == len(set(named))
    families = [line.removeprefix("# TYPE ").split()[0] for line in lines if line.startswith("# TYPE ")]
    order: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            name = line.partition("{")[0]
            family = max((family for family in families if name.startswith(family)), key=len)
            if not order or order[-1] != family:
                order.append(family)
    assert len(order) == len(set(order))


def test_types_and_help_survive_the_merge() -> None:
    registry = CollectorRegistry()
    Counter("things", "Things\\done \n twice", registry=registry).inc()
    Gauge("level", "Level", registry=registry).set(-1.5)
    Histogram("lag", "Lag", registry=registry, buckets=(1.0,)).observe(0.5)
    text = exposition(registry)
    merged = merge_expositions([({"replica": "a"}, text)]).decode()

    def described(text: str) -> list[tuple[str, str, str]]:
        return sorted(
            (family.name, family.type, family.documentation) for family in text_string_to_metric_families(text)
        )

    assert described(merged) == described(text)
    assert "things_total{" in merged


def test_label_values_survive_quotes_backslashes_and_newlines() -> None:
    value = 'a"b\\c\nd'
    registry = CollectorRegistry()
    Counter("things", "Things", ["name"], registry=registry).labels(value).inc()
    merged = samples(merge_expositions([({"replica": value}, exposition(registry))]))
    assert merged == {("things_total", (("name", value), ("replica", value))): 1.0}


def test_nothing_to_merge_is_an_empty_exposition() -> None:
    assert merge_expositions([]) == b""
    assert merge_expositions([({"replica": "a"}, "")]) == b""


@given(st.lists(st.lists(st.floats(0, 1e6), max_size=10), max_size=4))
def test_merge_equals_the_union_for_any_observations(replicas: list[list[float]]) -> None:
    texts: list[tuple[Mapping[str, str], str]] = []
    for index, values in enumerate(replicas):
        registry = CollectorRegistry()
        histogram = Histogram("lag", "Lag", registry=registry, buckets=(1.0, 10.0))
        for value in values:
            histogram.observe(value)
        texts.append(({"replica": str(index)}, exposition(registry)))
    merged = samples(merge_expositions(texts))
    for index, values in enumerate(replicas):
        label = ("replica", str(index))
        assert merged["lag_count", (label,)] == len(values)
        assert merged["lag_sum", (label,)] == sum(values)
        assert merged["lag_bucket", (("le", "10.0"), label)] == sum(value <= 10 for value in values)


def test_engine_counts_are_read_when_scraped() -> None:
    collector = EngineCollector(
        stats(
            running=2, waiting=3, reserved=1, held=4, blocks_free=50, blocks_used=30, blocks_cached=10,
            blocks_quarantined=10, prefix_cache_queries=100, prefix_cache_hits=60, preemptions=1, steps=9,
            scrubbed_blocks=5, evictions=6,
        ),
        {"pushed_bytes": 4096.0},
    )  # fmt: skip
    found = samples(exposition(ReplicaMetrics().registry, collector))
    expected = {
        "num_requests_running": 2, "num_requests_waiting": 3, "num_requests_reserved": 1, "num_requests_held": 4,
        "kv_cache_usage_perc": 0.4, "kv_blocks_quarantined": 10, "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 60, "preemptions_total": 1, "steps_total": 9, "scrubbed_blocks_total": 5,
        "evictions_total": 6, "pushed_bytes_total": 4096,
    }  # fmt: skip
    assert {name: found[PREFIX + name, ()] for name in expected} == expected


def test_engine_without_blocks_is_not_a_division_by_zero() -> None:
    assert (
        samples(exposition(CollectorRegistry(), EngineCollector(stats(), {})))[PREFIX + "kv_cache_usage_perc", ()] == 0
    )


@pytest.mark.parametrize("kind", [IngressMetrics, ReplicaMetrics])
def test_registries_are_independent(kind: type[IngressMetrics | ReplicaMetrics]) -> None:
    first, second = kind(), kind()
    assert first.registry is not second.registry
    if isinstance(first, IngressMetrics) and isinstance(second, IngressMetrics):
        first.ttft.observe(1)
        assert samples(exposition(second.registry))[PREFIX + "time_to_first_token_seconds_count", ()] == 0


def test_vllms_stems_are_there() -> None:
    names = {name for name, _ in samples(exposition(IngressMetrics().registry))}
    names |= {name for name, _ in samples(exposition(ReplicaMetrics().registry, EngineCollector(stats(), {})))}
    for stem in (
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_sum", "request_queue_time_seconds_count",
        "kv_cache_usage_perc", "prefix_cache_queries_total", "prefix_cache_hits_total", "num_requests_running",
        "num_requests_waiting", "e2e_request_latency_seconds_sum",
    ):  # fmt: skip
        assert PREFIX + stem in names


def test_every_origin_has_a_series_from_the_start() -> None:
    found = samples(exposition(IngressMetrics().registry))
    assert {found[PREFIX + "prompt_tokens_total", (("origin", origin),)] for origin in ORIGINS} == {0}


def test_no_series_tells_when_it_was_created() -> None:
    metrics = IngressMetrics()
    metrics.finished.labels("stop").inc()
    assert "_created" not in exposition(metrics.registry)


@pytest.mark.parametrize("buckets", [LATENCY_BUCKETS, GAP_BUCKETS])
def test_buckets_ascend(buckets: tuple[float, ...]) -> None:
    assert list(buckets) == sorted(set(buckets))
