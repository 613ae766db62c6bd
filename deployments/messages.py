"""Every message between the Serve deployments. Frozen dataclasses; Ray carries them."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.request import Request, SamplingParams
from engine.zone import ZoneSpan


@dataclass(frozen=True, slots=True)
class RouteHint:
    """What the router may know of a request: sizes and a keyed digest, never content."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    affinity: bytes


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """Ingress -> decode: one sequence to generate. `timeout_s` bounds the whole of it.

    `affinity`: keyed digest of the zone whose prefix is worth finding again, on either pool; empty: none.
    `tenant`: on whose behalf blocks are evicted; empty where nobody is known.
    `grant`: the ingress's seal over request id, tenant, zones, epochs and prompt (`trust.zone_grant`).
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    zone_spans: tuple[ZoneSpan, ...]
    timeout_s: float
    epoch: int = 0
    priority: int = 0
    affinity: bytes = b""
    tenant: str = ""
    grant: bytes = field(default=b"", repr=False)

    def request(self, request_id: str, *, is_prefill_only: bool = False) -> Request:
        """For this replica's engine, under a name of its own.

        Raises:
            ValueError: There is no prompt, or the spans are not in order.
        """
        return Request(
            request_id=request_id,
            prompt_token_ids=self.prompt_token_ids,
            sampling=self.sampling,
            zone_spans=self.zone_spans,
            epoch=self.epoch,
            priority=self.priority,
            tenant=self.tenant,
            is_prefill_only=is_prefill_only,
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Logprob of a chosen token and its best alternatives, as (id, text, logprob)."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a request's prompt KV came from and what moving it took; known when it ends.

    `origins`: prompt tokens by {decode_cache, prefill_cache, prefill_computed, decode_computed}; they
    add up to the prompt. `handoff_s` runs from the reservation to the verified landing.
    """

    origins: dict[str, int] = field(default_factory=dict)
    recomputed_tokens: int = 0
    pushed_bytes: int = 0
    pushed_blocks: int = 0
    handoff_s: float | None = None
    queue_s: float | None = None
    fallback: str | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Decode -> ingress: one token, or the end. The last event of a stream carries `finish_reason`."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    provenance: Provenance | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PrefillCall:
    """Decode -> prefill: compute the granted call's prompt and push it where the sealed ticket says.

    `granted`: as decode had it from the ingress, whose grant prefill checks for itself.
    """

    request_id: str
    granted: GenerateCall
    sealed_ticket: bytes
    handshake: bytes


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Prefill -> decode: the token sampled at the end of the prompt, and how the prompt was had."""

    token_id: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    num_cached_tokens: int
    queue_s: float | None


@dataclass(frozen=True, slots=True)
class PrefillRefused:
    """Prefill -> decode: nothing was and nothing will be written under this ticket."""

    reason: str


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """Prefill -> decode: every write is DONE; nothing of this call will land any more."""

    pushed_bytes: int
    pushed_blocks: int


PrefillEvent = FirstToken | PrefillRefused | PrefillDone
