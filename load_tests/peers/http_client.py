"""One open-loop client for every server: requests leave at their moments, whether or not others were answered.

Speaks the completions endpoint that OpenAI's clients know, streamed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

from load_tests.figures import percentile

TIMEOUT_S = 900.0
ERROR_CHARACTERS = 300


class RequestFailed(Exception):
    """A server refused a request or its answer is not whole. The message is the server's."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a contender answers.

    `takes_ids`: prompts go as token ids; as text otherwise. `extra`: fields of the body that this server needs
    to generate all the tokens that are asked for, greedily.
    """

    url: str
    model: str
    takes_ids: bool
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, prompt_ids: Sequence[int], text: str, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(prompt_ids) if self.takes_ids else text,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            **self.extra,
        }


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer as the client saw it, in seconds on one clock. `token_moments_s`: of chunks that carried a token."""

    due_s: float
    token_moments_s: tuple[float, ...]
    num_tokens: int

    @property
    def ttft_s(self) -> float:
        """From the moment the request was due, so that a client that is late hides nothing."""
        return self.token_moments_s[0] - self.due_s

    @property
    def time_per_token_s(self) -> float:
        """Mean after the first token: unlike the gaps it does not change where a server sends tokens in twos."""
        return (self.token_moments_s[-1] - self.token_moments_s[0]) / max(1, self.num_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.token_moments_s)]


def send_all(endpoint: Endpoint, bodies: Sequence[Mapping[str, Any]], arrivals_s: Sequence[float]) -> list[Stream]:
    """Send body i at moment i, in seconds from now, and read all answers to their ends.

    Raises:
        RequestFailed: One of them failed; aiohttp.ClientError: or its connection did.
    """
    return asyncio.run(_send_all(endpoint, bodies, arrivals_s))


async def _send_all(
    endpoint: Endpoint, bodies: Sequence[Mapping[str, Any]], arrivals_s: Sequence[float]
) -> list[Stream]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)  # an open loop queues nothing at the client
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=dict(endpoint.headers)) as session:
        start_s = time.perf_counter()
        tasks = [
            asyncio.create_task(_send(session, endpoint, body, start_s + arrival_s))
            for body, arrival_s in zip(bodies, arrivals_s, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()


async def _send(session: aiohttp.ClientSession, endpoint: Endpoint, body: Mapping[str, Any], due_s: float) -> Stream:
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    moments: list[float] = []
    reported: int | None = None
    is_done = False
    async with session.post(f"{endpoint.url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RequestFailed(f"status {response.status}: {(await response.text())[:ERROR_CHARACTERS]}")
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                is_done = True
                continue
            event = json.loads(data)
            if "error" in event:
                raise RequestFailed(str(event["error"])[:ERROR_CHARACTERS])
            if usage := event.get("usage"):
                reported = usage["completion_tokens"]
            if carries_token(event):
                moments.append(time.perf_counter())
    if not is_done or not moments:
        raise RequestFailed("the stream ended early")
    return Stream(due_s, tuple(moments), len(moments) if reported is None else reported)


def carries_token(event: Mapping[str, Any]) -> bool:
    """Whether a chunk brings an answer on: text, or a token whose text is held back until it is a whole character.

    Chunks that only end an answer or count it do not.
    """
    choices = event.get("choices") or ()
    return any(choice.get("text") or choice.get("finish_reason") is None for choice in choices)


def figures_of(streams: Sequence[Stream]) -> dict[str, float]:
    """Tokens a second from the first moment to the last token; times in milliseconds."""
    began_s = min(stream.due_s for stream in streams)
    ended_s = max(stream.token_moments_s[-1] for stream in streams)
    ttfts_s = [stream.ttft_s for stream in streams]
    gaps_s = [gap for stream in streams for gap in stream.gaps_s]
    times_per_token_s = [stream.time_per_token_s for stream in streams]
    return {
        "output_tokens_per_s": sum(stream.num_tokens for stream in streams) / (ended_s - began_s),
        "ttft_p50_ms": percentile(ttfts_s, 0.5) * 1e3,
        "ttft_p99_ms": percentile(ttfts_s, 0.99) * 1e3,
        "tpot_p50_ms": percentile(times_per_token_s, 0.5) * 1e3,
        "tpot_p99_ms": percentile(times_per_token_s, 0.99) * 1e3,
        "itl_p50_ms": percentile(gaps_s, 0.5) * 1e3,
        "itl_p99_ms": percentile(gaps_s, 0.99) * 1e3,
    }
