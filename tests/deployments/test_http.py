"""HTTP plumbing: the body limit, JSON, error bodies and event streams, through a bare ASGI harness."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from deployments.errors import (
    BadRequest,
    InternalFault,
    MethodNotAllowed,
    NoCapacity,
    NotFound,
    ServeError,
    UnsupportedMedia,
)
from deployments.http import (
    MAX_LOCATION_CHARS,
    BodyLimit,
    bad_request,
    error_response,
    event_stream,
    from_http_exception,
    read_json,
    sse,
    with_first,
)
from tests.deployments.support import run, settle

LIMIT = 100
DISCONNECT: Message = {"type": "http.disconnect"}


def chunk(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def http_scope(*headers: tuple[bytes, bytes]) -> Scope:
    return {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": list(headers)}


@dataclass
class Exchange:
    """One request played to an ASGI application: what comes in, what went out."""

    incoming: list[Message]
    outgoing: list[Message] = field(default_factory=list)
    num_received: int = 0

    async def receive(self) -> Message:
        await asyncio.sleep(0)
        self.num_received += 1
        return self.incoming.pop(0) if self.incoming else DISCONNECT

    async def send(self, message: Message) -> None:
        await asyncio.sleep(0)
        self.outgoing.append(message)

    @property
    def status(self) -> int | None:
        return self.outgoing[0]["status"] if self.outgoing else None

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.outgoing)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with what it was sent; then waits for the client to go."""
    body = await Request(scope, receive).body()
    await Response(body)(scope, receive, send)
    assert (await receive())["type"] == "http.disconnect"


def play(incoming: list[Message], *headers: tuple[bytes, bytes], limit: int = LIMIT) -> Exchange:
    exchange = Exchange(incoming)

    async def body() -> None:
        await BodyLimit(echo, limit)(http_scope(*headers), exchange.receive, exchange.send)

    run(body)
    return exchange


def assert_refused(exchange: Exchange, status: int = 413) -> None:
    assert exchange.status == status
    assert json.loads(exchange.body)["error"]["code"] == "body_too_large"


class TestBodyLimit:
    def test_body_within_the_limit_passes_whole(self) -> None:
        assert play([chunk(b"x" * LIMIT)], (b"content-length", b"100")).body == b"x" * LIMIT

    def test_chunked_body_is_put_together(self) -> None:
        exchange = play([chunk(b"one ", more=True), chunk(b"", more=True), chunk(b"two", more=True), chunk(b"")])
        assert (exchange.status, exchange.body) == (200, b"one two")

    def test_empty_body_passes(self) -> None:
        assert play([chunk(b"")]).status == 200
        assert play([{"type": "http.request"}]).status == 200

    def test_declared_length_over_the_limit_is_refused_before_a_byte_is_read(self) -> None:
        exchange = play([chunk(b"x")], (b"content-length", b"101"))
        assert_refused(exchange)
        assert exchange.num_received == 0

    def test_undeclared_body_is_refused_at_the_first_byte_too_many(self) -> None:
        exchange = play([chunk(b"x" * 60, more=True), chunk(b"x" * 41, more=True), chunk(b"never read")])
        assert_refused(exchange)
        assert exchange.num_received == 2

    def test_body_longer_than_it_declares_is_refused(self) -> None:
        assert_refused(play([chunk(b"x" * 101)], (b"content-length", b"5")))

    @pytest.mark.parametrize("length", [b"", b"-1", b"ten", b"1e2", b"+5", b"1" * 5000, "٣".encode()])
    def test_length_that_is_no_length_is_refused(self, length: bytes) -> None:
        assert_refused(play([chunk(b"x")], (b"content-length", length)))

    def test_client_that_leaves_while_sending_gets_no_answer_and_the_application_never_runs(self) -> None:
        assert play([chunk(b"x", more=True), DISCONNECT]).outgoing == []
        assert play([]).outgoing == []

    def test_many_tiny_chunks_are_not_copied_over_and_over(self) -> None:
        count, size = 100_000, 40  # copied each time: 200 GB
        chunks = iter([*[chunk(b"x" * size, more=True)] * count, chunk(b"")])
        exchange = Exchange([])

        async def receive() -> Message:
            return next(chunks)

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            await Response(str(len(await Request(scope, receive).body())))(scope, receive, send)

        async def body() -> None:
            await BodyLimit(application, count * size)(http_scope(), receive, exchange.send)

        run(body)
        assert exchange.body == b"4000000"

    def test_application_sees_the_disconnect_that_follows_the_body(self) -> None:
        assert play([chunk(b"x"), DISCONNECT]).status == 200  # `echo` asserts it

    def test_other_protocols_pass_untouched(self) -> None:
        seen: list[str] = []

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["type"])

        async def body() -> None:
            exchange = Exchange([])
            await BodyLimit(application, LIMIT)({"type": "lifespan"}, exchange.receive, exchange.send)

        run(body)
        assert seen == ["lifespan"]

    @given(st.lists(st.binary(max_size=40), min_size=1, max_size=8))
    def test_a_body_passes_whole_or_is_refused_by_its_length_alone(self, pieces: list[bytes]) -> None:
        messages = [chunk(piece, more=index + 1 < len(pieces)) for index, piece in enumerate(pieces)]
        exchange = play(messages)
        whole = b"".join(pieces)
        if len(whole) <= LIMIT:
            assert (exchange.status, exchange.body) == (200, whole)
        else:
            assert_refused(exchange)


