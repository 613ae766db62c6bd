"""`make bench`: the engine alone, then a local deployment over HTTP. Prints tables and, last, one line of JSON.

Over HTTP, one request at a time, prompts of random token ids so that their length is exact:
handoff of a 512-token prompt, and TTFT with a cold and a warm shared prefix of 1,000 tokens.
Each handoff time is the difference of two scrapes around one request, so it is exact, not read from buckets.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from load_tests.exposition import Exposition
from load_tests.local import ROOT, Server, ServerError, local_server

OUT = Path("out")
HANDOFF_PROMPT_TOKENS = 512
SHARED_PREFIX_TOKENS = 1000
SUFFIX_TOKENS = 24
OUTPUT_TOKENS = 8
NUM_HANDOFFS = 15
NUM_PREFIXES = 7
TOKEN_IDS = range(1000, 20000)  # ordinary tokens in every vocabulary we serve
REQUEST_TIMEOUT_S = 120.0
FINISHED_COUNT = "zoneserve_e2e_request_latency_seconds_count"
COUNTED_WITHIN_S = 5.0
COUNTED_POLL_S = 0.05
CACHED_ORIGINS = ("decode_cache", "prefill_cache")


class BenchError(Exception):
    """A measurement did not measure what it says. The message tells what happened instead."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One request, seen from both sides."""

    client_ttft_s: float
    client_e2e_s: float
    server_ttft_s: float
    num_handoffs: int
    handoff_s: float  # reservation on decode to verified landing: the prefill is inside
    handoff_tail_s: float  # first token to verified landing: what the transfer adds
    pushed_bytes: int
    prompt_tokens_by_origin: dict[str, int]


class Probe:
    """Sends one request at a time and attributes to it what the counters gained."""

    def __init__(self, server: Server, rng: random.Random) -> None:
        self._client = httpx.Client(base_url=server.url, headers=server.headers, timeout=REQUEST_TIMEOUT_S)
        self._rng = rng
        self._model = self._client.get("/v1/models").raise_for_status().json()["data"][0]["id"]

    def close(self) -> None:
        self._client.close()

    def tokens(self, count: int) -> list[int]:
        return [self._rng.choice(TOKEN_IDS) for _ in range(count)]

    def observe(self, prompt: list[int]) -> Observation:
        before = self._scrape()
        ttft_s, e2e_s = self._complete(prompt)
        after = self._scrape_once_counted(before)

        def gained(name: str) -> float:
            return after.total(name) - before.total(name)

        old = before.by_label("zoneserve_prompt_tokens_total", "origin")
        new = after.by_label("zoneserve_prompt_tokens_total", "origin")
        return Observation(
            client_ttft_s=ttft_s,
            client_e2e_s=e2e_s,
            server_ttft_s=gained("zoneserve_time_to_first_token_seconds_sum"),
            num_handoffs=round(gained("zoneserve_handoff_seconds_count")),
            handoff_s=gained("zoneserve_handoff_seconds_sum"),
            handoff_tail_s=gained("zoneserve_handoff_tail_seconds_sum"),
            pushed_bytes=round(gained("zoneserve_pushed_bytes_total")),
            prompt_tokens_by_origin={origin: round(count - old.get(origin, 0.0)) for origin, count in new.items()},
        )

    def _scrape(self) -> Exposition:
        return Exposition.parse(self._client.get("/metrics").raise_for_status().text)

    def _scrape_once_counted(self, before: Exposition) -> Exposition:
        """The request's last counters move just after its last byte; wait for them."""
        wanted = before.total(FINISHED_COUNT) + 1
        deadline = time.monotonic() + COUNTED_WITHIN_S
        while (after := self._scrape()).total(FINISHED_COUNT) < wanted:
            if time.monotonic() > deadline:
                raise BenchError(f"{FINISHED_COUNT} did not count the request within {COUNTED_WITHIN_S:.0f} s")
            time.sleep(COUNTED_POLL_S)
        return after

    def _complete(self, prompt: list[int]) -> tuple[float, float]:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        started = time.perf_counter()
        first: float | None = None
        is_done = False
        with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise BenchError(f"status {response.status_code}: {response.read().decode(errors='replace')[:300]}")
            for line in response.iter_lines():
                if first is None and line.startswith("data: "):
                    first = time.perf_counter() - started
                if line.startswith('data: {"error"'):
                    raise BenchError(line)
                is_done = is_done or line == "data: [DONE]"
        if first is None or not is_done:
            raise BenchError("the stream ended early")
        return first, time.perf_counter() - started


def measure_handoff(probe: Probe, count: int) -> list[Observation]:
    """Prompts that nobody holds: each must be pushed from prefill to decode."""
    seen = [probe.observe(probe.tokens(HANDOFF_PROMPT_TOKENS)) for _ in range(count)]
    for observation in seen:
        if observation.num_handoffs != 1 or observation.pushed_bytes <= 0:
            raise BenchError(f"a prompt of {HANDOFF_PROMPT_TOKENS} tokens was not handed off: {observation}")
    return seen


def measure_prefix(probe: Probe, count: int) -> tuple[list[Observation], list[Observation]]:
    """(cold, warm) pairs, taken in turn: the same prefix with another suffix, before and after it is cached."""
    cold, warm = [], []
    for _ in range(count):
        prefix = probe.tokens(SHARED_PREFIX_TOKENS)
        cold.append(probe.observe(prefix + probe.tokens(SUFFIX_TOKENS)))
        warm.append(probe.observe(prefix + probe.tokens(SUFFIX_TOKENS)))
    if any(cached_tokens(observation) for observation in cold):
        raise BenchError("a prefix that nobody had sent was found in a cache")
    if not all(cached_tokens(observation) >= SHARED_PREFIX_TOKENS * 0.9 for observation in warm):
        raise BenchError(f"a prefix that had been sent was not found in a cache: {warm[-1].prompt_tokens_by_origin}")
    return cold, warm


