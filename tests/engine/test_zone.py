"""Zones: names, and a join that is a lattice's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneKind, ZoneSpan, zone_at

GOLD = Zone.parse("tenant/acme/plan/gold")
SILVER = Zone.parse("tenant/acme/plan/silver")
MIXED = Zone.parse("tenant/acme/mixed")
CASE = Zone.parse("tenant/acme/case/c1")
OTHER_CASE = Zone.parse("tenant/acme/case/c2")
RIVAL_PLAN = Zone.parse("tenant/rival/plan/gold")
RIVAL_CASE = Zone.parse("tenant/rival/case/c1")

names = st.sampled_from(["a", "b", "c"])
zones = st.one_of(
    st.just(PUBLIC),
    st.just(EPHEMERAL),
    st.builds(lambda tenant: Zone(ZoneKind.MIXED, tenant), names),
    st.builds(lambda tenant, name: Zone(ZoneKind.PLAN, tenant, name), names, names),
    st.builds(lambda tenant, name: Zone(ZoneKind.CASE, tenant, name), names, names),
)


@given(zones)
def test_join_is_idempotent_and_has_public_below_and_ephemeral_above(zone: Zone) -> None:
    assert zone.join(zone) == zone
    assert zone.join(PUBLIC) == zone
    assert zone.join(EPHEMERAL) == EPHEMERAL


@given(zones, zones)
def test_join_is_commutative_and_never_less_private(one: Zone, other: Zone) -> None:
    joined = one.join(other)
    assert joined == other.join(one)
    assert joined.kind >= max(one.kind, other.kind)
    assert joined.join(one) == joined


@given(zones, zones, zones)
def test_join_is_associative(one: Zone, other: Zone, third: Zone) -> None:
    assert one.join(other).join(third) == one.join(other.join(third))


@given(zones)
def test_a_path_parses_back_to_its_zone(zone: Zone) -> None:
    assert Zone.parse(zone.path) == zone
    assert str(zone) == zone.path


@pytest.mark.parametrize(
    ("one", "other", "joined"),
    [
        (GOLD, CASE, CASE),
        (GOLD, SILVER, MIXED),
        (MIXED, GOLD, MIXED),
        (MIXED, CASE, CASE),
        (CASE, OTHER_CASE, EPHEMERAL),
        (GOLD, RIVAL_PLAN, EPHEMERAL),
        (GOLD, RIVAL_CASE, EPHEMERAL),
        (CASE, RIVAL_CASE, EPHEMERAL),
    ],
)
def test_joins_follow_the_table(one: Zone, other: Zone, joined: Zone) -> None:
    assert one.join(other) == joined


def test_only_public_plan_and_case_are_cacheable() -> None:
    assert [zone.is_cacheable for zone in (PUBLIC, GOLD, CASE)] == [True] * 3
    assert [zone.is_cacheable for zone in (MIXED, EPHEMERAL)] == [False] * 2


def test_everything_past_a_plan_is_scrubbed() -> None:
    assert [zone.is_scrubbed for zone in (PUBLIC, GOLD, MIXED, CASE, EPHEMERAL)] == [False, False, True, True, True]


@pytest.mark.parametrize(
    "path",
    [
        "",
        "Public",
        "public/",
        "tenant/acme",
        "tenant/acme/plan/",
        "tenant/acme/plan/a/b",
        "tenant/../plan/x",
        "tenant/acme/case/a..b",
        "tenant/acme/case/Ünïcode",
        "tenant/acme/case/x\n",
        "tenant/acme/mixed/x",
        "tenant/acme/other/x",
        "tenant/acme/case/" + "x" * 65,
        "x" * 300,
    ],
)
def test_what_is_not_a_zone_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError):
        Zone.parse(path)


def test_a_token_has_the_join_of_all_spans_that_begin_before_it() -> None:
    spans = (ZoneSpan(4, PUBLIC), ZoneSpan(8, GOLD), ZoneSpan(12, CASE))
    assert [zone_at(spans, token) for token in (0, 3, 4, 7, 8, 11, 50)] == [
        PUBLIC,
        PUBLIC,
        GOLD,
        GOLD,
        CASE,
        CASE,
        CASE,
    ]


def test_a_later_span_that_is_wider_does_not_widen_the_zone() -> None:
    assert zone_at((ZoneSpan(4, CASE), ZoneSpan(8, PUBLIC)), 7) == CASE


def test_no_spans_mean_ephemeral() -> None:
    assert zone_at((), 0) == EPHEMERAL
