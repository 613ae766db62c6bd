"""The decode replica: orchestrates the handoff, decodes, streams. It knows which blocks it already holds."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray

from deployments.config import ZoneserveConfig
from deployments.engine_host import EngineStopped
from deployments.errors import AuditUnavailable, BadRequest, InternalFault, NoCapacity, ReplicaLost
from deployments.handoff import DecodeHandoff
from deployments.messages import GenerateCall, Provenance, TokenEvent, TokenLogprob
from deployments.replica import EngineReplica, ReplicaParts, build_parts
from deployments.trust.transfer_records import grant_denial
from deployments.trust.zone_grant import GrantRefused
from engine.engine import RequestOutput, Reservation
from engine.errors import EngineError, QueueFullError, RequestError
from engine.request import FinishReason, Request
from engine.sampler import SampledToken
from transfer.handoff import HandoffReceiver

logger = logging.getLogger("ray.serve.zoneserve.decode")

RESERVE_POLL_S = 0.02


class DecodeReplica(EngineReplica):
    """One replica of the decode pool. Without a prefill pool it computes prompts itself."""

    role = "decode"

    def __init__(
        self, config: ZoneserveConfig, model_path: str, prefill: Any | None, parts: ReplicaParts | None = None
    ) -> None:
        parts = parts or build_parts(self.role, config, config.decode, model_path)
        super().__init__(config, parts)
        self._prefill = prefill
        self._receiver = HandoffReceiver(
            self.connector,
            self._sealer,
            weights_digest=self.runner.weights_digest,
            generations_of=parts.engine.generations,  # plain integers, read between two bytecodes
            clock=parts.unix_time_s,
        )
        self._reserving = asyncio.Lock()
        self._calls = itertools.count()

    def record_replica_metadata(self) -> dict[str, str]:
        """What Ray knows this replica by."""
        return {"role": self.role, "actor": ray.get_runtime_context().get_actor_name() or ""}

    async def generate(self, call: GenerateCall) -> AsyncIterator[TokenEvent]:
        """Tokens of one sequence as they come. Cancelling it frees everything on both sides."""
        if (refusal := self._refuse(call)) is not None:
            yield refusal
            return
        request_id = f"{call.request_id}/{next(self._calls)}"  # a call that is tried again may meet its earlier self
        request = call.request(request_id)
        stream = self.host.open(request)
        handoff: DecodeHandoff | None = None
        try:
            handoff = await self._start(request, call)
            async for output in stream:
                if output.finish_reason is not None:
                    self._count_twice_computed(output, handoff)
                yield self._event(output, request, handoff, stream.queue_s)
        except (RequestError, NoCapacity, QueueFullError, EngineError, EngineStopped) as error:
            yield TokenEvent(error=_describe(error))
        finally:
            self.host.close(request_id)
            if handoff is not None:
                self.in_background(_settle(handoff))
            else:  # a reservation that was made while we were leaving: nobody has heard of its blocks
                self.host.post(lambda engine: engine.release_quarantine(request_id))

    def _refuse(self, call: GenerateCall) -> TokenEvent | None:
        """Why nothing may be computed for a call; counted and audited. None: it may."""
        try:
            self.grants.verify(call)
            self.trail.require_writable()
        except GrantRefused as refusal:
            logger.error("%s", refusal)
            self.metrics.grant_refusals.labels(refusal.reason).inc()
            self.trail.note("zone.deny", **grant_denial(refusal.reason, call.request_id))
            return TokenEvent(error=f"{InternalFault.code}: the call has no valid grant")
        except AuditUnavailable as error:
            return TokenEvent(error=f"{error.code}: {error.message}")
        return None

    async def _start(self, request: Request, call: GenerateCall) -> DecodeHandoff | None:
        """Queue the request here, or reserve its blocks and hand its prompt to prefill."""
        if self._prefill is None:
            await self.host.add(request)
            return None
        num_cached = await self.host.call(lambda engine: engine.num_cached_prompt_tokens(request))
        if len(request.prompt_token_ids) - num_cached <= self.config.routing.local_prefill_max_tokens:
            await self.host.add(request)
            return None
        return DecodeHandoff(
            request=request,
            reservation=await self._reserve(request),
            call=call,
            prefill=self._prefill,
            receiver=self._receiver,
            host=self.host,
            metrics=self.metrics,
            trail=self.trail,
            config=self.config,
        )

    async def _reserve(self, request: Request) -> Reservation:
        """Blocks for the prompt and the expected output, first come first served.

        Raises:
            NoCapacity: None within `routing.reserve_timeout_s`.
        """
        try:
            async with asyncio.timeout(self.config.routing.reserve_timeout_s), self._reserving:
                while True:
                    reservation = await self.host.call(lambda engine: engine.reserve(request))
                    if reservation is not None:
                        return reservation
                    await asyncio.sleep(RESERVE_POLL_S)
        except TimeoutError:
            raise NoCapacity("no KV blocks became free on decode") from None

    def _count_twice_computed(self, output: RequestOutput, handoff: DecodeHandoff | None) -> None:
        self.metrics.recomputed.inc(output.num_recomputed_tokens)
        if handoff is not None and handoff.first_token is not None:
            num_held_here_only = output.num_cached_tokens - handoff.first_token.num_cached_tokens
            self.metrics.duplicated.inc(max(0, num_held_here_only))

    def _event(
        self, output: RequestOutput, request: Request, handoff: DecodeHandoff | None, queue_s: float | None
    ) -> TokenEvent:
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            return TokenEvent(error=f"{InternalFault.code}: {output.error or 'the engine ended the request'}")
        return TokenEvent(
            token_ids=output.token_ids,
            text=output.text,
            logprobs=tuple(self._logprob(token) for token in output.logprobs if token.logprob is not None),
            finish_reason=None if output.finish_reason is None else output.finish_reason.value,
            stop_reason=output.stop_reason,
            provenance=None if output.finish_reason is None else _provenance(output, request, handoff, queue_s),
        )

    def _logprob(self, token: SampledToken) -> TokenLogprob:
        def text(token_id: int) -> str:
            return self.tokenizer.decode([token_id], skip_special_tokens=False)

        top = tuple((token_id, text(token_id), value) for token_id, value in token.top_logprobs)
        return TokenLogprob(token.token_id, text(token.token_id), token.logprob or 0.0, top)

    def transfer_counts(self) -> Mapping[str, float]:
        stats = self._receiver.stats()
        landed = {"landed_bytes": stats.landed_bytes, "landed_blocks": stats.landed_blocks}
        faults = {f"landing_{name}": count for name, count in stats.ledger.faults.items()}
        return {**super().transfer_counts(), **landed, **faults, "forged_notices": stats.forged_notices}


async def _settle(handoff: DecodeHandoff) -> None:
    """Until the handoff's blocks are the request's own, or free, or known to stay in quarantine."""
    await asyncio.wait([handoff.abandon()])
    if handoff.settling is not None:
        await asyncio.wait([handoff.settling])


def _provenance(
    output: RequestOutput, request: Request, handoff: DecodeHandoff | None, queue_s: float | None
) -> Provenance:
    num_prompt = len(request.prompt_token_ids)
    origins = {
        "decode_cache": output.num_cached_tokens,
        "prefill_cache": 0,
        "prefill_computed": 0,
        "decode_computed": output.num_local_prompt_tokens,
    }
    if handoff is None:
        return Provenance(origins, recomputed_tokens=output.num_recomputed_tokens, queue_s=queue_s)
    remote = num_prompt - output.num_cached_tokens - output.num_local_prompt_tokens
    if handoff.first_token is not None:
        queue_s = handoff.first_token.queue_s
        origins["prefill_cache"] = min(remote, max(0, handoff.first_token.num_cached_tokens - output.num_cached_tokens))
    origins["prefill_computed"] = remote - origins["prefill_cache"]
    return Provenance(
        origins=origins,
        recomputed_tokens=output.num_recomputed_tokens,
        pushed_bytes=handoff.receipt.num_bytes if handoff.receipt else 0,
        pushed_blocks=handoff.receipt.num_blocks if handoff.receipt else 0,
        handoff_s=handoff.seconds,
        queue_s=queue_s,
        fallback=handoff.fallback,
    )


def _describe(error: Exception) -> str:
    """The error as the ingress reads it: code, then the sentence."""
    if isinstance(error, RequestError):
        return f"{BadRequest.code}: {error}"
    if isinstance(error, NoCapacity | QueueFullError):
        return f"{NoCapacity.code}: {error}"
    if isinstance(error, EngineStopped):
        return f"{ReplicaLost.code}: the decode replica has stopped"
    return f"{InternalFault.code}: {type(error).__name__}"
