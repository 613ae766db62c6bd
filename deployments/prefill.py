"""The prefill replica: computes a prompt in chunks and pushes finished blocks while it computes the next."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator

from deployments.config import ZoneserveConfig
from deployments.engine_host import EngineStopped
from deployments.errors import AuditUnavailable
from deployments.messages import FirstToken, PrefillCall, PrefillDone, PrefillEvent, PrefillRefused
from deployments.replica import EngineReplica, ReplicaParts, build_parts
from deployments.trust.transfer_records import grant_denial, transfer_record
from deployments.trust.zone_grant import GrantRefused
from engine.engine import RequestOutput
from engine.errors import EngineError
from engine.kv_cache import KVCacheLayout
from engine.request import FinishReason, Request
from transfer.handoff import HandoffSender, PushSession
from transfer.notice import AbortReason
from transfer.protocol import PeerIncompatible, TransferError
from transfer.ticket import Expectation, ReplayGuard, TicketRefused, TicketVerifier

logger = logging.getLogger("ray.serve.zoneserve.prefill")

MAX_REVOKED = 65_536


class PrefillFailed(Exception):
    """The prompt could not be computed or pushed."""


class PrefillReplica(EngineReplica):
    """One replica of the prefill pool."""

    role = "prefill"

    def __init__(self, config: ZoneserveConfig, model_path: str, parts: ReplicaParts | None = None) -> None:
        parts = parts or build_parts(self.role, config, config.prefill, model_path)
        super().__init__(config, parts)
        self._epoch_floor = parts.engine.epoch_floor  # a look into a table, between two bytecodes
        verifier = TicketVerifier(
            self._sealer,
            ReplayGuard(parts.unix_time_s),
            layout_fingerprint=self.runner.layout.fingerprint(),
            weights_digest=self.runner.weights_digest,
            agent_name=self.connector.name,
        )
        self._sender = HandoffSender(
            self.connector,
            verifier,
            write_timeout_s=config.transfer.write_timeout_s,
            clock=parts.unix_time_s,
        )
        self._calls: dict[str, asyncio.Event] = {}  # under way, by id; set when nothing of one can land any more
        self._revoked: OrderedDict[str, None] = OrderedDict()

    def record_replica_metadata(self) -> dict[str, str]:
        """What a decode replica needs in order to know this one's end of the transfer."""
        return {"role": self.role, "handshake": base64.b64encode(self.connector.handshake()).decode()}

    async def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        """Compute, push, and hand over the first token as soon as it exists.

        The call ends when nothing of it can land any more, so that Serve's drain covers the handoff.
        """
        if call.request_id in self._calls:  # delivered twice: `settle` must go on speaking for the first
            yield PrefillRefused("replayed")
            return
        self._calls[call.request_id] = asyncio.Event()
        try:
            request, session = await self._accept(call)
        except (TransferError, GrantRefused, AuditUnavailable) as error:
            logger.warning("%s: %s", call.request_id, error)
            self._end(call.request_id)
            yield PrefillRefused(_refusal(error))
            return
        except BaseException:
            self._end(call.request_id)
            raise
        failure = AbortReason.CANCELLED
        try:
            yield await self._push_prompt(request, session)
            receipt = await session.finish()
            failure = AbortReason.NONE
            ticket = session.ticket
            self.trail.note("transfer.send", **transfer_record(ticket, ticket.receiver, receipt.num_bytes))
        except (EngineError, EngineStopped, PrefillFailed) as error:
            failure = AbortReason.PREFILL_FAILED
            raise PrefillFailed(str(error)) from error
        except TransferError as error:
            failure = AbortReason.WRITE_FAILED
            raise PrefillFailed(str(error)) from error
        finally:
            await asyncio.shield(self.in_background(self._clean_up(call.request_id, session, failure)))
        yield PrefillDone(receipt.num_bytes, receipt.num_blocks)

    async def settle(self, request_id: str) -> tuple[str, bool]:
        """Revoke a call. Our name, and True when no write of it is live and none will ever be posted.

        False: that is not so within `transfer.fence_timeout_s`; ask again.
        """
        self._revoked[request_id] = None
        while len(self._revoked) > MAX_REVOKED:
            self._revoked.popitem(last=False)
        ended = self._calls.get(request_id)
        if ended is None:
            return self.connector.name, True
        self.host.fail(request_id, PrefillFailed("revoked"))
        try:
            async with asyncio.timeout(self.config.transfer.fence_timeout_s):
                await ended.wait()
        except TimeoutError:
            return self.connector.name, False
        return self.connector.name, True

    async def _accept(self, call: PrefillCall) -> tuple[Request, PushSession]:
        """What to compute, by the ingress's grant, and leave to push it, by decode's ticket; they must agree.

        Raises:
            GrantRefused, TransferError: Counted and audited. AuditUnavailable: Nothing private is taken on then.
        """
        granted = call.granted
        try:
            self.grants.verify(granted)
        except GrantRefused as refusal:
            self.metrics.grant_refusals.labels(refusal.reason).inc()
            self.trail.note("transfer.deny", **grant_denial(refusal.reason, granted.request_id))
            raise
        self.trail.require_writable()
        request = granted.request(call.request_id, is_prefill_only=True)
        expected = Expectation(
            zone=request.zone.path,
            epoch=request.epoch,
            num_prompt_tokens=len(request.prompt_token_ids),
            request_id=granted.request_id,
            epoch_floor=self._epoch_floor(request.zone),
        )
        try:
            return request, await self._sender.accept(call.sealed_ticket, call.handshake, expected)
        except TransferError as error:
            self.trail.note(
                "transfer.deny",
                reason=_refusal(error),
                request_id=granted.request_id,
                zone=expected.zone,
                epoch=expected.epoch,
            )
            raise

    async def _push_prompt(self, request: Request, session: PushSession) -> FirstToken:
        """Compute the prompt, and submit every block before the first token is given out."""
        stream = self.host.open(request)  # from here on `settle` can end the call
        if request.request_id in self._revoked:
            raise PrefillFailed("revoked")
        await self.host.add(request)
        output = None
        pusher = _Pusher(session, self.runner.layout)
        async for output in stream:
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                break
            if not pusher.block_ids:
                pusher.block_ids = await self.host.call(lambda engine: engine.block_ids(request.request_id))
            pusher.push(output, len(request.prompt_token_ids))
            if output.token_ids:
                break
        return _first_token(output, stream.queue_s)

    async def _clean_up(self, request_id: str, session: PushSession, failure: AbortReason) -> None:
        """Source blocks go only when no write reads them any more."""
        self.host.close(request_id)
        try:
            if failure is AbortReason.NONE:
                await session.settled()
            else:
                await session.abort(failure)
            self.host.post(lambda engine: engine.release(request_id))
        finally:
            self._end(request_id)

    def _end(self, request_id: str) -> None:
        self._calls.pop(request_id).set()


