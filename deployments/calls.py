"""Streaming calls to a chosen replica, over Serve's gRPC or over Ray.

Tokens go over gRPC, which costs a third of the CPU. Prefill's two events a request go over Ray, because there a dead
replica is an ActorDiedError, Ray's own word, and that word frees memory that a dead peer might have written into; over
gRPC a replica that is dead, slow or cut off looks the same.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import ray
from ray.exceptions import RayError

SERVE_NAMESPACE = "serve"  # of the actors that are replicas

# What a stream ends with when its other end goes away, or its connection does. UNAVAILABLE comes as Serve's
# ActorUnavailableError, except where it is raised outside Serve's own wrapper.
_CUT = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
)


def over_grpc(handle: Any) -> Any:
    """The handle for streaming calls over gRPC. Said outright: else the process that built the application decides."""
    return handle.options(stream=True, _by_reference=False)


def over_ray(handle: Any) -> Any:
    """The handle for calls and broadcasts whose failure is Ray's word on the replica."""
    return handle.options(_by_reference=True)


def is_cut(error: Exception) -> bool:
    """True where a gRPC call ended because the replica or the way to it is gone; it may be alive all the same."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _CUT


async def dispatch(method: Any, selection: Any, message: object) -> Any:
    """Send a call, and return once `cancel` ends it.

    Serve's `cancel` forgets a call that was sent but never read, and one that is cancelled before it is sent keeps its
    place on the replica for ever; so the sending itself, which waits for nothing, is not cut short.

    Raises:
        ReplicaUnavailableError: The replica is gone; nothing was sent.
    """
    response = method.dispatch(selection, message)
    sent = asyncio.ensure_future(response._fetch_future_result_async())
    try:
        await asyncio.shield(sent)
    except asyncio.CancelledError:
        await asyncio.wait([sent])
        response.cancel()
        raise
    return response


async def is_dead(actor: str) -> bool:
    """True where Ray says that no replica of this actor name lives; False also where Ray cannot be asked."""
    try:
        await asyncio.to_thread(ray.get_actor, actor, namespace=SERVE_NAMESPACE)
    except ValueError:
        return True
    except RayError:
        return False
    return False
