"""The decode side of one handoff: choose a prefill replica, send the ticket, admit what verifiably landed.

Whatever goes wrong, the request falls back to prefill on this replica, and the reserved blocks stay in
quarantine until nothing can be written into them any more. The task never waits without a limit.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import RayServeException

from deployments.calls import dispatch, over_ray
from deployments.config import ZoneserveConfig
from deployments.engine_host import EngineHost, EngineStopped
from deployments.messages import FirstToken, GenerateCall, PrefillCall, PrefillRefused, RouteHint
from deployments.metrics import ReplicaMetrics
from deployments.trust.trail import AuditTrail
from deployments.trust.transfer_records import landing_denial, transfer_record
from engine.engine import Engine, Reservation
from engine.request import Request, RequestStatus
from engine.sampler import SampledToken
from transfer.handoff import HandoffReceiver, Landing, LandingReceipt, LandingRefused
from transfer.protocol import ConnectorClosed, PeerIncompatible, TransferError
from transfer.quarantine import HandoffFault

logger = logging.getLogger("ray.serve.zoneserve.handoff")

FIRST_TOKEN_GRACE_S = 5.0  # the blocks may land before Ray delivers the token that came first
NOTICE_GRACE_S = 5.0  # prefill's stream may end before its notice arrives
STREAM_END_GRACE_S = 10.0
SETTLE_PAUSE_S = 1.0  # doubles with each question that got no answer
MAX_SETTLE_PAUSE_S = 30.0


class HandoffFailed(Exception):
    """The handoff did not come about. `reason` is a label of the fallback counter, `fault` one of the ledger's."""

    def __init__(self, reason: str, fault: HandoffFault = HandoffFault.NOT_SENT) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fault = fault


