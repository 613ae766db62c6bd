"""Admission: a bound that holds, and a Retry-After that follows the drain rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.routing.admission import DEFAULT_RETRY_AFTER_S, DRAIN_WINDOW, MAX_RETRY_AFTER_S, Admission
from tests.deployments.support import Clock


def test_places_are_given_until_all_are_taken_and_again_when_one_is_given_back() -> None:
    admission = Admission(2, Clock())
    assert [admission.admit(), admission.admit(), admission.admit()] == [True, True, False]
    assert admission.num_inflight == 2
    admission.finish()
    assert admission.admit()


def test_several_places_are_given_together_or_not_at_all() -> None:
    admission = Admission(4, Clock())
    assert admission.admit(3)
    assert not admission.admit(2)
    assert admission.num_inflight == 3
    assert admission.admit(1)
    admission.finish(3)
    assert admission.num_inflight == 1


def test_giving_back_what_was_not_taken_is_a_programming_error() -> None:
    admission = Admission(2, Clock())
    with pytest.raises(AssertionError):
        admission.finish()
    assert admission.admit()
    with pytest.raises(AssertionError):
        admission.finish(2)


def test_without_measurements_the_answer_is_a_default() -> None:
    clock = Clock()
    admission = Admission(1, clock)
    assert admission.retry_after_s() == DEFAULT_RETRY_AFTER_S
    admission.admit()
    clock.now = 30.0
    admission.finish()
    assert admission.retry_after_s() == DEFAULT_RETRY_AFTER_S


def test_retry_after_is_the_mean_gap_between_recent_ends() -> None:
    clock = Clock()
    admission = Admission(8, clock)
    for second in (0, 10, 20, 30):
        clock.now = float(second)
        admission.admit()
        admission.finish()
    clock.now = 40.0
    assert admission.retry_after_s() == 10.0


def test_retry_after_is_bounded_both_ways() -> None:
    clock = Clock()
    admission = Admission(8, clock)
    for _ in range(2):
        admission.admit()
        admission.finish()
    assert admission.retry_after_s() == DEFAULT_RETRY_AFTER_S
    clock.now = 1e9
    assert admission.retry_after_s() == MAX_RETRY_AFTER_S


def test_refusal_leaves_the_drain_rate_alone() -> None:
    clock = Clock()
    admission = Admission(4, clock)
    for second in (0, 20, 40):
        clock.now = float(second)
        admission.admit(4)
        admission.finish(4)
    clock.now = 60.0
    before = admission.retry_after_s()
    admission.admit(3)
    assert not any(admission.admit(2) for _ in range(50))
    assert admission.retry_after_s() == before


def test_only_the_latest_ends_count() -> None:
    clock = Clock()
    admission = Admission(1, clock)
    for _ in range(DRAIN_WINDOW):  # one every 50 s, then one every 2 s
        clock.now += 50.0
        admission.admit()
        admission.finish()
    for _ in range(DRAIN_WINDOW):
        clock.now += 2.0
        admission.admit()
        admission.finish()
    assert admission.retry_after_s() == pytest.approx(2.0, rel=0.05)


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.integers(1, 3)), max_size=60))
def test_places_taken_never_exceed_the_limit_nor_fall_below_none(limit: int, steps: list[tuple[bool, int]]) -> None:
    admission = Admission(limit, Clock())
    held: list[int] = []
    for takes, count in steps:
        if takes:
            fits = sum(held) + count <= limit
            assert admission.admit(count) is fits
            if fits:
                held.append(count)
        elif held:
            admission.finish(held.pop())
        assert admission.num_inflight == sum(held)
