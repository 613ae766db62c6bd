"""Clients that leave and replicas that die: an answer or an error within a bound, and nothing left behind."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.calls import is_dead
from deployments.review_client import sample_files
from tests.conformance.greedy import NUM_OUTPUT_TOKENS
from tests.local_deployment import Deployment

pytestmark = [pytest.mark.cluster, pytest.mark.model]

MODEL = "smollm2-135m-instruct"
ANSWER_TIMEOUT_S = 60.0


class Client:
    """A completion over a bare socket, which can be closed at any moment."""

    def __init__(
        self, deployment: Deployment, prompt: tuple[int, ...], max_tokens: int = 200, *, stream: bool = True
    ) -> None:
        body = {
            "model": MODEL,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        self._send(deployment, "/v1/completions", body)

    def _send(self, deployment: Deployment, path: str, document: dict[str, Any], tenant: str = "gamma") -> None:
        body = json.dumps(document).encode()
        address = urlsplit(deployment.url)
        assert address.hostname is not None
        self._socket = socket.create_connection((address.hostname, address.port or 80), timeout=ANSWER_TIMEOUT_S)
        head = [
            f"POST {path} HTTP/1.1",
            f"Host: {address.netloc}",
            f"Authorization: {deployment.headers(tenant)['Authorization']}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        self._socket.sendall("\r\n".join([*head, "", ""]).encode() + body)
        self.received = b""

    def read_until(self, count: int) -> None:
        """Wait for `count` chunks of the stream."""
        while self.received.count(b"data: {") < count:
            data = self._socket.recv(65536)
            assert data, f"the stream ended early: {self.received[-300:]!r}"
            self.received += data

    def read_all(self) -> bytes:
        """The whole answer; fails where it does not end within ANSWER_TIMEOUT_S."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while data := self._socket.recv(65536):
            assert time.monotonic() < deadline, "the answer does not end"
            self.received += data
        self._socket.close()
        return self.received

    def leave(self) -> None:
        # A reset, as from a client that was killed: the peer cannot take it for a half-closed connection.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._socket.close()


class Reviewer(Client):
    """A call for reviews of all sample claims."""

    def __init__(self, deployment: Deployment, *, stream: bool) -> None:
        files = [
            {"name": path.name, "content_base64": base64.b64encode(path.read_bytes()).decode()}
            for path in sample_files()
        ]
        self._send(deployment, "/v1/reviews", {"files": files, "stream": stream}, tenant="alpha")


def long_prompt(greedy_prompts: dict[str, tuple[int, ...]], length: int, shift: int = 0) -> tuple[int, ...]:
    return greedy_prompts["p3000"][shift : shift + length]


def test_a_client_that_leaves_while_decoding_leaves_nothing(clean_deployment: Deployment, greedy_prompts) -> None:
    client = Client(clean_deployment, long_prompt(greedy_prompts, 200))
    client.read_until(4)
    assert clean_deployment.stats("decode")["running"] == 1
    client.leave()
    clean_deployment.assert_clean()


def test_tokens_of_every_stream_arrive_while_the_engine_decodes_and_may_be_left_at_any_of_them(
    clean_deployment: Deployment, greedy_prompts
) -> None:
    """Eight streams at once: none waits for its end, and none leaves anything, whatever was on its way to it."""
    clients = [
        Client(clean_deployment, long_prompt(greedy_prompts, 20, shift=20 * index), max_tokens=400)
        for index in range(8)
    ]
    for client in clients:
        client.read_until(1)
    assert clean_deployment.stats("decode")["running"] == len(clients)
    for index, client in enumerate(clients):
        client.read_until(2 + index)
        client.leave()
    clean_deployment.assert_clean()


def test_a_client_that_leaves_during_prefill_leaves_nothing(clean_deployment: Deployment, greedy_prompts) -> None:
    client = Client(clean_deployment, long_prompt(greedy_prompts, 1500))
    clean_deployment.wait_until(lambda: clean_deployment.stats("prefill")["running"] == 1, 10.0)
    client.leave()
    clean_deployment.assert_clean()


def test_a_client_that_leaves_during_the_push_leaves_nothing(clean_deployment: Deployment, greedy_prompts) -> None:
    before = clean_deployment.stats("prefill")["pushed_blocks"]
    client = Client(clean_deployment, long_prompt(greedy_prompts, 2500))
    clean_deployment.wait_until(lambda: clean_deployment.stats("prefill")["pushed_blocks"] > before, 20.0)
    stats = clean_deployment.stats("decode")
    assert (stats["reserved"], stats["running"]) == (1, 0)
    client.leave()
    clean_deployment.assert_clean()


def test_a_client_that_leaves_the_queue_leaves_nothing(clean_deployment: Deployment, greedy_prompts) -> None:
    """Of the 440 blocks of decode 111 hold shared texts: two reservations fit, the third waits for room."""
    first = Client(clean_deployment, long_prompt(greedy_prompts, 2400))
    second = Client(clean_deployment, long_prompt(greedy_prompts, 2400, shift=100))
    clean_deployment.wait_until(lambda: clean_deployment.stats("decode")["reserved"] == 2, 10.0)
    third = Client(clean_deployment, long_prompt(greedy_prompts, 2400, shift=200))
    clean_deployment.wait_until(lambda: clean_deployment.stats("prefill")["waiting"] == 1, 10.0)
    time.sleep(0.3)  # the third is at the decode replica, without a reservation
    assert clean_deployment.stats("decode")["reserved"] == 2
    for client in (third, second, first):
        client.leave()
    clean_deployment.assert_clean()


