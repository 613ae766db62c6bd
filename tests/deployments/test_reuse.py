"""What callers are told of prefix reuse: of their own zones, and only where it is asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.claims.prompt import LabelledPrompt, Segment
from deployments.client import DecodeClient
from deployments.generation import Completed, GenerationService, Timeline
from deployments.messages import Provenance, TokenEvent
from deployments.metrics import IngressMetrics
from deployments.openai_shapes import ChatShape, CompletionShape
from deployments.reuse import ReuseReport
from deployments.reviews import ServedReviewModel
from deployments.trust.principals import Principal
from deployments.trust.resolve import Grant
from deployments.trust.zone_grant import GrantSealer
from engine.tokenizer import Tokenizer
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan
from tests.deployments.support import Handle, local_config

PLAN, CASE = Zone.parse("tenant/t/plan/p"), Zone.parse("tenant/t/case/c")
ORIGINS = ("decode_cache", "prefill_cache", "prefill_computed", "decode_computed")
counts = st.tuples(*[st.integers(0, 50)] * 4).filter(any)


def spans(*ends: tuple[int, Zone]) -> tuple[ZoneSpan, ...]:
    return tuple(ZoneSpan(end, zone) for end, zone in ends)


def came_from(*tokens: int, pushed_bytes: int = 0) -> Provenance:
    return Provenance(dict(zip(ORIGINS, tokens, strict=True)), pushed_bytes=pushed_bytes)


@pytest.mark.parametrize(
    ("zone_spans", "num_shared"),
    [
        (spans((10, PUBLIC), (30, PLAN), (40, CASE)), 10),
        (spans((5, PUBLIC), (10, PUBLIC), (40, CASE)), 10),
        (spans((10, PLAN), (40, PUBLIC)), 0),  # behind private text it is the plan's own
        (spans((40, CASE)), 0),
        (spans((40, EPHEMERAL)), 0),
        (spans((40, PUBLIC)), 40),
    ],
)
def test_the_callers_own_text_begins_where_the_public_text_ends(
    zone_spans: tuple[ZoneSpan, ...], num_shared: int
) -> None:
    report = ReuseReport.of(zone_spans, is_told=True)
    assert (report.num_tokens, report.num_shared) == (40, num_shared)


@pytest.mark.parametrize(
    ("origins", "cached", "told"),
    [
        ((0, 0, 40, 0), 0, (10, 0, 0, 30, 0)),
        ((10, 0, 30, 0), 0, (10, 0, 0, 30, 0)),  # the public text alone was cached: as if it were not
        ((8, 0, 32, 0), 0, (10, 0, 0, 30, 0)),
        ((16, 0, 24, 0), 6, (10, 6, 0, 24, 0)),
        ((4, 12, 24, 0), 6, (10, 0, 6, 24, 0)),
        ((16, 16, 0, 8), 22, (10, 6, 16, 0, 8)),
    ],
)
def test_public_tokens_are_not_told_of(origins: tuple[int, ...], cached: int, told: tuple[int, ...]) -> None:
    report = ReuseReport.of(spans((10, PUBLIC), (40, CASE)), is_told=True)
    assert report.cached_tokens([came_from(*origins)]) == cached
    assert report.origins(came_from(*origins)) == dict(zip(("shared", *ORIGINS), told, strict=True))


@given(counts, st.integers(0, 60), st.integers(0, 10_000))
def test_origins_add_up_and_nothing_is_told_where_it_is_off(
    tokens: tuple[int, ...], num_public: int, pushed_bytes: int
) -> None:
    num_tokens = sum(tokens)
    end = min(num_public, num_tokens)
    zone_spans = spans((end, PUBLIC), (num_tokens, CASE))
    provenance = came_from(*tokens, pushed_bytes=pushed_bytes)
    on, off = (ReuseReport.of(zone_spans, is_told=is_told) for is_told in (True, False))
    told = on.origins(provenance)
    assert told is not None
    assert sum(told.values()) == num_tokens
    assert on.cached_tokens([provenance]) == told["decode_cache"] + told["prefill_cache"]
    assert 0 <= (on.pushed_bytes(provenance) or 0) <= pushed_bytes
    assert (off.origins(provenance), off.cached_tokens([provenance]), off.pushed_bytes(provenance)) == (None,) * 3


@given(st.integers(0, 10), st.integers(0, 10), st.integers(1, 30))
def test_what_of_the_public_text_was_cached_changes_nothing_that_is_told(first: int, second: int, cached: int) -> None:
    report = ReuseReport.of(spans((10, PUBLIC), (40, CASE)), is_told=True)
    apart = [came_from(found, 0, 40 - found, 0, pushed_bytes=1000 * (40 - found)) for found in (first, second)]
    assert report.cached_tokens(apart[:1]) == report.cached_tokens(apart[1:]) == 0
    assert report.origins(apart[0]) == report.origins(apart[1])
    assert report.pushed_bytes(apart[0]) == report.pushed_bytes(apart[1])
    by_prefill = came_from(first, 10 - first + cached, 30 - cached, 0)
    assert report.cached_tokens([by_prefill]) == cached


def test_choices_that_share_a_prompt_report_what_each_of_them_found() -> None:
    report = ReuseReport.of(spans((40, CASE)), is_told=True)
    assert report.cached_tokens([came_from(16, 0, 24, 0), came_from(0, 0, 40, 0)]) == 0
    assert report.cached_tokens([came_from(16, 0, 24, 0), came_from(0, 32, 8, 0)]) == 16
    assert report.cached_tokens([]) == 0


@pytest.mark.parametrize("kind", [ChatShape, CompletionShape])
@pytest.mark.parametrize("is_told", [True, False])
def test_usage_says_it_whole_and_streamed_or_not_at_all(kind: type[ChatShape], is_told: bool) -> None:
    report = ReuseReport.of(spans((10, PUBLIC), (40, CASE)), is_told=is_told)
    shape = kind("m", lambda token_id: b"x")
    end = TokenEvent((7,), "x", finish_reason="length", provenance=came_from(16, 0, 24, 0))

    async def events() -> AsyncGenerator[tuple[int, TokenEvent, Timeline], None]:
        yield 0, end, Timeline(0.0)

    async def last_chunk() -> Mapping[str, Any]:
        return [chunk async for chunk in shape.chunks(events(), report, include_usage=True)][-1]

    result = Completed("x", [7], [end], "length", provenance=came_from(16, 0, 24, 0))
    usage = {"prompt_tokens": 40, "completion_tokens": 1, "total_tokens": 41}
    if is_told:
        usage |= {"prompt_tokens_details": {"cached_tokens": 6}}  # type: ignore[dict-item]
    assert shape.whole(report, [result])["usage"] == usage
    assert asyncio.run(last_chunk())["usage"] == usage


class Labels:
    """Gives every segment the zone that it names."""

    principal = Principal("ann", "t", CASE)

    def label(self, prompt: LabelledPrompt) -> Grant:
        zones = tuple(Zone.parse(segment.zone) for segment in prompt.segments)
        return Grant(zones, zones[-1], ())


@pytest.mark.model
@pytest.mark.parametrize("tells_reuse", [True, False])
def test_a_review_is_told_of_its_own_text_or_of_none(tells_reuse: bool, tokenizer: Tokenizer) -> None:
    prompt = LabelledPrompt(
        (
            Segment("system", "public", "You review claims. " * 20, "system", "1", "test"),
            Segment("case", CASE.path, "The claim is for nine units.", "user", "1", "test"),
        )
    )
    end = TokenEvent((7,), "x", finish_reason="stop", provenance=came_from(90, 0, 0, 10, pushed_bytes=4096))
    metrics, config = IngressMetrics(), local_config()
    client = DecodeClient(Handle([[end]]), config.routing, metrics)
    service = GenerationService(
        client=client, config=config, affinity_key=b"k" * 32, grants=GrantSealer((b"g" * 32,)), metrics=metrics
    )
    model = ServedReviewModel(service, tokenizer, Labels(), tells_reuse=tells_reuse)  # type: ignore[arg-type]
    generation = asyncio.run(model.generate(prompt, json_schema=None, max_tokens=4, request_id="r"))
    told = (generation.prompt_tokens_by_origin, generation.pushed_bytes)
    if tells_reuse:
        assert told[0] is not None
        assert sum(told[0].values()) == 100
        assert 60 < told[0]["shared"] < 90
        assert told[0]["decode_cache"] == 90 - told[0]["shared"]
        assert told[1] == 0
    else:
        assert told == (None, None)
        assert json.dumps(generation.text) == '"x"'
