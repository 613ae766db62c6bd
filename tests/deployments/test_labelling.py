"""Labels of tokens against a brute force over characters, and what must hold of any labelling."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.trust.labelling import TextSpan, label_tokens, unlabelled, with_private_end
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan, zone_at

PLAN = Zone.parse("tenant/t/plan/p")
OTHER_PLAN = Zone.parse("tenant/t/plan/q")
CASE = Zone.parse("tenant/t/case/c")
FOREIGN_CASE = Zone.parse("tenant/u/case/c")
ZONES = [PUBLIC, PLAN, OTHER_PLAN, CASE, FOREIGN_CASE, EPHEMERAL]


def zones_of(labels: tuple[ZoneSpan, ...]) -> list[Zone]:
    """Zone of each token, by the spans alone."""
    starts = [0, *(label.end for label in labels)]
    return [label.zone for start, label in zip(starts, labels, strict=False) for _ in range(start, label.end)]


def by_character(offsets: list[tuple[int, int]], spans: list[TextSpan], scaffold: Zone) -> list[Zone]:
    """Brute force: a token's zone is the join of every labelled character up to its last one."""
    zones = []
    reached = 0
    for start, end in offsets:
        reached = max(reached, end, start + 1)
        covered = [span.zone for span in spans for at in range(span.start, span.end) if at < reached]
        zones.append(functools.reduce(Zone.join, covered, scaffold))
    return zones


@st.composite
def labelled_texts(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[TextSpan], Zone]:
    """Tokens that tile a text, but for gaps and characters split over several tokens; spans with gaps."""
    offsets: list[tuple[int, int]] = []
    at = 0
    for length, gap, copies in draw(
        st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2), st.sampled_from([1, 1, 1, 3])), max_size=20)
    ):
        at += gap
        offsets += [(at, at + length)] * copies
        at += length
    spans: list[TextSpan] = []
    at = 0
    for gap, length, zone in draw(
        st.lists(st.tuples(st.integers(0, 6), st.integers(1, 15), st.sampled_from(ZONES)), max_size=6)
    ):
        spans.append(TextSpan(at + gap, at + gap + length, zone))
        at += gap + length
    return offsets, spans, draw(st.sampled_from([PUBLIC, PLAN, EPHEMERAL]))


def test_each_token_gets_the_zone_of_the_text_it_lies_in() -> None:
    spans = [TextSpan(0, 10, PUBLIC), TextSpan(10, 20, PLAN), TextSpan(20, 30, CASE)]
    labels = label_tokens([(0, 5), (5, 10), (10, 20), (20, 25), (25, 30)], spans, scaffold=PUBLIC)
    assert labels == (ZoneSpan(2, PUBLIC), ZoneSpan(3, PLAN), ZoneSpan(5, CASE))


def test_token_over_a_boundary_is_as_private_as_its_most_private_character() -> None:
    spans = [TextSpan(0, 10, PUBLIC), TextSpan(10, 20, CASE)]
    assert label_tokens([(0, 9), (9, 11), (11, 20)], spans, scaffold=PUBLIC) == (
        ZoneSpan(1, PUBLIC),
        ZoneSpan(3, CASE),
    )


def test_text_behind_a_private_span_stays_private() -> None:
    spans = [TextSpan(0, 4, CASE), TextSpan(4, 8, PUBLIC)]
    assert zones_of(label_tokens([(0, 4), (4, 8), (8, 12)], spans, scaffold=PUBLIC)) == [CASE] * 3