def test_a_client_that_does_not_stream_may_leave_too(clean_deployment: Deployment, greedy_prompts) -> None:
    client = Client(clean_deployment, long_prompt(greedy_prompts, 200), stream=False)
    clean_deployment.wait_until(lambda: clean_deployment.stats("decode")["running"] == 1, 10.0)
    client.leave()
    clean_deployment.assert_clean()


@pytest.mark.parametrize("stream", [True, False])
def test_a_reviewer_that_leaves_leaves_nothing(stream: bool, clean_deployment: Deployment) -> None:
    """Reviews run many at once, in every state; those that wait for their turn must not start."""
    client = Reviewer(clean_deployment, stream=stream)
    clean_deployment.wait_until(lambda: clean_deployment.stats("decode")["running"] >= 1, 20.0)
    client.leave()
    clean_deployment.assert_clean()
    time.sleep(1.0)
    assert not clean_deployment.leftovers(), "a review began after its caller had left"


def test_prefill_killed_during_the_push_gives_the_right_answer(
    clean_deployment: Deployment, greedy_prompts, greedy_oracle
) -> None:
    """Decode computes the prompt itself; tokens are those of the oracle, and the fallback is counted."""
    prompt = greedy_prompts["p1000"]
    before = clean_deployment.stats("prefill")["pushed_blocks"]
    counted_before = fallbacks(clean_deployment)
    victim = process_of(clean_deployment, "prefill")
    results: list[Any] = []
    worker = threading.Thread(
        target=lambda: results.append(clean_deployment.generate(prompt, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True))
    )
    worker.start()
    clean_deployment.wait_until(lambda: clean_deployment.stats("prefill")["pushed_blocks"] > before, 20.0)
    os.kill(victim, signal.SIGKILL)
    worker.join(ANSWER_TIMEOUT_S)
    assert not worker.is_alive(), "the request hangs"
    (events,) = results
    assert tuple(token_id for event in events for token_id in event.token_ids) == greedy_oracle["p1000"]
    provenance = events[-1].provenance
    assert provenance.fallback is not None
    assert fallbacks(clean_deployment) - counted_before == Counter({provenance.fallback: 1})
    assert provenance.origins["decode_computed"] == len(prompt)
    clean_deployment.wait_for_recovery()
    clean_deployment.assert_clean(within_s=10.0)
    again = clean_deployment.generate(prompt, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    assert tuple(token_id for event in again for token_id in event.token_ids) == greedy_oracle["p1000"]
    assert again[-1].provenance.pushed_bytes > 0, "disaggregation did not come back"


def test_decode_killed_mid_request_ends_in_an_error_and_comes_back(
    clean_deployment: Deployment, greedy_prompts, greedy_oracle
) -> None:
    (actor,) = actors_of(clean_deployment, "decode")
    client = Client(clean_deployment, long_prompt(greedy_prompts, 300))
    client.read_until(3)
    assert not asyncio.run(is_dead(actor))
    os.kill(process_of(clean_deployment, "decode"), signal.SIGKILL)
    answer = client.read_all()
    clean_deployment.wait_until(lambda: asyncio.run(is_dead(actor)), 10.0)
    assert b"replica_lost" in answer
    assert b'"finish_reason":"stop"' not in answer
    assert b'"finish_reason":"length"' not in answer
    clean_deployment.wait_for_recovery()
    clean_deployment.assert_clean(within_s=10.0)
    prompt = greedy_prompts["p300"]
    events = clean_deployment.generate(prompt, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    assert tuple(token_id for event in events for token_id in event.token_ids) == greedy_oracle["p300"]
    assert events[-1].provenance is not None
    assert events[-1].provenance.pushed_bytes > 0


def test_decode_killed_before_the_first_token_is_answered_or_refused_within_a_bound(
    clean_deployment: Deployment, greedy_prompts
) -> None:
    client = Client(clean_deployment, long_prompt(greedy_prompts, 2000), max_tokens=2)
    clean_deployment.wait_until(lambda: clean_deployment.stats("prefill")["running"] == 1, 10.0)
    os.kill(process_of(clean_deployment, "decode"), signal.SIGKILL)
    answer = client.read_all()
    assert b'"finish_reason":"length"' in answer or b"HTTP/1.1 503" in answer
    clean_deployment.wait_for_recovery()
    clean_deployment.assert_clean(within_s=20.0)


def fallbacks(deployment: Deployment) -> Counter[str]:
    """Counted fallbacks to local prefill by reason."""
    ((_, text),) = deployment.handle("decode").broadcast("metrics_text").results(timeout_s=10.0)
    return Counter(
        {
            sample.labels["reason"]: int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "zoneserve_local_prefill_fallbacks_total"
        }
    )


def actors_of(deployment: Deployment, role: str) -> list[str]:
    """Ray's names of a pool's replicas, as the pool's callers are told."""
    handle = deployment.handle(role)
    deployment.wait_until(handle.running_replicas_populated, 10.0)
    replicas = handle._router._asyncio_router.request_router.curr_replicas.values()
    return [replica.replica_metadata["actor"] for replica in replicas]


def process_of(deployment: Deployment, role: str) -> int:
    (state,) = deployment.handle(role).broadcast("health").results(timeout_s=10.0)
    return int(state["pid"])
