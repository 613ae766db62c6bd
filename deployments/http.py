"""HTTP plumbing in front of the ingress: body limit, error shape, server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import (
    BadRequest,
    BodyTooLarge,
    InternalFault,
    MethodNotAllowed,
    NotFound,
    ServeError,
    UnsupportedMedia,
)

logger = logging.getLogger("ray.serve.zoneserve.http")

MAX_FAULTS_SHOWN = 3
MAX_LOCATION_CHARS = 200
MAX_LENGTH_DIGITS = 20
# Headers that name a cache partition or a KV transfer: the zone comes from the credential alone.
ZONE_HEADERS = frozenset({"x-zone", "x-trust-zone", "x-zoneserve-zone"})
# The last four are Serve's own, which its proxy has obeyed before this: a gateway that lets them in shows in the count.
STRIPPED_HEADERS = ZONE_HEADERS | {
    "x-cache-salt",
    "x-kv-transfer-params",
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "x-session-id",
    "serve_multiplexed_model_id",
}
SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class BodyLimit:
    """ASGI middleware: a body larger than `max_bytes` ends in 413, whether or not it declares its length."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > MAX_LENGTH_DIGITS or int(declared) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        body, is_whole = bytearray(), False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
            if len(body) > self._max_bytes:
                await self._refuse(scope, receive, send)
                return
        await self._app(scope, _replay(bytes(body), receive), send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = BodyTooLarge(f"the body is larger than {self._max_bytes} bytes")
        await error_response(error)(scope, receive, send)


class RequestCounter:
    """ASGI middleware: reports route and status of each exchange; unknown paths count as one route."""

    def __init__(self, app: ASGIApp, routes: frozenset[str], count: Callable[[str, int], None]) -> None:
        self._app = app
        self._routes = routes
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"]
                self._count(path if path in self._routes else "other", message["status"])
            await send(message)

        await self._app(scope, receive, counting if scope["type"] == "http" else send)


def _replay(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def stripped_headers(request: Request) -> list[tuple[str, str]]:
    """Names and values of the request's headers that nothing here obeys."""
    return [(name, value) for name, value in request.headers.items() if name in STRIPPED_HEADERS]


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        UnsupportedMedia: Another content type. BadRequest: Not JSON in UTF-8, not an object, or a string
            that is not text (half a surrogate pair).
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMedia("the content type must be application/json")
    try:
        text = (await request.body()).decode()
        document = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():  # only an escape can spell half a surrogate pair: it cannot be encoded again
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadRequest("the body is not valid JSON") from error
    if not isinstance(document, dict):
        raise BadRequest("the body must be a JSON object")
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def bad_request(error: ValidationError) -> BadRequest:
    """Pydantic's faults as one sentence, without the offending values."""
    faults = error.errors()
    shown = "; ".join(
        f"{_location(fault['loc'])}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in faults[:MAX_FAULTS_SHOWN]
    )
    return BadRequest(shown, param=_location(faults[0]["loc"]))


def _location(parts: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in parts)[:MAX_LOCATION_CHARS] or "body"


def error_response(error: ServeError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


def from_http_exception(error: HTTPException) -> ServeError:
    kinds: dict[int, type[ServeError]] = {404: NotFound, 405: MethodNotAllowed}
    return kinds.get(error.status_code, BadRequest if error.status_code < 500 else InternalFault)(str(error.detail))


class EventStream(StreamingResponse):
    """Server-sent events in OpenAI's framing; a fault after the first byte becomes an error event.

    However the exchange ends, the events have ended, and freed what they hold, when it returns.
    """

    def __init__(self, events: AsyncIterator[Mapping[str, object]]) -> None:
        self._frames = _frames(events)
        super().__init__(self._frames, media_type="text/event-stream", headers=SSE_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._frames):
            await super().__call__(scope, receive, send)


def event_stream(events: AsyncIterator[Mapping[str, object]]) -> StreamingResponse:
    return EventStream(events)


async def _frames(events: AsyncIterator[Mapping[str, object]]) -> AsyncGenerator[bytes, None]:
    try:
        async for event in events:
            yield sse(event)
    except ServeError as error:
        yield sse(error.body())
    except Exception:
        logger.exception("unhandled error in a stream")  # the status is sent: only an event can still tell
        yield sse(InternalFault("internal error").body())
    finally:
        await _end(events)
    yield b"data: [DONE]\n\n"


def sse(event: Mapping[str, object]) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


async def with_first(
    events: AsyncIterator[Mapping[str, object]],
) -> Callable[[], AsyncIterator[Mapping[str, object]]]:
    """Wait for the first event, so that what fails before it still becomes a status code."""
    first = await anext(events)

    async def replay() -> AsyncIterator[Mapping[str, object]]:
        try:
            yield first
            async for event in events:
                yield event
        finally:
            await _end(events)

    return replay


async def _end(events: AsyncIterator[Mapping[str, object]]) -> None:
    """End a generator when its reader ends, and with it what it holds."""
    if isinstance(events, AsyncGenerator):
        await events.aclose()
