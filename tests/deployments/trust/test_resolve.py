"""Zones of a call's texts: what the credential gives, narrowed by policy and manifests, never widened by the client."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deployments.trust.policy import DEFAULT_POLICY, DecisionReason, Policy, Verb, load_policy
from deployments.trust.principals import Principal
from deployments.trust.resolve import (
    CASE_KEY,
    MAX_SEGMENTS,
    SEGMENTS_KEY,
    ContradictionReason,
    Resolution,
    Withheld,
    WithheldReason,
    ZoneContradiction,
    per_tenant,
    permit,
    resolve,
)
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneKind
from tests.deployments.trust.test_policy import BAD_PARTS, any_rules, policy, rule_of

C1, C2, C3 = (Zone.parse(f"tenant/acme/case/{name}") for name in ("c1", "c2", "c3"))
GOLD = Zone.parse("tenant/acme/plan/gold")
RIVAL_PLAN, RIVAL_CASE = Zone.parse("tenant/rival/plan/gold"), Zone.parse("tenant/rival/case/c1")
ANN = Principal("ann", "acme", EPHEMERAL, cases=frozenset({C1, C2}))
BOB = Principal("bob", "acme", C1)
SHIPPED = load_policy(DEFAULT_POLICY)
STRICT = Policy.model_validate(yaml.safe_load(DEFAULT_POLICY.read_text(encoding="utf-8")) | {"strict": True})
LISTED = {("system", "d-system"): PUBLIC, ("rubric", "d-rubric"): GOLD}


def zones_of(
    principal: Principal = ANN,
    digests: tuple[str, ...] = ("d-any",),
    *,
    under: Policy = SHIPPED,
    claimed: tuple[object, ...] = (),
    listed: dict[tuple[str, str], Zone] = LISTED,
    **metadata: str,
) -> Resolution:
    names = {"case": CASE_KEY, "segments": SEGMENTS_KEY}
    return resolve(
        principal,
        under,
        digests=digests,
        metadata={names.get(key, key): value for key, value in metadata.items()},
        claimed=claimed,
        listed=lambda segment_id, digest: listed.get((segment_id, digest)),
    )


def reason_for(principal: Principal = ANN, **options: object) -> ContradictionReason:
    with pytest.raises(ZoneContradiction) as refusal:
        zones_of(principal, **options)  # type: ignore[arg-type]
    assert str(refusal.value) == refusal.value.reason.value
    return refusal.value.reason


SHARED = ("d-system", "d-rubric", "d-question")


def test_unlabelled_text_is_cached_for_nobody() -> None:
    assert zones_of(ANN, ("d-system", "d-any")).grant.zones == (EPHEMERAL, EPHEMERAL)


def test_unlabelled_text_of_a_key_for_one_case_goes_there() -> None:
    resolution = zones_of(BOB)
    assert resolution.grant.zones == (C1,)
    assert [(each.verb, each.zone, each.allowed) for each in resolution.grant.decisions] == [
        (Verb.READ, C1, True),
        (Verb.WRITE, C1, True),
    ]
    assert {each.policy_digest for each in resolution.grant.decisions} == {SHIPPED.digest}


def test_call_may_name_a_case_that_the_principal_owns() -> None:
    assert zones_of(ANN, case="c2").grant.zones == (C2,)
    assert zones_of(BOB, case="c1").grant.zones == (C1,)


@pytest.mark.parametrize("principal", [ANN, BOB])
def test_case_of_somebody_else_is_a_contradiction(principal: Principal) -> None:
    assert reason_for(principal, case="c3") is ContradictionReason.NOT_ITS_CASE


@pytest.mark.parametrize("name", [*BAD_PARTS, "*", "{tenant}", "tenant/acme/case/c1", "tenant/rival/case/c1"])
def test_case_that_is_no_name_is_a_contradiction(name: str) -> None:
    assert reason_for(case=name) is ContradictionReason.MALFORMED_CASE


def test_listed_segments_are_shared_and_the_rest_is_private() -> None:
    resolution = zones_of(ANN, SHARED, segments="system,rubric", case="c1")
    assert resolution.grant.zones == (PUBLIC, GOLD, C1)
    assert resolution.withheld == ()
    assert zones_of(ANN, SHARED, segments="system,rubric").grant.zones == (PUBLIC, GOLD, EPHEMERAL)


def test_text_that_is_not_the_listed_one_is_private() -> None:
    resolution = zones_of(ANN, ("d-system", "d-edited", "d-question"), segments="system,rubric,system", case="c1")
    assert resolution.grant.zones == (PUBLIC, C1, C1)
    assert resolution.withheld == (
        Withheld(1, "rubric", WithheldReason.NOT_LISTED),
        Withheld(2, "system", WithheldReason.NOT_LISTED),
    )


def test_plan_that_the_policy_withholds_is_private() -> None:
    under = policy(
        rule_of("*", "public", allow=["read"]), rule_of("*", "tenant/{tenant}/case/*", allow=["read", "write"])
    )
    resolution = zones_of(ANN, SHARED, under=under, segments="system,rubric", case="c1")
    assert resolution.grant.zones == (PUBLIC, C1, C1)
    assert resolution.withheld == (Withheld(1, "rubric", WithheldReason.NOT_ALLOWED),)
    assert [each.reason for each in resolution.grant.decisions if not each.allowed] == [DecisionReason.NO_RULE]


@pytest.mark.parametrize("zone", [RIVAL_PLAN, RIVAL_CASE, C3, EPHEMERAL, Zone.parse("tenant/acme/mixed")])
def test_listing_outside_of_what_may_be_shared_with_the_tenant_gives_nothing(zone: Zone) -> None:
    resolution = zones_of(ANN, SHARED, segments="x", listed={("x", "d-system"): zone}, case="c1")
    assert resolution.grant.zones == (C1, C1, C1)


@pytest.mark.parametrize(
    "listing",
    ["", ",", "system,", ",system", "system, rubric", "a,b,c,d", "System", "sys\x00tem", "x" * 10_000, "{tenant}",
     ",".join(["system"] * (MAX_SEGMENTS + 1))],
)  # fmt: skip
def test_segments_that_are_no_ids_are_a_contradiction(listing: str) -> None:
    assert reason_for(digests=SHARED, segments=listing) is ContradictionReason.MALFORMED_SEGMENTS


def test_number_of_segments_is_bounded_whatever_the_number_of_texts() -> None:
    texts = ("d-system",) * 200
    assert len(zones_of(ANN, texts, segments=",".join(["system"] * MAX_SEGMENTS)).grant.zones) == 200
    listing = ",".join(["system"] * (MAX_SEGMENTS + 1))
    assert reason_for(digests=texts, segments=listing) is ContradictionReason.MALFORMED_SEGMENTS


@pytest.mark.parametrize("value", ["public", "ephemeral", "tenant/acme/plan/gold", "tenant/acme/mixed", C1.path])
def test_zone_that_a_client_claims_within_its_credential_changes_nothing(value: str) -> None:
    assert zones_of(ANN, claimed=(value,)) == zones_of(ANN)


@pytest.mark.parametrize(
    "value",
    [RIVAL_PLAN.path, RIVAL_CASE.path, "tenant/rival/mixed", C3.path, "", "c1", "Public", "tenant/../case/c1",
     "tenant/acme/case/ｃ1", "tenant/acme/case/c%31", "x" * 10_000, None, 7, True, ["public"], {"zone": "public"}],
)  # fmt: skip
def test_zone_that_a_client_claims_beyond_its_credential_is_a_contradiction(value: object) -> None:
    assert reason_for(claimed=("public", value)) is ContradictionReason.CLAIMED_ZONE


def test_case_that_the_policy_denies_is_refused_when_named_and_ephemeral_when_not() -> None:
    under = policy(rule_of("*", "tenant/{tenant}/case/*", allow=["read"]))  # no write
    with pytest.raises(ZoneContradiction) as refusal:
        zones_of(ANN, under=under, case="c1")
    assert refusal.value.reason is ContradictionReason.DENIED_BY_POLICY
    assert [(each.verb, each.allowed) for each in refusal.value.decisions] == [(Verb.READ, True), (Verb.WRITE, False)]
    assert zones_of(BOB, under=under).grant.zones == (EPHEMERAL,)


def test_other_metadata_is_the_clients_own() -> None:
    assert zones_of(ANN, zone="tenant/rival/case/c1", cases="x").grant.zones == (EPHEMERAL,)


# --- our own prompts, and strict ---


def test_review_gets_the_zones_that_it_is_meant_for() -> None:
    grant = permit(ANN, SHIPPED, [PUBLIC, GOLD, GOLD, C3], C3)  # the case of the claim, whoever's credential
    assert grant.zones == (PUBLIC, GOLD, GOLD, C3)
    assert len(grant.decisions) == 4  # each zone and verb once


def test_case_of_another_tenant_is_never_private_text_whatever_the_policy_allows() -> None:
    everything = policy(rule_of("*", "tenant/*/case/*", allow=["read", "write"]))
    assert permit(ANN, everything, [C1, RIVAL_CASE], RIVAL_CASE).zones == (EPHEMERAL, EPHEMERAL)


def test_strict_public_text_belongs_to_the_plan_behind_it() -> None:
    assert permit(ANN, STRICT, [PUBLIC, GOLD, C1], C1).zones == (GOLD, GOLD, C1)
    assert zones_of(ANN, SHARED, under=STRICT, segments="system,rubric", case="c1").grant.zones == (GOLD, GOLD, C1)
    resolution = zones_of(ANN, ("d-system", "d-any"), under=STRICT, segments="system", case="c1")
    assert resolution.grant.zones == (C1, C1)
    assert resolution.withheld == (Withheld(0, "system", WithheldReason.NOT_ALLOWED),)
    assert zones_of(ANN, ("d-system", "d-any"), under=STRICT, segments="system").grant.zones == (EPHEMERAL, EPHEMERAL)


@given(st.lists(st.sampled_from([PUBLIC, GOLD, C1]), max_size=6))
def test_per_tenant_leaves_no_public_zone_and_changes_no_other(zones: list[Zone]) -> None:
    replaced = per_tenant(zones, C2)
    assert PUBLIC not in replaced
    assert [new for old, new in zip(zones, replaced, strict=True) if old != PUBLIC] == [z for z in zones if z != PUBLIC]


names = st.sampled_from(["a", "b"])
any_zones = st.sampled_from([PUBLIC, EPHEMERAL, GOLD, C1, C3, RIVAL_PLAN, RIVAL_CASE, Zone.parse("tenant/acme/mixed")])


@given(st.lists(any_rules, max_size=5), st.booleans(), st.lists(any_zones, max_size=5), any_zones)
def test_nothing_is_granted_that_the_policy_does_not_allow(
    rules: list[object], strict: bool, asked: list[Zone], private: Zone
) -> None:
    under = policy(*rules, strict=strict)
    grant = permit(ANN, under, asked, private)
    assert len(grant.zones) == len(asked)
    for zone in grant.zones:
        match zone.kind:
            case ZoneKind.PUBLIC | ZoneKind.PLAN:
                assert under.decide(ANN, Verb.READ, zone).allowed
                assert not strict or zone.tenant == ANN.tenant
            case ZoneKind.CASE:
                assert zone == private
                assert zone.tenant == ANN.tenant
                assert all(under.decide(ANN, verb, zone).allowed for verb in (Verb.READ, Verb.WRITE))
            case _:
                assert zone == EPHEMERAL