def test_template_scaffold_adds_nothing() -> None:
    spans = [TextSpan(4, 8, PLAN), TextSpan(12, 16, CASE)]
    offsets = [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
    assert zones_of(label_tokens(offsets, spans, scaffold=PUBLIC)) == [PUBLIC, PLAN, PLAN, CASE, CASE]


def test_two_tenants_in_one_prompt_are_cached_for_nobody() -> None:
    spans = [TextSpan(0, 4, CASE), TextSpan(4, 8, FOREIGN_CASE)]
    assert zones_of(label_tokens([(0, 4), (4, 8)], spans, scaffold=PUBLIC)) == [CASE, EPHEMERAL]


def test_token_without_characters_takes_the_zone_of_what_follows() -> None:
    spans = [TextSpan(0, 4, PUBLIC), TextSpan(4, 8, CASE)]
    assert zones_of(label_tokens([(0, 4), (4, 4), (4, 8)], spans, scaffold=PUBLIC)) == [PUBLIC, CASE, CASE]


def test_no_tokens_have_no_labels() -> None:
    assert label_tokens([], [TextSpan(0, 4, CASE)], scaffold=PUBLIC) == ()


@pytest.mark.parametrize(
    "spans",
    [
        [TextSpan(10, 20, PUBLIC), TextSpan(0, 10, CASE)],
        [TextSpan(0, 12, PUBLIC), TextSpan(10, 20, CASE)],
        [TextSpan(0, 10, PUBLIC), TextSpan(12, 10, CASE)],
    ],
)
def test_spans_out_of_order_are_refused_because_a_private_one_could_be_passed_over(spans: list[TextSpan]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        label_tokens([(0, 5), (5, 20)], spans, scaffold=PUBLIC)


@given(labelled_texts())
def test_labels_equal_the_brute_force(case: tuple[list[tuple[int, int]], list[TextSpan], Zone]) -> None:
    offsets, spans, scaffold = case
    assert zones_of(label_tokens(offsets, spans, scaffold=scaffold)) == by_character(offsets, spans, scaffold)


@given(labelled_texts())
def test_spans_cover_every_token_once_and_only_grow_more_private(
    case: tuple[list[tuple[int, int]], list[TextSpan], Zone],
) -> None:
    offsets, spans, scaffold = case
    labels = label_tokens(offsets, spans, scaffold=scaffold)
    assert len(zones_of(labels)) == len(offsets)
    ends = [label.end for label in labels]
    assert ends == sorted(set(ends))
    assert len({label.zone for label in labels}) == len(labels)
    for before, after in itertools.pairwise(labels):
        assert before.zone.join(after.zone) == after.zone


@given(labelled_texts())
def test_no_token_is_less_private_than_any_character_up_to_its_end(
    case: tuple[list[tuple[int, int]], list[TextSpan], Zone],
) -> None:
    offsets, spans, scaffold = case
    for (_, end), zone in zip(offsets, zones_of(label_tokens(offsets, spans, scaffold=scaffold)), strict=True):
        for span in spans:
            if span.start < end:
                assert zone.join(span.zone) == zone


@given(labelled_texts())
@settings(max_examples=50)
def test_the_engine_reads_the_same_zone_from_the_spans(
    case: tuple[list[tuple[int, int]], list[TextSpan], Zone],
) -> None:
    offsets, spans, scaffold = case
    labels = label_tokens(offsets, spans, scaffold=scaffold)
    for index, zone in enumerate(zones_of(labels)):
        assert zone_at(labels, index) == zone


def test_unlabelled_prompt_is_ephemeral_from_end_to_end() -> None:
    assert unlabelled(7) == (ZoneSpan(7, EPHEMERAL),)
    assert unlabelled(7, CASE) == (ZoneSpan(7, CASE),)


@given(labelled_texts(), st.sampled_from(ZONES))
def test_only_the_last_token_is_closed_and_all_that_follows_it(
    text: tuple[list[tuple[int, int]], list[TextSpan], Zone], private: Zone
) -> None:
    offsets, spans, scaffold = text
    labels = label_tokens(offsets, spans, scaffold=scaffold)
    if not labels:
        return
    closed = with_private_end(labels, private)
    assert zones_of(closed)[:-1] == zones_of(labels)[:-1]
    assert zones_of(closed)[-1] == zones_of(labels)[-1].join(private)
    assert zone_at(closed, len(offsets) + 5) == zones_of(labels)[-1].join(private)
    assert with_private_end(closed, private) == closed


def test_a_prompt_of_one_token_can_be_closed() -> None:
    assert with_private_end(unlabelled(1, PUBLIC), CASE) == (ZoneSpan(1, CASE),)
    assert with_private_end(unlabelled(3, PUBLIC), CASE) == (ZoneSpan(2, PUBLIC), ZoneSpan(3, CASE))
