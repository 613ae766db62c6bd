"""Answers in OpenAI's shapes: whole bodies and streamed chunks, one token a chunk."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing

from deployments import openai_api as api
from deployments.generation import Completed, Timeline
from deployments.messages import Provenance, TokenEvent, TokenLogprob
from deployments.reuse import ReuseReport


class ChatShape:
    """chat.completion bodies and chunks."""

    def __init__(self, model: str, token_bytes: api.TokenBytes) -> None:
        self._token_bytes = token_bytes
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._base = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, report: ReuseReport, results: list[Completed]) -> dict[str, object]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text},
                "logprobs": api.chat_logprobs(_logprobs(result), self._token_bytes),
                "finish_reason": result.finish_reason,
            }
            for index, result in enumerate(results)
        ]
        usage = _usage(report, results)
        return self._base | {"object": "chat.completion", "choices": choices, "usage": usage}

    async def chunks(
        self, events: AsyncGenerator[tuple[int, TokenEvent, Timeline], None], report: ReuseReport, include_usage: bool
    ) -> AsyncIterator[Mapping[str, object]]:
        completion_tokens = 0
        provenances: list[Provenance] = []
        started: set[int] = set()
        async with aclosing(events):
            async for index, event, _ in events:
                completion_tokens += len(event.token_ids)
                if event.finish_reason is not None:
                    provenances.append(event.provenance or Provenance())
                if event.token_ids or event.text:
                    delta: dict[str, object] = {"content": event.text}
                    if index not in started:
                        delta = {"role": "assistant", "content": event.text}
                        started.add(index)
                    logprobs = api.chat_logprobs(event.logprobs, self._token_bytes)
                    yield self._chunk(index, delta, None, include_usage, logprobs)
                if event.finish_reason is not None:
                    yield self._chunk(index, {}, event.finish_reason, include_usage, None)
        if include_usage:
            usage = api.usage(report.num_tokens, completion_tokens, report.cached_tokens(provenances))
            yield self._base | {"object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _chunk(
        self, index: int, delta: object, finish_reason: str | None, include_usage: bool, logprobs: object
    ) -> dict[str, object]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if include_usage else {}
        return self._base | {"object": "chat.completion.chunk", "choices": [choice]} | usage


class CompletionShape:
    """text_completion bodies and chunks."""

    def __init__(self, model: str, token_bytes: api.TokenBytes) -> None:
        self._token_bytes = token_bytes
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._base = {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": model}

    def whole(self, report: ReuseReport, results: list[Completed]) -> dict[str, object]:
        choices = [
            {
                "index": index,
                "text": result.text,
                "logprobs": api.CompletionLogprobs(self._token_bytes).take(_logprobs(result)),
                "finish_reason": result.finish_reason,
                "stop_reason": result.stop_reason,
            }
            for index, result in enumerate(results)
        ]
        usage = _usage(report, results)
        return self._base | {"choices": choices, "usage": usage}

    async def chunks(
        self, events: AsyncGenerator[tuple[int, TokenEvent, Timeline], None], report: ReuseReport, include_usage: bool
    ) -> AsyncIterator[Mapping[str, object]]:
        completion_tokens = 0
        provenances: list[Provenance] = []
        logprobs: defaultdict[int, api.CompletionLogprobs] = defaultdict(
            lambda: api.CompletionLogprobs(self._token_bytes)
        )
        async with aclosing(events):
            async for index, event, _ in events:
                completion_tokens += len(event.token_ids)
                if event.finish_reason is not None:
                    provenances.append(event.provenance or Provenance())
                choice = {
                    "index": index,
                    "text": event.text,
                    "logprobs": logprobs[index].take(event.logprobs),
                    "finish_reason": event.finish_reason,
                    "stop_reason": event.stop_reason,
                }
                yield self._base | {"choices": [choice]} | ({"usage": None} if include_usage else {})
        if include_usage:
            usage = api.usage(report.num_tokens, completion_tokens, report.cached_tokens(provenances))
            yield self._base | {"choices": [], "usage": usage}


def _usage(report: ReuseReport, results: list[Completed]) -> dict[str, object]:
    completion_tokens = sum(len(result.token_ids) for result in results)
    return api.usage(report.num_tokens, completion_tokens, report.cached_tokens(r.provenance for r in results))


def _logprobs(result: Completed) -> list[TokenLogprob]:
    return [item for event in result.events for item in event.logprobs]