def parse(body: bytes, content_type: str | None = "application/json") -> dict[str, Any]:
    headers = [] if content_type is None else [(b"content-type", content_type.encode())]
    found: list[dict[str, Any]] = []

    async def read() -> None:
        found.append(await read_json(Request(http_scope(*headers), Exchange([chunk(body)]).receive)))

    run(read)
    return found[0]


class TestReadJson:
    @pytest.mark.parametrize(
        "content_type",
        ["application/json", "application/json; charset=utf-8", "Application/JSON", " application/json ;x", None],
    )
    def test_object_is_read(self, content_type: str | None) -> None:
        assert parse('{"a": [1, "ü😀", null]}'.encode(), content_type) == {"a": [1, "ü😀", None]}

    @pytest.mark.parametrize("content_type", ["text/plain", "application/jsonl", "multipart/form-data", "", "json"])
    def test_other_content_type_is_refused(self, content_type: str) -> None:
        with pytest.raises(UnsupportedMedia):
            parse(b"{}", content_type)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"{}{}",
            b"{'a': 1}",
            b'{"a": 1,}',
            b'{"a": NaN}',
            b'{"a": Infinity}',
            b'{"a": [-Infinity]}',
            b'{"a": ' + b"1" * 5000 + b"}",
            b'{"a": "\xff"}',
            b'{"a": "\x01"}',
            b'{"a": "\xed\xa0\x80"}',
            b'{"a": "\\ud800"}',
            b'{"a": ["\\uDC00x"]}',
            b'{"\\ud800": 1}',
            b"\x00\x01\x02garbage",
            b"ISA*00*          *00*",
            "{}".encode("utf-16"),
            b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            b'{"a":' * 100_000,
        ],
        ids=lambda body: repr(body[:24]),
    )
    def test_body_that_is_not_json_is_refused(self, body: bytes) -> None:
        with pytest.raises(BadRequest, match="the body is not valid JSON"):
            parse(body)

    @pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"text"', b"true"])
    def test_json_that_is_no_object_is_refused(self, body: bytes) -> None:
        with pytest.raises(BadRequest, match="must be a JSON object"):
            parse(body)

    def test_escaped_pairs_and_backslashes_are_text(self) -> None:
        assert parse(b'{"a": "\\ud83d\\ude00", "b": "\\\\ud800"}') == {"a": "😀", "b": "\\ud800"}

    @given(st.binary(max_size=60))
    def test_any_bytes_are_an_object_or_a_refusal(self, body: bytes) -> None:
        try:
            document = parse(body)
        except BadRequest:
            return
        json.dumps(document, ensure_ascii=False).encode()


