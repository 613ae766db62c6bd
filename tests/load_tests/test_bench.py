"""The HTTP bench attributes to each request what the counters gained, and refuses to report what it did not measure."""

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from load_tests.bench import BenchError, Observation, Probe, measure_handoff, measure_prefix, report, spread
from load_tests.exposition import Exposition
from load_tests.local import Server

PREFIX_HASH_TOKENS = 1000


class FakeServing:
    """Counts like a deployment: a prompt whose first 1,000 tokens were seen is cached, another is handed off."""

    def __init__(self) -> None:
        self.is_disaggregated = True
        self.caches_prefixes = True
        self.seen: set[tuple[int, ...]] = set()
        self.counters = {
            name: 0.0
            for name in (
                'zoneserve_prompt_tokens_total{origin="decode_cache",role="ingress"}',
                'zoneserve_prompt_tokens_total{origin="prefill_computed",role="ingress"}',
                "zoneserve_time_to_first_token_seconds_sum",
                "zoneserve_e2e_request_latency_seconds_count",
                'zoneserve_handoff_seconds_count{role="decode",replica="a"}',
                'zoneserve_handoff_seconds_sum{role="decode",replica="a"}',
                'zoneserve_handoff_tail_seconds_sum{role="decode",replica="a"}',
                'zoneserve_pushed_bytes_total{role="prefill",replica="b"}',
            )
        }

    def serve(self, prompt: list[int]) -> None:
        prefix = tuple(prompt[:PREFIX_HASH_TOKENS])
        is_cached = self.caches_prefixes and prefix in self.seen
        self.seen.add(prefix)
        gains = {
            'zoneserve_prompt_tokens_total{origin="decode_cache",role="ingress"}': 992 if is_cached else 0,
            'zoneserve_prompt_tokens_total{origin="prefill_computed",role="ingress"}': len(prompt)
            - (992 if is_cached else 0),
            "zoneserve_time_to_first_token_seconds_sum": 0.25,
            "zoneserve_e2e_request_latency_seconds_count": 1,
        }
        if self.is_disaggregated and not is_cached:
            gains |= {
                'zoneserve_handoff_seconds_count{role="decode",replica="a"}': 1,
                'zoneserve_handoff_seconds_sum{role="decode",replica="a"}': 0.5,
                'zoneserve_handoff_tail_seconds_sum{role="decode",replica="a"}': 0.125,
                'zoneserve_pushed_bytes_total{role="prefill",replica="b"}': 1024,
            }
        for name, gain in gains.items():
            self.counters[name] += gain


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer(json.dumps({"data": [{"id": "m"}]}))
        else:
            self._answer("".join(f"{name} {value}\n" for name, value in self.serving.counters.items()))

    def do_POST(self) -> None:
        assert self.headers["Authorization"] == "Bearer secret"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.serving.serve(body["prompt"])
        self._answer('data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n')

    @property
    def serving(self) -> FakeServing:
        serving: FakeServing = self.server.serving  # type: ignore[attr-defined]
        return serving

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def serving() -> FakeServing:
    return FakeServing()


@pytest.fixture
def probe(serving: FakeServing, tmp_path: Path) -> Iterator[Probe]:
    (tmp_path / "key").write_text("secret\n", encoding="utf-8")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.serving = serving  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        probe = Probe(Server(f"http://127.0.0.1:{server.server_port}", tmp_path / "key"), random.Random(1))
        yield probe
        probe.close()
        server.shutdown()
        thread.join()


def test_request_gets_exactly_what_the_counters_gained(probe: Probe) -> None:
    probe.observe(probe.tokens(8))
    observation = probe.observe(probe.tokens(512))
    assert (observation.num_handoffs, observation.handoff_s, observation.pushed_bytes) == (1, 0.5, 1024)
    assert observation.server_ttft_s == 0.25
    assert observation.prompt_tokens_by_origin == {"decode_cache": 0, "prefill_computed": 512}
    assert 0 < observation.client_ttft_s <= observation.client_e2e_s


def test_prompt_that_was_not_handed_off_is_no_handoff(probe: Probe, serving: FakeServing) -> None:
    serving.is_disaggregated = False
    with pytest.raises(BenchError, match="was not handed off"):
        measure_handoff(probe, 1)


def test_warm_prefix_must_really_be_cached(probe: Probe, serving: FakeServing) -> None:
    serving.caches_prefixes = False
    with pytest.raises(BenchError, match="was not found in a cache"):
        measure_prefix(probe, 1)


def test_cold_prefix_must_really_be_cold(probe: Probe, serving: FakeServing) -> None:
    probe.tokens = lambda count: [1] * count  # type: ignore[method-assign]
    probe.observe([1] * 1024)
    with pytest.raises(BenchError, match="that nobody had sent"):
        measure_prefix(probe, 1)


def test_report_has_every_figure(probe: Probe) -> None:
    figures: Any = report(measure_handoff(probe, 3), *measure_prefix(probe, 2))
    assert figures["handoff_512"]["handoff_ms"] == {"p50": 500.0, "min": 500.0, "max": 500.0}
    assert figures["handoff_512"]["handoff_tail_ms"]["p50"] == 125.0
    assert figures["ttft_shared_prefix_1000"]["n"] == 2
    assert figures["ttft_shared_prefix_1000"]["warm_tokens_by_origin"] == {"decode_cache": 992, "prefill_computed": 32}
    assert json.loads(json.dumps(figures)) == figures


def test_ratio_is_the_median_of_the_pairs() -> None:
    def side(*ttfts_s: float) -> list[Observation]:
        return [Observation(t, t, t, 0, 0.0, 0.0, 1, {}) for t in ttfts_s]

    figures = report(side(1.0), side(2.0, 4.0, 9.0), side(1.0, 1.0, 1.0))
    assert figures["ttft_shared_prefix_1000"]["cold_over_warm"] == 4.0


def test_spread_is_in_milliseconds() -> None:
    assert spread([0.001, 0.003, 0.002]) == {"p50": 2.0, "min": 1.0, "max": 3.0}


def test_exposition_sums_over_replicas_and_splits_by_label() -> None:
    text = """# HELP x_total Things
# TYPE x_total counter
x_total{role="decode",replica="a"} 2.0
x_total{role="decode",replica="b"} 3.0
x_total{role="prefill",note="a \\"quoted\\" one"} 1e1
y 7 1700000000

not a sample
"""
    exposition = Exposition.parse(text)
    assert exposition.total("x_total") == 15.0
    assert exposition.total("x_total", role="decode") == 5.0
    assert exposition.total("y") == 7.0
    assert exposition.total("absent") == 0.0
    assert exposition.by_label("x_total", "role") == {"decode": 5.0, "prefill": 10.0}
