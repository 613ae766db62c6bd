"""Chat and review users for Locust. Streaming users record TTFT and ITL as request types of their own.

A run against a deployment that is up:
    locust -f load_tests/locustfile.py --host http://127.0.0.1:8000 --bearer-key-file out/local-key
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locust import HttpUser, between, events, task

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "deployments" / "claims" / "samples"
REQUEST_TIMEOUT_S = 300.0
MAX_TOKENS = 32

SUBJECTS = ("an office visit", "a chest X-ray", "a knee arthroscopy", "a blood panel", "a physical therapy session")
QUESTIONS = (
    "What would a reviewer check first for {subject} billed with {units} units?",
    "Explain in one sentence why {units} units of {subject} on one day may be questioned.",
    "List two documents that support a claim for {subject} on line {units}.",
)
BACKGROUND = "The claim was received on time and the member was eligible on the date of service. "


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    parser.add_argument(
        "--bearer-key-file",
        env_var="ZONESERVE_KEY_FILE",
        default="out/local-key",
        help="file that holds the bearer key",
    )
    parser.add_argument("--summary-json", default="", help="file for the final figures, one entry a request type")


@events.quitting.add_listener
def _write_summary(environment: Any, **_: Any) -> None:
    """Locust's own CSV misses what ends while it stops; this is written last."""
    path = environment.parsed_options.summary_json
    if not path:
        return
    entries = [
        {
            "type": entry.method,
            "name": entry.name,
            "requests": entry.num_requests,
            "failures": entry.num_failures,
            "per_second": round(entry.total_rps, 3),
            "p50_ms": entry.get_response_time_percentile(0.5),
            "p95_ms": entry.get_response_time_percentile(0.95),
            "max_ms": round(entry.max_response_time, 1),
        }
        for entry in environment.stats.entries.values()
    ]
    Path(path).write_text(json.dumps(entries), encoding="utf-8")


class ZoneserveUser(HttpUser):
    """What every user needs: the key, the served model's name, a random source."""

    abstract = True
    wait_time = between(0.1, 0.5)

    def on_start(self) -> None:
        options = self.environment.parsed_options
        key = Path(options.bearer_key_file).read_text(encoding="utf-8").strip()
        self.client.headers["Authorization"] = f"Bearer {key}"
        self.random = random.Random()
        self.model = self.client.get("/v1/models", timeout=REQUEST_TIMEOUT_S).json()["data"][0]["id"]

    def chat_body(self, *, stream: bool) -> dict[str, Any]:
        """A question of 50 to 600 tokens."""
        question = self.random.choice(QUESTIONS).format(
            subject=self.random.choice(SUBJECTS), units=self.random.randint(2, 9)
        )
        content = f"{BACKGROUND * self.random.randint(1, 30)}{question}"
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0.7,
            "stream": stream,
        }


class StreamingChatUser(ZoneserveUser):
    """Reads tokens as they come."""

    weight = 3

    @task
    def chat(self) -> None:
        started = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions",
            json=self.chat_body(stream=True),
            name="chat, streamed",
            stream=True,
            catch_response=True,
            timeout=REQUEST_TIMEOUT_S,
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text[:200]}")
                return
            fault = self._read(response.iter_lines(), started)
            # Locust stopped its clock at the headers; the request ends with its last token.
            response.request_meta["response_time"] = (time.perf_counter() - started) * 1000
            if fault:
                response.failure(fault)
            else:
                response.success()

    def _read(self, lines: Iterator[bytes], started: float) -> str | None:
        """Follow the stream to its end; returns what is wrong with it."""
        previous, finish_reason, is_done = started, None, False
        num_tokens = 0
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]":
                is_done = True
                break
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                return f"error event: {event['error'].get('message')}"
            choice = event["choices"][0]
            finish_reason = choice["finish_reason"] or finish_reason
            if "content" in choice["delta"]:
                now = time.perf_counter()
                self._record("TTFT" if num_tokens == 0 else "ITL", now - previous)
                previous, num_tokens = now, num_tokens + 1
        if not is_done:
            return "the stream ended without [DONE]"
        if num_tokens == 0 or finish_reason not in {"stop", "length"}:
            return f"{num_tokens} tokens, finish reason {finish_reason}"
        return None

    def _record(self, kind: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name="chat, streamed",
            response_time=seconds * 1000,
            response_length=0,
            exception=None,
            context={},
        )


class ChatUser(ZoneserveUser):
    """Waits for the whole answer."""

    weight = 2

    @task
    def chat(self) -> None:
        with self.client.post(
            "/v1/chat/completions",
            json=self.chat_body(stream=False),
            name="chat",
            catch_response=True,
            timeout=REQUEST_TIMEOUT_S,
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text[:200]}")
            elif not response.json()["usage"]["completion_tokens"]:
                response.failure("no tokens")


class ReviewUser(ZoneserveUser):
    """Sends one shipped sample claim after another."""

    weight = 1

    def on_start(self) -> None:
        super().on_start()
        self.claims = [path.read_text(encoding="utf-8") for path in sorted(SAMPLES.glob("*.edi"))]
        self.random.shuffle(self.claims)
        self.num_sent = 0

    @task
    def review(self) -> None:
        claim = self.claims[self.num_sent % len(self.claims)]
        self.num_sent += 1
        with self.client.post(
            "/v1/reviews", json={"x12": claim}, name="review", catch_response=True, timeout=REQUEST_TIMEOUT_S
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text[:200]}")
            elif not response.json()["reviews"]:
                response.failure(f"nothing reviewed: {str(response.json()['dispositions'])[:200]}")