class _Small(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    a: int
    b: list[int] = []


def fault(document: dict[str, Any]) -> BadRequest:
    with pytest.raises(ValidationError) as error:
        _Small.model_validate(document)
    return bad_request(error.value)


class TestBadRequest:
    def test_fault_names_its_field(self) -> None:
        error = fault({"a": 1, "b": [1, "x"]})
        assert error.param == "b.1"
        assert error.message == "b.1: Input should be a valid integer"

    def test_at_most_three_faults_are_shown(self) -> None:
        assert fault({"a": "x", "b": ["x"] * 10}).message.count(";") == 2

    def test_huge_key_is_cut_in_the_answer(self) -> None:
        error = fault({"a": 1, "k" * 1_000_000: 1})
        assert error.param == "k" * MAX_LOCATION_CHARS
        assert len(error.message) < 2 * MAX_LOCATION_CHARS

    def test_fault_of_the_whole_body_is_called_body(self) -> None:
        with pytest.raises(ValidationError) as error:
            _Small.model_validate([])
        assert bad_request(error.value).param == "body"


class TestErrorResponse:
    def test_body_status_and_headers(self) -> None:
        response = error_response(NoCapacity("later", retry_after_s=3))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert json.loads(bytes(response.body)) == NoCapacity("later").body()

    @pytest.mark.parametrize(
        ("status", "kind"),
        [(404, NotFound), (405, MethodNotAllowed), (400, BadRequest), (422, BadRequest), (500, InternalFault)],
    )
    def test_frameworks_errors_take_our_shape(self, status: int, kind: type[ServeError]) -> None:
        assert type(from_http_exception(HTTPException(status, "no"))) is kind


Events = AsyncGenerator[Mapping[str, object], None]


@dataclass
class Source:
    """A stream of events that knows whether it was ended."""

    items: list[Mapping[str, object] | BaseException]
    is_closed: bool = False

    async def events(self) -> Events:
        try:
            for item in self.items:
                await asyncio.sleep(0)
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.is_closed = True


def streamed(*items: Mapping[str, object] | BaseException) -> list[Any]:
    """Data of each event that a client sees."""
    source = Source(list(items))
    exchange = Exchange([])

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def body() -> None:
        await event_stream(source.events())(http_scope(), never, exchange.send)

    run(body)
    assert exchange.status == 200
    assert source.is_closed
    blocks = exchange.body.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


class TestEventStream:
    def test_events_are_framed_and_end_with_done(self) -> None:
        assert streamed({"a": 1}, {"b": "line\nbreak ü"}) == ['{"a":1}', '{"b":"line\\nbreak ü"}', "[DONE]"]

    def test_no_events_still_end_with_done(self) -> None:
        assert streamed() == ["[DONE]"]

    def test_error_after_the_first_event_becomes_an_event(self) -> None:
        first, error, done = streamed({"a": 1}, NoCapacity("gone"), {"never": 1})
        assert first == '{"a":1}'
        assert json.loads(error) == NoCapacity("gone").body()
        assert done == "[DONE]"

    def test_unforeseen_error_becomes_an_event_without_its_text(self) -> None:
        first, error, done = streamed({"a": 1}, ValueError("member 4711"))
        assert json.loads(error) == InternalFault("internal error").body()
        assert "4711" not in error
        assert (first, done) == ('{"a":1}', "[DONE]")

    def test_headers_keep_proxies_from_holding_events_back(self) -> None:
        response = event_stream(Source([]).events())
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["content-type"].startswith("text/event-stream")

    def test_cancelled_while_waiting_the_source_is_ended(self) -> None:
        source = Source([{"a": 1}])
        waiting = asyncio.Event()

        async def events() -> Events:
            async for event in source.events():
                yield event
            waiting.set()
            await asyncio.Event().wait()

        async def body() -> None:
            exchange = Exchange([])
            never = asyncio.Event().wait
            task = asyncio.create_task(event_stream(events())(http_scope(), never, exchange.send))  # type: ignore[arg-type]
            await waiting.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        run(body)
        assert source.is_closed

    def test_reader_that_stops_between_events_ends_the_source_at_once(self) -> None:
        source = Source([{"a": 1}, {"b": 2}])

        async def body() -> None:
            chunks = event_stream(source.events()).body_iterator
            assert isinstance(chunks, AsyncGenerator)
            await anext(chunks)
            assert not source.is_closed
            await chunks.aclose()
            assert source.is_closed

        run(body)

    @given(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3))
    def test_any_text_survives_the_framing(self, event: dict[str, str]) -> None:
        framed = sse(event)
        assert framed.endswith(b"\n\n")
        assert framed.count(b"\n") == 2
        assert json.loads(framed.decode().removeprefix("data: ")) == event


class TestWithFirst:
    def test_all_events_come_in_order(self) -> None:
        async def body() -> None:
            source = Source([{"a": 1}, {"b": 2}, {"c": 3}])
            replay = await with_first(source.events())
            assert [event async for event in replay()] == [{"a": 1}, {"b": 2}, {"c": 3}]
            assert source.is_closed

        run(body)

    def test_error_before_the_first_event_is_raised_where_it_can_become_a_status(self) -> None:
        async def body() -> None:
            with pytest.raises(NoCapacity):
                await with_first(Source([NoCapacity("none")]).events())

        run(body)

    def test_error_after_the_first_event_comes_in_its_place(self) -> None:
        async def body() -> None:
            replay = (await with_first(Source([{"a": 1}, NoCapacity("gone")]).events()))()
            assert await anext(replay) == {"a": 1}
            with pytest.raises(NoCapacity):
                await anext(replay)

        run(body)

    @pytest.mark.parametrize("num_read", [1, 2])
    def test_reader_that_stops_ends_the_source(self, num_read: int) -> None:
        async def body() -> None:
            source = Source([{"a": 1}, {"b": 2}, {"c": 3}])
            replay: AsyncIterator[Mapping[str, object]] = (await with_first(source.events()))()
            assert isinstance(replay, AsyncGenerator)
            for _ in range(num_read):
                await anext(replay)
            await replay.aclose()
            assert source.is_closed

        run(body)

    def test_reader_that_never_starts_leaves_nothing_open(self) -> None:
        async def body() -> None:
            source = Source([{"a": 1}, {"b": 2}])
            replay = await with_first(source.events())
            del replay
            await settle()
            assert source.is_closed

        run(body)
