"""What the audit sees of a deployment: answers and their time, and two counters. Speaks HTTP only."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import yaml

from load_tests.exposition import Exposition
from load_tests.local import LOCAL_CONFIG, Server, local_server

# The victim and the insider own the same case: the control, in which sharing is right. The others are strangers to it
# and to one another. Only the victim's tenant has a floor.
VICTIM, INSIDER, ATTACKER, BYSTANDER = "victim", "insider", "attacker", "bystander"
PRINCIPALS = (
    {"principal": VICTIM, "tenant": "acme", "zone": "tenant/acme/case/claim"},
    {"principal": INSIDER, "tenant": "acme", "zone": "tenant/acme/case/claim"},
    {"principal": ATTACKER, "tenant": "beta", "zone": "tenant/beta/case/claim"},
    {"principal": BYSTANDER, "tenant": "gamma", "zone": "tenant/gamma/case/claim"},
)
QUOTAS = {"tenants": {"acme": {"floor": 0.25}}}  # of each pool
POOLS = ("prefill", "decode")
SMALL_POOL_BLOCKS = 512
SMALL_MODEL_LEN = 2048

# The second token comes when the prompt's blocks have landed on decode: after the answer both pools hold them.
MAX_TOKENS = 2
REQUEST_TIMEOUT_S = 120.0
FINISHED_COUNT = "zoneserve_e2e_request_latency_seconds_count"
CACHED_ORIGINS = ("decode_cache", "prefill_cache")
COUNTED_WITHIN_S = 10.0
COUNTED_POLL_S = 0.05


class AuditError(Exception):
    """The audit could not be carried out. The message says what happened instead."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Totals since the deployment's start."""

    cached_tokens: int  # prompt tokens whose KV was found, on either side
    evicted_blocks: Mapping[str, int]  # by pool


class System(Protocol):
    """A deployment under audit. Calls end when their answer is whole, so what is asked next meets an idle machine."""

    pool_tokens: Mapping[str, int]  # how many tokens' KV each pool holds

    def ask(self, caller: str, text: str) -> float:
        """Send a chat of one message; returns its TTFT in seconds."""
        ...

    def flood(self, caller: str, prompts: Sequence[Sequence[int]]) -> None:
        """Send completions of these token ids, all at the same time."""
        ...

    def counts(self) -> Counts:
        """With all that was asked before counted."""
        ...


class HttpSystem:
    """A deployment over HTTP. Not for two threads at once."""

    def __init__(self, server: Server, pool_tokens: Mapping[str, int]) -> None:
        self.pool_tokens = pool_tokens
        self._client = httpx.Client(base_url=server.url, timeout=REQUEST_TIMEOUT_S)
        self._headers = {entry["principal"]: server.headers_of(entry["principal"]) for entry in PRINCIPALS}
        self._num_sent = 0
        models = self._client.get("/v1/models", headers=server.headers).raise_for_status()
        self._model = models.json()["data"][0]["id"]
        self._num_finished_before = self._scrape().total(FINISHED_COUNT)

    def close(self) -> None:
        self._client.close()

    def ask(self, caller: str, text: str) -> float:
        body = {"messages": [{"role": "user", "content": text}]}
        self._num_sent += 1
        return self._stream(caller, "/v1/chat/completions", body)

    def flood(self, caller: str, prompts: Sequence[Sequence[int]]) -> None:
        self._num_sent += len(prompts)
        with ThreadPoolExecutor(len(prompts)) as callers:
            list(callers.map(lambda prompt: self._stream(caller, "/v1/completions", {"prompt": prompt}), prompts))

    def counts(self) -> Counts:
        wanted = self._num_finished_before + self._num_sent
        deadline = time.monotonic() + COUNTED_WITHIN_S
        while (scrape := self._scrape()).total(FINISHED_COUNT) < wanted:
            if time.monotonic() > deadline:
                raise AuditError(f"{FINISHED_COUNT} did not reach {wanted:g} within {COUNTED_WITHIN_S:.0f} s")
            time.sleep(COUNTED_POLL_S)
        origins = scrape.by_label("zoneserve_prompt_tokens_total", "origin")
        evictions = scrape.by_label("zoneserve_evictions_total", "role")
        return Counts(
            round(sum(origins.get(origin, 0.0) for origin in CACHED_ORIGINS)),
            {role: round(count) for role, count in evictions.items()},
        )

    def _scrape(self) -> Exposition:
        return Exposition.parse(self._client.get("/metrics").raise_for_status().text)

    def _stream(self, caller: str, path: str, body: Mapping[str, Any]) -> float:
        asked = {"model": self._model, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        first: float | None = None
        is_done = False
        started = time.perf_counter()
        with self._client.stream("POST", path, json={**asked, **body}, headers=self._headers[caller]) as response:
            if response.status_code != httpx.codes.OK:
                raise AuditError(f"{caller}: status {response.status_code}")
            for line in response.iter_lines():
                if first is None and line.startswith("data: "):
                    first = time.perf_counter() - started
                if line.startswith("data: {") and "error" in json.loads(line.removeprefix("data: ")):
                    raise AuditError(f"{caller}: the answer ended with an error")
                is_done = is_done or line == "data: [DONE]"
        if first is None or not is_done:
            raise AuditError(f"{caller}: the answer ended early")
        return first


@contextmanager
def shipped_system(directory: Path) -> Iterator[HttpSystem]:
    """The local configuration as it is: two pools, the native backend, no quotas."""
    with _started(directory, _local_settings(), {}) as system:
        yield system


@contextmanager
def small_system(directory: Path) -> Iterator[HttpSystem]:
    """The same with pools that a flood of seconds fills, and a floor for the victim's tenant."""
    settings = _local_settings()
    settings["model"]["max_model_len"] = SMALL_MODEL_LEN
    for role in POOLS:
        settings[role]["num_blocks"] = SMALL_POOL_BLOCKS
    with _started(directory, settings, {"quotas": QUOTAS}) as system:
        yield system


def _local_settings() -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(LOCAL_CONFIG.read_text(encoding="utf-8"))
    return settings


@contextmanager
def _started(directory: Path, settings: Mapping[str, Any], trust: Mapping[str, Any]) -> Iterator[HttpSystem]:
    directory.mkdir(parents=True, exist_ok=True)
    source = directory / "source.yaml"
    source.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    pool_tokens = {role: settings[role]["num_blocks"] * settings["engine"]["block_size"] for role in POOLS}
    with local_server(directory, config=source, principals=PRINCIPALS, trust=trust) as server:
        system = HttpSystem(server, pool_tokens)
        try:
            yield system
        finally:
            system.close()