def cached_tokens(observation: Observation) -> int:
    return sum(observation.prompt_tokens_by_origin.get(origin, 0) for origin in CACHED_ORIGINS)


def spread(values: Sequence[float], scale: float = 1000.0) -> dict[str, float]:
    """Median, least and greatest, in milliseconds unless scaled otherwise."""
    return {
        "p50": round(statistics.median(values) * scale, 2),
        "min": round(min(values) * scale, 2),
        "max": round(max(values) * scale, 2),
    }


def report(handoffs: Sequence[Observation], cold: Sequence[Observation], warm: Sequence[Observation]) -> dict[str, Any]:
    """The figures of the HTTP part."""
    cold_s, warm_s = ([o.client_ttft_s for o in side] for side in (cold, warm))
    return {
        "handoff_512": {
            "n": len(handoffs),
            "handoff_ms": spread([o.handoff_s for o in handoffs]),
            "handoff_tail_ms": spread([o.handoff_tail_s for o in handoffs]),
            "client_ttft_ms": spread([o.client_ttft_s for o in handoffs]),
            "pushed_bytes": handoffs[0].pushed_bytes,
        },
        "ttft_shared_prefix_1000": {
            "n": len(cold),
            "cold_client_ms": spread(cold_s),
            "warm_client_ms": spread(warm_s),
            "cold_server_ms": spread([o.server_ttft_s for o in cold]),
            "warm_server_ms": spread([o.server_ttft_s for o in warm]),
            "cold_over_warm": round(statistics.median(c / w for c, w in zip(cold_s, warm_s, strict=True)), 2),
            "cold_tokens_by_origin": cold[-1].prompt_tokens_by_origin,
            "warm_tokens_by_origin": warm[-1].prompt_tokens_by_origin,
        },
    }


def run_engine_bench() -> dict[str, Any]:
    """Run the engine's own bench; its table goes to our output, its last line is the figures.

    Raises:
        BenchError: It failed, or its last line is no JSON object.
    """
    command = [sys.executable, "-m", "load_tests.bench_engine"]
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if last:
                print(last, flush=True)
            last = line.rstrip("\n")
    if process.returncode:
        raise BenchError(f"load_tests.bench_engine ended with status {process.returncode}: {last}")
    try:
        figures = json.loads(last)
    except ValueError as error:
        raise BenchError(f"the last line of load_tests.bench_engine is no JSON: {last[:200]}") from error
    if not isinstance(figures, dict):
        raise BenchError("the last line of load_tests.bench_engine is no JSON object")
    return figures


def run_http_bench(directory: Path, seed: int) -> dict[str, Any]:
    """Start a local deployment, measure, end it."""
    with local_server(directory) as server:
        probe = Probe(server, random.Random(seed))
        try:
            probe.observe(probe.tokens(HANDOFF_PROMPT_TOKENS))  # connections and first-use costs, not counted
            handoffs = measure_handoff(probe, NUM_HANDOFFS)
            cold, warm = measure_prefix(probe, NUM_PREFIXES)
        finally:
            probe.close()
    return report(handoffs, cold, warm)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the engine and a local deployment.")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip-engine", action="store_true", help="only the part over HTTP")
    options = parser.parse_args()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        figures: dict[str, Any] = {} if options.skip_engine else {"engine": run_engine_bench()}
        figures |= run_http_bench(options.out / "bench", options.seed)
    except (BenchError, ServerError, httpx.HTTPError) as error:
        console.print(f"bench: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    _print_table(console, figures)
    line = json.dumps(figures)
    (options.out / "bench.json").write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


def _print_table(console: Console, figures: dict[str, Any]) -> None:
    handoff, prefix = figures["handoff_512"], figures["ttft_shared_prefix_1000"]
    table = Table("over HTTP, one request at a time", "n", "p50 ms", "min ms", "max ms")
    rows = (
        (f"handoff of {HANDOFF_PROMPT_TOKENS} prompt tokens, prefill included", handoff["n"], handoff["handoff_ms"]),
        ("of it after the first token", handoff["n"], handoff["handoff_tail_ms"]),
        (f"TTFT of {HANDOFF_PROMPT_TOKENS} prompt tokens, client", handoff["n"], handoff["client_ttft_ms"]),
        (f"TTFT, {SHARED_PREFIX_TOKENS}-token prefix cold, client", prefix["n"], prefix["cold_client_ms"]),
        (f"TTFT, {SHARED_PREFIX_TOKENS}-token prefix warm, client", prefix["n"], prefix["warm_client_ms"]),
        (f"TTFT, {SHARED_PREFIX_TOKENS}-token prefix cold, server", prefix["n"], prefix["cold_server_ms"]),
        (f"TTFT, {SHARED_PREFIX_TOKENS}-token prefix warm, server", prefix["n"], prefix["warm_server_ms"]),
    )
    for name, count, values in rows:
        table.add_row(name, str(count), *(f"{values[key]:.1f}" for key in ("p50", "min", "max")))
    console.print(table)
    origins = ", ".join(f"{name} {count}" for name, count in prefix["warm_tokens_by_origin"].items())
    console.print(f"cold / warm TTFT: {prefix['cold_over_warm']:.2f}", highlight=False)
    console.print(f"KV pushed a handoff: {handoff['pushed_bytes']:,} bytes", highlight=False)
    console.print(f"prompt tokens of a warm request: {origins}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
