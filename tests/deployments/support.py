"""What the deployments tests share: a loop that notices leaks, a clock that is set, a stand-in for a Serve handle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray.serve.exceptions import RequestCancelledError

from deployments.config import BUNDLED, ZoneserveConfig, parse_config
from deployments.messages import GenerateCall, Provenance, RouteHint, TokenEvent
from engine.request import SamplingParams
from engine.zone import ZoneSpan

RUN_TIMEOUT_S = 10.0
GRANT_KEY = b"g" * 32
SETTLE_TICKS = 20


def run(body: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine within a limit; a task that it leaves behind fails the test."""

    async def guarded() -> None:
        async with asyncio.timeout(RUN_TIMEOUT_S) as limit:
            await body()
        assert not limit.expired(), "a test that expects a cancellation took the time limit's for it"
        await settle()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    asyncio.run(guarded())


async def reaches(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds that no event announces."""
    async with asyncio.timeout(RUN_TIMEOUT_S / 2):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Let everything that is ready run."""
    for _ in range(SETTLE_TICKS):
        await asyncio.sleep(0)


@dataclass
class Clock:
    """Seconds that pass only when a test says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def lines_of(logger_name: str) -> Iterator[list[str]]:
    """What a logger under `ray.serve` says, which Ray keeps from the root logger and so from caplog."""
    lines: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keeper, logger = Keeper(), logging.getLogger(logger_name)
    disabled_up_to, level = logger.manager.disable, logger.level
    logging.disable(logging.NOTSET)
    logger.addHandler(keeper)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(keeper)
        logging.disable(disabled_up_to)


def local_document() -> dict[str, Any]:
    """The bundled configuration as parsed YAML, fresh for each caller."""
    document: dict[str, Any] = yaml.safe_load((BUNDLED / "local.yaml").read_text(encoding="utf-8"))
    return document


def local_config(**sections: Mapping[str, Any]) -> ZoneserveConfig:
    """The bundled configuration with some keys of some sections replaced."""
    document = local_document()
    for name, changes in sections.items():
        document[name] = {**document.get(name, {}), **changes}
    return parse_config(document)


def write_yaml(path: Path, document: object) -> Path:
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def make_call(zone_spans: tuple[ZoneSpan, ...] = (), *, timeout_s: float = 5.0, max_tokens: int = 4) -> GenerateCall:
    return GenerateCall(
        "r-1", (1, 2, 3), SamplingParams(max_tokens=max_tokens), zone_spans, timeout_s, affinity=b"affinity"
    )


def token(token_id: int) -> TokenEvent:
    return TokenEvent(token_ids=(token_id,), text=f"<{token_id}>")


def last(token_id: int, reason: str = "stop", **origins: int) -> TokenEvent:
    return TokenEvent(
        token_ids=(token_id,), text=f"<{token_id}>", finish_reason=reason, provenance=Provenance(origins=origins)
    )


class Hold:
    """An item of a script: the stream waits here until it is cancelled."""


Script = list[TokenEvent | BaseException | Hold]


@dataclass
class Selection:
    replica_id: str

    @property
    def replica_metadata(self) -> dict[str, str]:
        return {"actor": f"actor of {self.replica_id}"}


class Response:
    """As `DeploymentResponseGenerator`: an asynchronous iterator that can be cancelled."""

    def __init__(self, script: Script) -> None:
        self._script = list(script)
        self._released = asyncio.Event()
        self.is_cancelled = False
        self.is_sent = False

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        await asyncio.sleep(0)
        if not self._script:
            raise StopAsyncIteration
        item = self._script.pop(0)
        if isinstance(item, Hold):
            await self._released.wait()
            if self.is_cancelled:
                raise RequestCancelledError
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item

    async def _fetch_future_result_async(self) -> None:
        """As Serve sends it: in a turn of the loop of its own. Before it, `cancel` does nothing that lasts."""
        await asyncio.sleep(0)
        self.is_sent = True

    def cancel(self) -> None:
        self.is_cancelled = self.is_sent
        self._released.set()


@dataclass
class Context:
    """As the context that `choose_replica` returns."""

    handle: Handle
    replica_id: str
    num_exits: int = 0
    is_entered: bool = False

    async def __aenter__(self) -> Selection:
        await asyncio.sleep(0)
        if self.handle.choose_hangs:
            await asyncio.Event().wait()
        if self.handle.choose_error is not None:
            raise self.handle.choose_error
        self.is_entered = True
        return Selection(self.replica_id)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0)
        self.num_exits += 1


@dataclass
class Handle:
    """A handle of the decode deployment. Attempt i plays `scripts[i]`."""

    scripts: list[Script]
    choose_hangs: bool = False
    choose_error: BaseException | None = None
    dispatch_error: BaseException | None = None
    contexts: list[Context] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    calls: list[GenerateCall] = field(default_factory=list)
    hints: list[RouteHint] = field(default_factory=list)

    def options(self, *, stream: bool, _by_reference: bool) -> Handle:
        assert stream
        assert not _by_reference, "tokens go over gRPC"
        return self

    @property
    def generate(self) -> Handle:
        return self

    def choose_replica(self, hint: RouteHint) -> Context:
        self.hints.append(hint)
        self.contexts.append(Context(self, f"replica-{len(self.contexts)}"))
        return self.contexts[-1]

    def dispatch(self, selection: Selection, call: GenerateCall) -> Response:
        self.calls.append(call)
        if self.dispatch_error is not None:
            raise self.dispatch_error
        self.responses.append(Response(self.scripts[len(self.responses)]))
        return self.responses[-1]

    def check_left_clean(self) -> None:
        """Every context that was entered was left, once, and no other."""
        for context in self.contexts:
            assert context.num_exits == int(context.is_entered)