def _refusal(error: TransferError | GrantRefused | AuditUnavailable) -> str:
    """A label; what a peer sent is only in the log."""
    if isinstance(error, AuditUnavailable):
        return error.code
    if isinstance(error, GrantRefused):
        return f"grant_{error.reason}"
    if isinstance(error, TicketRefused):
        return error.reason
    return "incompatible" if isinstance(error, PeerIncompatible) else "decode_unreachable"


class _Pusher:
    """Hands a session the blocks that have become whole since the last time."""

    def __init__(self, session: PushSession, layout: KVCacheLayout) -> None:
        self.block_ids: tuple[int, ...] = ()
        self._session = session
        self._layout = layout
        self._next = session.ticket.first_missing_block

    def push(self, output: RequestOutput, num_prompt_tokens: int) -> None:
        if output.num_computed_tokens >= num_prompt_tokens:
            num_whole = self._layout.num_blocks_for(num_prompt_tokens)
        else:
            num_whole = output.num_computed_tokens // self._layout.block_size
        if num_whole > self._next:
            self._session.push(self.block_ids[self._next : num_whole])
            self._next = num_whole


def _first_token(output: RequestOutput | None, queue_s: float | None) -> FirstToken:
    if output is None or not output.token_ids:
        raise PrefillFailed(output.error or "the engine ended the request" if output else "no output")
    sampled = output.logprobs[0] if output.logprobs else None
    return FirstToken(
        token_id=output.token_ids[0],
        logprob=sampled.logprob if sampled else None,
        top_logprobs=sampled.top_logprobs if sampled else (),
        num_cached_tokens=output.num_cached_tokens,
        queue_s=queue_s,
    )