class DecodeHandoff:
    """Runs as a task from the reservation until its blocks belong to the request or are free again."""

    def __init__(
        self,
        *,
        request: Request,
        reservation: Reservation,
        call: GenerateCall,
        prefill: Any,
        receiver: HandoffReceiver,
        host: EngineHost,
        metrics: ReplicaMetrics,
        trail: AuditTrail,
        config: ZoneserveConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request = request
        self._reservation = reservation
        self._call = call
        self._prefill_pool = over_ray(prefill)
        self._prefill = self._prefill_pool.options(stream=True).prefill
        self._receiver = receiver
        self._host = host
        self._metrics = metrics
        self._trail = trail
        self._config = config
        self._clock = clock
        self._started_s = clock()
        self._landing: Landing | None = None
        self._sender = ""
        self._first_token_settled = asyncio.Event()  # it is here, or it will not come
        self._first_token_at_s: float | None = None
        self.first_token: FirstToken | None = None
        self.receipt: LandingReceipt | None = None
        self.seconds: float | None = None
        self.fallback: str | None = None
        self.settling: asyncio.Task[None] | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    def abandon(self) -> asyncio.Task[None]:
        """The request is gone from the engine, or soon will be: stop, and free the blocks behind their fence.

        Returns:
            The task. Once it is done, `settling` is what may be left to wait for.
        """
        if self.seconds is None:
            self._task.cancel()
        return self._task

    async def _run(self) -> None:
        try:
            await self._attempt()
        except HandoffFailed as failure:
            self._give_up(failure.reason, failure.fault)
        except LandingRefused as refusal:
            assert self._landing is not None
            self._trail.note("transfer.deny", **landing_denial(refusal.fault, self._landing.ticket))
            self._give_up(str(refusal.fault), None)
        except (ConnectorClosed, EngineStopped) as error:
            logger.warning("%s: %s", self._request.request_id, error)
            self._give_up("shutdown", HandoffFault.CANCELLED)
        except asyncio.CancelledError:
            self._metrics.handoffs.labels("cancelled").inc()
            self._release_blocks(HandoffFault.CANCELLED)
        except Exception:
            logger.exception("%s: the handoff failed unexpectedly", self._request.request_id)
            self._give_up("unexpected", None)

    async def _attempt(self) -> None:
        context = self._prefill.choose_replica(
            RouteHint(self._request.request_id, len(self._request.prompt_token_ids), 1, self._call.affinity)
        )
        try:
            async with asyncio.timeout(self._config.routing.choose_timeout_s):
                selection = await context.__aenter__()
        except TimeoutError:
            raise HandoffFailed("no_prefill_replica") from None
        except (RayError, RayServeException) as error:
            raise HandoffFailed("prefill_unavailable") from error
        try:
            landing = await self._issue(selection.replica_metadata)
            try:
                response = await dispatch(self._prefill, selection, self._prefill_call(landing))
            except (RayError, RayServeException) as error:
                raise HandoffFailed("prefill_unavailable") from error
            await self._receive(landing, response)
        finally:
            await asyncio.shield(_leave(context))

    async def _receive(self, landing: Landing, response: Any) -> None:
        """Take first token and blocks, in whichever order they come."""
        consumer = asyncio.get_running_loop().create_task(self._consume(response))
        consumer.add_done_callback(lambda done: done.cancelled() or done.exception())  # read, or no longer of interest
        try:
            await self._land(landing, consumer)
            await self._complete()
            await asyncio.wait([consumer], timeout=STREAM_END_GRACE_S)
        finally:
            if not consumer.done():
                response.cancel()
                consumer.cancel()
                await asyncio.wait([consumer], timeout=STREAM_END_GRACE_S)

    async def _issue(self, metadata: dict[str, str]) -> Landing:
        reservation, request = self._reservation, self._request
        try:
            self._sender = await self._receiver.connector.connect(base64.b64decode(metadata["handshake"]))
            self._landing = self._receiver.issue(
                request_id=request.request_id,
                zone=request.zone.path,
                epoch=request.epoch,
                block_ids=reservation.block_ids,
                generations=reservation.generations,
                first_missing_block=reservation.first_missing_block,
                num_prompt_tokens=len(request.prompt_token_ids),
                lifetime_s=self._config.transfer.ticket_ttl_s,
                sender=self._sender,
            )
        except (TransferError, KeyError, ValueError) as error:
            logger.warning("%s: no ticket: %s", request.request_id, error)
            reason = "incompatible" if isinstance(error, PeerIncompatible) else "prefill_unreachable"
            raise HandoffFailed(reason) from error
        return self._landing

    def _prefill_call(self, landing: Landing) -> PrefillCall:
        return PrefillCall(
            request_id=_handoff_id(landing),
            granted=self._call,
            sealed_ticket=landing.sealed,
            handshake=self._receiver.connector.handshake(),
        )

    async def _consume(self, response: Any) -> None:
        """Take prefill's events; the first token goes to the client at once."""
        try:
            async for event in response:
                if isinstance(event, PrefillRefused):
                    raise HandoffFailed(f"refused_{event.reason}")
                if isinstance(event, FirstToken):
                    await self._accept(event)
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            # Ray reports a call that its replica cancelled, as one that shuts down does, like a cancellation of ours.
            raise HandoffFailed("prefill_gave_up", HandoffFault.ABORTED) from error
        except ActorDiedError as error:
            self._receiver.connector.declare_gone(self._sender)
            raise HandoffFailed("prefill_died", HandoffFault.PEER_DOWN) from error
        except (RayError, RayServeException) as error:
            raise HandoffFailed("prefill_failed", HandoffFault.ABORTED) from error
        finally:
            self._first_token_settled.set()

    async def _accept(self, event: FirstToken) -> None:
        token = SampledToken(event.token_id, event.logprob, event.top_logprobs)
        request_id = self._request.request_id

        def accept(engine: Engine) -> None:
            if self._request.status is RequestStatus.RESERVED:
                output = engine.accept_first_token(request_id, token)
                self.first_token = event  # first: the output may be the last, and then tells where the prompt came from
                self._host.publish(output)

        self.first_token = (
            event  # before it is given out: it may be the last, and where its prompt came from is told then
        )
        await self._host.call(accept)
        self._first_token_at_s = self._clock()
        self._first_token_settled.set()

    async def _land(self, landing: Landing, consumer: asyncio.Task[None]) -> None:
        """Wait for the verified landing, or for whatever makes it impossible."""

        async def land() -> None:
            # In one step with the landing: whoever stops us later finds either a receipt or an open ticket.
            self.receipt = await landing.landed(self._config.transfer.handoff_timeout_s)
            record = transfer_record(landing.ticket, self._sender, self.receipt.num_bytes)
            self._trail.note("transfer.recv", **record)

        landed = asyncio.get_running_loop().create_task(land())
        try:
            await asyncio.wait([landed, consumer], return_when=asyncio.FIRST_COMPLETED)
            if not landed.done():
                consumer.result()  # raises what ended the stream
                await asyncio.wait([landed], timeout=NOTICE_GRACE_S)
            if not landed.done():
                raise HandoffFailed("notice_lost", HandoffFault.TIMEOUT)
            landed.result()
        finally:
            landed.cancel()
            await asyncio.wait([landed])  # a nonce has one waiter at a time, and the fence is the next

    async def _complete(self) -> None:
        """What landed is verified; the request decodes from here on, unless it has ended meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_TOKEN_GRACE_S):
                await self._first_token_settled.wait()
        if self.first_token is None:
            raise HandoffFailed("first_token_lost", HandoffFault.TIMEOUT)
        request = self._request

        def complete(engine: Engine) -> None:
            if request.status is RequestStatus.RESERVED:
                engine.complete_handoff(request.request_id)
            else:
                engine.release_quarantine(request.request_id)

        await self._host.call(complete)
        self.seconds = self._clock() - self._started_s
        self._metrics.handoff.observe(self.seconds)
        if self._first_token_at_s is not None:
            self._metrics.landing_wait.observe(self._clock() - self._first_token_at_s)
        self._metrics.handoffs.labels("landed").inc()

    def _give_up(self, reason: str, fault: HandoffFault | None) -> None:
        """Recompute on this replica; the reserved blocks wait for their fence.

        Does not wait, so that a client that leaves meanwhile cannot cut it short.
        """
        self.fallback = reason
        self._metrics.handoffs.labels("failed").inc()
        self._metrics.fallbacks.labels(reason).inc()
        request = self._request

        def fall_back(engine: Engine) -> None:
            if request.status is RequestStatus.RESERVED:
                engine.prefill_locally(request.request_id)

        self._host.post(fall_back)
        self._release_blocks(fault)

    def _release_blocks(self, fault: HandoffFault | None) -> None:
        """Free the quarantined blocks, at once where nothing can be written into them, else behind the fence."""
        request_id, landing = self._request.request_id, self._landing

        def release() -> None:
            self._host.post(lambda engine: engine.release_quarantine(request_id))

        if landing is None or self.receipt is not None:
            release()  # no ticket ever left, or the sender has proved that it is done
            return
        landing.release_when_fenced(release, fault)
        if not landing.is_fenced:
            self.settling = asyncio.get_running_loop().create_task(self._confirm_fence(landing))

    async def _confirm_fence(self, landing: Landing) -> None:
        """Ask prefill itself until a fence has passed: a call that was cancelled before it began sends no notice."""
        pause_s = SETTLE_PAUSE_S
        while not landing.is_fenced:
            if await self._is_settled(landing):
                landing.confirm_fence()
                return
            logger.warning(
                "%s: blocks stay in quarantine: prefill %s has not answered", landing.ticket.request_id, self._sender
            )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_SETTLE_PAUSE_S)

    async def _is_settled(self, landing: Landing) -> bool:
        """True where the ticket's own prefill replica says that nothing of it is live or ever will be."""
        question = self._prefill_pool.broadcast("settle", _handoff_id(landing))
        try:
            async with asyncio.timeout(self._config.transfer.fence_timeout_s + SETTLE_PAUSE_S):
                replies = await question.results_async(return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):
            return False
        return any(not isinstance(reply, BaseException) and tuple(reply) == (self._sender, True) for reply in replies)


def _handoff_id(landing: Landing) -> str:
    """What prefill knows the call by: never the same twice, as the id of a request that is tried again would be."""
    return f"{landing.ticket.request_id}/{landing.ticket.nonce.hex()}"


def _is_cancelled() -> bool:
    """True where it is the running task itself that is being cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _leave(context: Any) -> None:
    await context.__aexit__(None, None, None)
