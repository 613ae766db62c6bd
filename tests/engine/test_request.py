"""A request's parameters, states, zones and counts."""

from __future__ import annotations

import pytest

from engine.errors import IntegrityError
from engine.request import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, Request, RequestStatus, SamplingParams
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan
from tests.engine.toy_model import CASE, PLAN, make_request

S = RequestStatus
ALLOWED = {
    (S.WAITING, S.RUNNING),
    (S.WAITING, S.RESERVED),
    (S.WAITING, S.FINISHED),
    (S.RESERVED, S.RUNNING),
    (S.RESERVED, S.WAITING),
    (S.RESERVED, S.FINISHED),
    (S.RUNNING, S.WAITING),
    (S.RUNNING, S.HELD),
    (S.RUNNING, S.FINISHED),
    (S.HELD, S.FINISHED),
}


@pytest.mark.parametrize("source", list(S))
@pytest.mark.parametrize("target", list(S))
def test_only_the_tables_transitions_are_allowed(source: RequestStatus, target: RequestStatus) -> None:
    request = make_request("r", [1])
    request.status = source
    if (source, target) in ALLOWED:
        request.transition(target)
        assert request.status is target
        assert request.is_finished == (target is S.FINISHED)
    else:
        with pytest.raises(IntegrityError, match="not allowed"):
            request.transition(target)
        assert request.status is source


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"max_tokens": 3, "min_tokens": 4},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.1},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": ("",)},
        {"stop": ("x",) * (MAX_STOP_STRINGS + 1)},
        {"logprobs": MAX_TOP_LOGPROBS + 1},
        {"logprobs": -1},
    ],
)
def test_a_parameter_out_of_range_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        SamplingParams(**changes)  # type: ignore[arg-type]


def test_a_request_without_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt"):
        Request("r", (), SamplingParams())


@pytest.mark.parametrize("ends", [(4, 4), (6, 4)])
def test_spans_that_do_not_ascend_are_refused(ends: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        make_request("r", range(8), [ZoneSpan(ends[0], PUBLIC), ZoneSpan(ends[1], CASE)])


def test_tokens_of_prompt_and_output_are_one_sequence() -> None:
    request = make_request("r", [1, 2, 3])
    request.output_token_ids += [4, 5]
    assert request.num_tokens == 5
    assert request.token_ids(0, 5) == (1, 2, 3, 4, 5)
    assert request.token_ids(2, 4) == (3, 4)
    assert request.token_ids(3, 5) == (4, 5)
    assert request.token_ids(1, 2) == (2,)


def test_a_block_has_the_zone_of_its_last_token() -> None:
    spans = [ZoneSpan(6, PUBLIC), ZoneSpan(9, PLAN), ZoneSpan(12, CASE)]
    request = make_request("r", range(12), spans)
    assert [request.zone_of_block(index, 4) for index in range(4)] == [PUBLIC, PLAN, CASE, CASE]
    assert request.zone == CASE


def test_prompt_tokens_past_the_last_span_are_ephemeral() -> None:
    request = make_request("r", range(12), [ZoneSpan(6, PUBLIC)])
    assert [request.zone_of_block(index, 4) for index in range(4)] == [PUBLIC, EPHEMERAL, EPHEMERAL, EPHEMERAL]
    assert request.zone == EPHEMERAL


def test_a_request_without_spans_is_ephemeral() -> None:
    assert Request("r", (1, 2), SamplingParams()).zone == EPHEMERAL


def test_the_requests_epoch_is_that_of_its_own_zone_only() -> None:
    spans = [ZoneSpan(4, PUBLIC), ZoneSpan(8, PLAN, epoch=3), ZoneSpan(12, CASE)]
    request = make_request("r", range(12), spans, epoch=7)
    assert [request.epoch_of(zone) for zone in (PUBLIC, PLAN, CASE)] == [0, 3, 7]
    assert request.epoch_of(Zone.parse("tenant/acme/plan/other")) == 0


def test_computed_tokens_are_attributed_once() -> None:
    request = make_request("r", range(10))
    request.num_computed_tokens = request.num_attributed_tokens = 4  # a prefix hit
    assert request.advance(4) == 0
    request.num_lost_tokens, request.num_computed_tokens = 8, 0  # preempted
    assert request.advance(6) == 6
    assert request.advance(4) == 2
    assert (request.num_local_prompt_tokens, request.num_recomputed_tokens) == (6, 8)
    assert request.num_pending_tokens == 0
