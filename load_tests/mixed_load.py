"""An open-loop load of reviews, chats and completions: arrivals do not wait for answers. Speaks HTTP only.

A plan is drawn from its seed alone, so that two deployments can be sent the very same requests at the same moments.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from load_tests.local import ROOT, Server

SAMPLES = ROOT / "deployments" / "claims" / "samples"
WEIGHTS = {"chat": 3, "completion": 2, "review": 1}  # by arrivals, as the Locust users have them
CHAT_BACKGROUND = "The claim was received on time and the member was eligible on the date of service. "
CHAT_SENTENCES = range(1, 31)  # a question of 60 to 600 tokens
CHAT_OUTPUT_TOKENS = (16, 32, 64)
COMPLETION_PROMPT_TOKENS = (64, 256, 512, 1024)
COMPLETION_OUTPUT_TOKENS = (32, 64, 128)
TOKEN_IDS = range(1000, 20000)  # ordinary tokens in every vocabulary we serve
CLAIM_ID_PREFIX = "SYNTH-"  # of the sample claims; nothing else in the files carries it
DRAIN_S = 60.0  # an answer that takes longer after the last arrival counts as failed


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a plan. `at_s`: after the plan's start. `headers`: of a caller other than the server's first."""

    at_s: float
    kind: str
    path: str
    body: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """One sequence as its caller saw it; a request for reviews has one for each claim.

    `ttft_s` counts from the moment the plan names, late sending included; of a review it is the ingress's own figure.
    `gaps_s`: between tokens; of a review, whose tokens the caller does not see one by one, the mean gap alone.
    `fault`: why there is no whole answer.
    """

    kind: str
    ttft_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    num_tokens: int = 0
    fault: str | None = None


def plan_arrivals(seed: int, *, rate_per_s: float, duration_s: float, model: str) -> list[Arrival]:
    """Poisson arrivals of `rate_per_s` over `duration_s`, kinds by `WEIGHTS`, no prompt twice."""
    rng = random.Random(seed)
    claims = [path.read_text(encoding="utf-8") for path in sorted(SAMPLES.glob("*.edi"))]
    arrivals: list[Arrival] = []
    at_s = rng.expovariate(rate_per_s)
    while at_s < duration_s:
        (kind,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        label = f"{seed}-{len(arrivals)}"
        if kind == "review":  # a claim of its own, so that only its policy can be in a cache
            text = rng.choice(claims).replace(CLAIM_ID_PREFIX, f"S{label}-")
            arrivals.append(Arrival(at_s, kind, "/v1/reviews", {"x12": text, "stream": True}))
        else:
            body = _chat(rng, label) if kind == "chat" else _completion(rng)
            path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
            body |= {"model": model, "stream": True, "ignore_eos": True, "seed": rng.randrange(1 << 30)}
            arrivals.append(Arrival(at_s, kind, path, body))
        at_s += rng.expovariate(rate_per_s)
    return arrivals


def _chat(rng: random.Random, label: str) -> dict[str, Any]:
    question = f"What would a reviewer check first for {rng.randint(2, 9)} units on one day?"
    content = f"Claim {label}. {CHAT_BACKGROUND * rng.choice(CHAT_SENTENCES)}{question}"
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": rng.choice(CHAT_OUTPUT_TOKENS), "temperature": 0.7}


def _completion(rng: random.Random) -> dict[str, Any]:
    prompt = rng.choices(TOKEN_IDS, k=rng.choice(COMPLETION_PROMPT_TOKENS))
    return {"prompt": prompt, "max_tokens": rng.choice(COMPLETION_OUTPUT_TOKENS), "temperature": 0}


async def send_plan(server: Server, plan: Sequence[Arrival]) -> list[Answer]:
    """Send each request at its moment, wait for all answers."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    started = time.perf_counter()
    last_s = max((arrival.at_s for arrival in plan), default=0.0)
    async with httpx.AsyncClient(
        base_url=server.url, headers=server.headers, timeout=last_s + DRAIN_S, limits=limits
    ) as client:
        answers = await asyncio.gather(
            *(_send(client, arrival, started, started + last_s + DRAIN_S) for arrival in plan)
        )
    return [answer for sequences in answers for answer in sequences]


async def _send(client: httpx.AsyncClient, arrival: Arrival, started: float, deadline: float) -> list[Answer]:
    due = started + arrival.at_s
    await asyncio.sleep(due - time.perf_counter())
    try:
        async with asyncio.timeout(deadline - time.perf_counter()):
            async with client.stream("POST", arrival.path, json=arrival.body, headers=arrival.headers) as response:
                if response.status_code != httpx.codes.OK:
                    return [Answer(arrival.kind, fault=f"status {response.status_code}")]
                if arrival.kind == "review":
                    return [review_answer(event) async for event in _events(response) if event["type"] == "review"]
                return [await _stream_answer(arrival.kind, _events(response), due)]
    except (TimeoutError, httpx.HTTPError, ValueError) as error:
        return [Answer(arrival.kind, fault=type(error).__name__)]


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """
    Raises:
        ValueError: An error event, or an end without [DONE].
    """
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError("error event")
            yield event
    raise ValueError("the stream ended early")


async def _stream_answer(kind: str, events: AsyncIterator[dict[str, Any]], due: float) -> Answer:
    times_s: list[float] = []
    async for event in events:
        choice = event["choices"][0]
        if "text" in choice or "content" in choice["delta"]:  # one token a chunk
            times_s.append(time.perf_counter())
    if not times_s:
        return Answer(kind, fault="no tokens")
    gaps_s = tuple(later - earlier for earlier, later in pairwise(times_s))
    return Answer(kind, times_s[0] - due, gaps_s, len(times_s))


def review_answer(event: dict[str, Any]) -> Answer:
    """A `review` event as an answer; a review in which the model abstained has a fault."""
    serving = event["serving"]
    num_tokens, ttft_s, e2e_s = serving["completion_tokens"], serving["ttft_s"], serving["e2e_s"]
    if ttft_s is None or e2e_s is None or not num_tokens:
        return Answer("review", fault=f"finish reason {serving['finish_reason']}")
    gaps_s = ((e2e_s - ttft_s) / (num_tokens - 1),) if num_tokens > 1 else ()
    return Answer("review", ttft_s, gaps_s, num_tokens)
