"""From a tokenised, labelled prompt to token events: admission, choices, timeline, metrics."""

from __future__ import annotations

import asyncio
import hmac
import struct
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from deployments.client import DecodeClient
from deployments.config import ZoneserveConfig
from deployments.errors import BadRequest, InternalFault, OverCapacity
from deployments.messages import GenerateCall, Provenance, TokenEvent
from deployments.metrics import IngressMetrics
from deployments.routing.admission import Admission
from deployments.trust.epochs import EpochStore, stamped
from deployments.trust.zone_grant import GrantSealer
from engine.request import SamplingParams
from engine.zone import ZoneKind, ZoneSpan, joined_zone


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """Token ids and the zone of each."""

    token_ids: tuple[int, ...]
    zone_spans: tuple[ZoneSpan, ...]


@dataclass(slots=True)
class Timeline:
    """Seconds, on one clock, of one choice as the client sees it."""

    arrival: float
    first_token: float | None = None
    last_token: float | None = None
    num_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def e2e_s(self) -> float | None:
        return None if self.last_token is None else self.last_token - self.arrival


@dataclass(slots=True)
class Completed:
    """A whole generation, for callers that do not stream."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    provenance: Provenance = field(default_factory=Provenance)
    timeline: Timeline = field(default_factory=lambda: Timeline(0.0))


class GenerationService:
    """Generates for authenticated callers; every entry is admitted or refused first."""

    def __init__(
        self,
        *,
        client: DecodeClient,
        config: ZoneserveConfig,
        affinity_key: bytes,
        grants: GrantSealer,
        metrics: IngressMetrics,
        epochs: EpochStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`epochs`: of the zones; None: nothing is ever purged."""
        self._client = client
        self._config = config
        self._affinity_key = affinity_key
        self._grants = grants
        self._epochs = epochs or EpochStore(None)
        self._metrics = metrics
        self._clock = clock
        self._admission = Admission(config.routing.max_inflight_requests, clock)

    @property
    def num_inflight(self) -> int:
        return self._admission.num_inflight

    def rotate(self, affinity_key: bytes, grant_keys: Sequence[bytes]) -> None:
        """Take new keys for the calls to come; those of grants newest first. Raises ValueError."""
        self._grants.set_keys(grant_keys)
        self._affinity_key = affinity_key

    def token_limit(self, prompt_tokens: int, asked: int | None) -> int:
        """Output tokens a request may have.

        Raises:
            BadRequest: The prompt, or the prompt and what was asked for, exceed the context.
        """
        longest = self._config.model.max_model_len
        room = longest - prompt_tokens
        if room < 1:
            raise BadRequest(f"the prompt has {prompt_tokens} tokens; the context holds {longest}")
        if asked is not None and asked > room:
            raise BadRequest(
                f"max_tokens {asked} with a prompt of {prompt_tokens} tokens exceeds the context of {longest}",
                param="max_tokens",
            )
        return asked or room

    async def stream(
        self, prompt: TokenisedPrompt, choices: Sequence[SamplingParams], arrival: float, *, tenant: str = ""
    ) -> AsyncGenerator[tuple[int, TokenEvent, Timeline], None]:
        """Events of all choices as they come, each with its choice's index.

        `tenant`: the caller's, on whose behalf blocks are evicted; empty: the one that the prompt's zones name.

        Raises:
            ValueError: A zone of the prompt belongs to another tenant.
            OverCapacity: Too much in flight; nothing was started.
            ServeError: As `DecodeClient.generate`.
        """
        if not self._admission.admit(len(choices)):
            raise OverCapacity("too many requests in flight", retry_after_s=self._admission.retry_after_s())
        try:
            if len(choices) == 1:
                async with aclosing(self._choice(prompt, choices[0], arrival, tenant)) as events:
                    async for event, timeline in events:
                        yield 0, event, timeline
            else:
                async with aclosing(self._merged(prompt, choices, arrival, tenant)) as items:
                    async for item in items:
                        yield item
        finally:
            self._admission.finish(len(choices))

    async def complete(
        self, prompt: TokenisedPrompt, choices: Sequence[SamplingParams], arrival: float, *, tenant: str = ""
    ) -> list[Completed]:
        """All choices, whole. Arguments and errors as `stream`."""
        results = [Completed() for _ in choices]
        async with aclosing(self.stream(prompt, choices, arrival, tenant=tenant)) as items:
            async for index, event, timeline in items:
                result = results[index]
                result.text += event.text
                result.token_ids.extend(event.token_ids)
                result.events.append(event)
                result.timeline = timeline
                if event.finish_reason is not None:
                    result.finish_reason, result.stop_reason = event.finish_reason, event.stop_reason
                    result.provenance = event.provenance or Provenance()
        return results

    async def _merged(
        self, prompt: TokenisedPrompt, choices: Sequence[SamplingParams], arrival: float, tenant: str
    ) -> AsyncGenerator[tuple[int, TokenEvent, Timeline], None]:
        merged: asyncio.Queue[tuple[int, TokenEvent, Timeline] | BaseException | None] = asyncio.Queue()

        async def drain(index: int, sampling: SamplingParams) -> None:
            try:
                async with aclosing(self._choice(prompt, sampling, arrival, tenant)) as events:
                    async for event, timeline in events:
                        merged.put_nowait((index, event, timeline))
                merged.put_nowait(None)
            except BaseException as error:  # of any kind: the reader must not wait for this choice
                merged.put_nowait(error)
                raise

        tasks = [asyncio.create_task(drain(index, sampling)) for index, sampling in enumerate(choices)]
        try:
            num_open = len(tasks)
            while num_open:
                item = await merged.get()
                if item is None:
                    num_open -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _choice(
        self, prompt: TokenisedPrompt, sampling: SamplingParams, arrival: float, tenant: str
    ) -> AsyncGenerator[tuple[TokenEvent, Timeline], None]:
        call = self._call(prompt, sampling, tenant)
        timeline = Timeline(arrival)
        is_finished = False
        async with aclosing(self._client.generate(call)) as events:
            async for event in events:
                self._note(event, timeline)
                is_finished = event.finish_reason is not None
                yield event, timeline
        if not is_finished:
            raise InternalFault("the stream ended without a finish reason")

    def _call(self, prompt: TokenisedPrompt, sampling: SamplingParams, tenant: str) -> GenerateCall:
        """With the epochs of now, and sealed: nothing of it may change on the way."""
        spans = stamped(prompt.zone_spans, self._epochs)
        zone = joined_zone(spans)
        call = GenerateCall(
            request_id=f"gen-{uuid.uuid4().hex}",
            prompt_token_ids=prompt.token_ids,
            sampling=sampling,
            zone_spans=spans,
            timeout_s=self._config.routing.request_timeout_s,
            epoch=self._epochs.epoch_of(zone),
            affinity=self._affinity(spans),
            tenant=tenant or zone.tenant,
        )
        return replace(call, grant=self._grants.seal(call))

    def _note(self, event: TokenEvent, timeline: Timeline) -> None:
        metrics, now = self._metrics, self._clock()
        if event.token_ids:
            if timeline.last_token is None:
                timeline.first_token = now
                metrics.ttft.observe(now - timeline.arrival)
            else:
                metrics.itl.observe(now - timeline.last_token)
            timeline.last_token = now
            timeline.num_tokens += len(event.token_ids)
            metrics.generation_tokens.inc(len(event.token_ids))
        if event.finish_reason is not None:
            metrics.finished.labels(event.finish_reason).inc()
            metrics.e2e.observe(now - timeline.arrival)
            if timeline.num_tokens > 1 and timeline.first_token is not None and timeline.last_token is not None:
                metrics.tpot.observe((timeline.last_token - timeline.first_token) / (timeline.num_tokens - 1))
            for origin, count in (event.provenance or Provenance()).origins.items():
                metrics.prompt_tokens.labels(origin).inc(count)

    def _affinity(self, spans: tuple[ZoneSpan, ...]) -> bytes:
        """Keyed digest of the zone and epoch whose prefix is worth finding again: the plan's, else the case's."""
        kinds = {span.zone.kind: span for span in spans}
        span = kinds.get(ZoneKind.PLAN) or kinds.get(ZoneKind.CASE)
        if span is None:
            return b""
        return hmac.digest(self._affinity_key, struct.pack("<Q", span.epoch) + span.zone.path.encode(), "sha256")
