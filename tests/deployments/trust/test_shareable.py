"""What a prompt's segments may share, and that what this package shares by itself is signed like any other text."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from deployments.claims.plan import load_plan
from deployments.claims.prompt import LabelledPrompt, Segment, assemble, shared_segments
from deployments.trust import shareable
from deployments.trust.manifest import (
    Manifest,
    ManifestError,
    SharedSegment,
    kept_text,
    next_revision,
    publish,
    rfc3339,
    unix_time,
)
from deployments.trust.manifest_keys import TrustedKey, TrustedKeys, key_id_of
from deployments.trust.manifest_set import ManifestSet
from deployments.trust.shareable import (
    SHIPPED_RENEWAL_S,
    SHIPPED_VALIDITY_S,
    Denial,
    DenialReason,
    Publication,
    PublicationVetoed,
    label_segments,
    publish_shipped,
    shipped_publications,
)
from engine.zone import EPHEMERAL, PUBLIC, Zone
from tests.deployments.claims.builders import claim
from tests.deployments.support import Clock

PLAN, OTHER_PLAN = Zone.parse("tenant/acme/plan/gold"), Zone.parse("tenant/acme/plan/silver")
CASE, OTHER_CASE = Zone.parse("tenant/acme/case/c"), Zone.parse("tenant/acme/case/d")
FOREIGN_PLAN, FOREIGN_CASE = Zone.parse("tenant/other/plan/gold"), Zone.parse("tenant/other/case/c")
MIXED = Zone.parse("tenant/acme/mixed")
NOW = unix_time("2026-11-24T12:00:00Z")
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
LOCAL = TrustedKeys([TrustedKey(KEY.public_key(), ("public", "tenant/local/plan/*"))])
SHIPPED = {"tenant": "local", "plans": ["synthetic-ppo"], "approver": "local start"}


def segment(zone: Zone, identifier: str = "s", text: str = "text") -> Segment:
    return Segment(identifier, zone.path, text, "system", "1", "test")


def everything(_: Zone, __: str) -> bool:
    return True


def nothing(_: Zone, __: str) -> bool:
    return False


def zones_of(prompt: LabelledPrompt) -> list[Zone]:
    return [Zone.parse(item.zone) for item in prompt.segments]


def test_listed_segments_keep_their_zones() -> None:
    prompt = LabelledPrompt((segment(PUBLIC), segment(PLAN), segment(CASE)))
    assert label_segments(prompt, tenant="acme", is_shareable=everything, demote_to=CASE) == (prompt, ())


def test_unlisted_segment_is_ephemeral_and_all_after_it() -> None:
    prompt = LabelledPrompt((segment(PUBLIC, "a"), segment(PLAN, "b"), segment(CASE, "c")))
    labelled, denials = label_segments(prompt, tenant="acme", is_shareable=lambda zone, _: zone == PLAN)
    assert zones_of(labelled) == [EPHEMERAL] * 3
    digest = prompt.segments[0].content_digest
    assert denials == (Denial("a", digest, PUBLIC, EPHEMERAL, DenialReason.NOT_LISTED),)


def test_unlisted_segment_of_a_case_stays_in_the_case_and_what_stood_before_it_is_shared() -> None:
    prompt = LabelledPrompt((segment(PUBLIC, "a"), segment(PLAN, "b"), segment(PLAN, "c"), segment(CASE, "d")))
    labelled, denials = label_segments(
        prompt, tenant="acme", is_shareable=lambda zone, _: zone == PUBLIC, demote_to=CASE
    )
    assert zones_of(labelled) == [PUBLIC, CASE, CASE, CASE]
    assert [denial.segment_id for denial in denials] == ["b", "c"]


def test_listing_is_by_content_digest() -> None:
    prompt = LabelledPrompt((segment(PLAN, "a", "one"), segment(PLAN, "b", "two")))
    known = {prompt.segments[0].content_digest}
    labelled, denials = label_segments(
        prompt, tenant="acme", is_shareable=lambda _, digest: digest in known, demote_to=CASE
    )
    assert zones_of(labelled) == [PLAN, CASE]
    assert [(denial.segment_id, denial.asked, denial.given) for denial in denials] == [("b", PLAN, CASE)]


@pytest.mark.parametrize("zone", [FOREIGN_PLAN, FOREIGN_CASE])
def test_segment_that_asks_for_another_tenants_zone_is_ephemeral_whoever_lists_it(zone: Zone) -> None:
    prompt = LabelledPrompt((segment(PUBLIC), segment(zone)))
    labelled, denials = label_segments(prompt, tenant="acme", is_shareable=everything, demote_to=CASE)
    assert zones_of(labelled) == [PUBLIC, EPHEMERAL]
    assert [denial.reason for denial in denials] == [DenialReason.FOREIGN_TENANT]


def test_no_segment_may_ask_for_the_mixed_zone() -> None:
    labelled, denials = label_segments(LabelledPrompt((segment(MIXED),)), tenant="acme", is_shareable=everything)
    assert zones_of(labelled) == [EPHEMERAL]
    assert [denial.reason for denial in denials] == [DenialReason.NOT_A_SEGMENT_ZONE]


@pytest.mark.parametrize("zone", [PUBLIC, PLAN, MIXED, FOREIGN_CASE])
def test_text_is_demoted_to_a_private_zone_of_its_tenant_only(zone: Zone) -> None:
    with pytest.raises(ValueError, match="same tenant"):
        label_segments(LabelledPrompt((segment(PUBLIC),)), tenant="acme", is_shareable=nothing, demote_to=zone)


ZONES = [PUBLIC, PLAN, OTHER_PLAN, MIXED, CASE, OTHER_CASE, FOREIGN_PLAN, FOREIGN_CASE, EPHEMERAL]


@st.composite
def prompts(draw: st.DrawFn) -> LabelledPrompt:
    wanted = draw(st.lists(st.sampled_from(ZONES), min_size=1, max_size=6))
    joined, segments = wanted[0], []
    for index, zone in enumerate(wanted):
        joined = joined.join(zone)
        segments.append(segment(joined, f"s{index}", draw(st.sampled_from("xyz"))))
    return LabelledPrompt(tuple(segments))


@given(
    prompts(),
    st.sets(st.tuples(st.sampled_from(ZONES), st.sampled_from("xyz"))),
    st.sampled_from([EPHEMERAL, CASE, OTHER_CASE]),
)
def test_no_labelling_shares_what_is_not_listed(
    prompt: LabelledPrompt, listed: set[tuple[Zone, str]], demote_to: Zone
) -> None:
    by_digest = {(zone, segment(zone, text=text).content_digest) for zone, text in listed}
    labelled, denials = label_segments(
        prompt, tenant="acme", is_shareable=lambda zone, digest: (zone, digest) in by_digest, demote_to=demote_to
    )
    assert (labelled.system, labelled.user) == (prompt.system, prompt.user)
    denied = {denial.segment_id for denial in denials}
    if not denied:
        assert labelled == prompt
    for before, after in zip(prompt.segments, labelled.segments, strict=True):
        asked, given_zone = Zone.parse(before.zone), Zone.parse(after.zone)
        assert asked.join(given_zone) == given_zone or before.id in denied
        if given_zone in (PUBLIC, PLAN, OTHER_PLAN, FOREIGN_PLAN):
            assert given_zone.tenant in ("", "acme")
            assert (given_zone, before.text) in listed
        if before.id in denied:
            assert given_zone in (demote_to, EPHEMERAL)
            assert not (asked in (PUBLIC, PLAN, OTHER_PLAN) and (asked, before.text) in listed)
        assert given_zone.tenant != "other"


# --- what this package shares by itself ---


def load(folder: Path, now: float = NOW, trusted: TrustedKeys = LOCAL) -> ManifestSet:
    loaded = ManifestSet(folder, trusted, Clock(now))
    assert loaded.reload() == ()
    return loaded


def test_shipped_texts_are_what_the_assembly_sends_byte_for_byte() -> None:
    plan = load_plan("synthetic-ppo")
    prompt = assemble(claim(), (), (), tenant="local", plan=plan)
    assert prompt.segments[:-1] == shared_segments("local", plan)
    shipped = shipped_publications("local", ["synthetic-ppo"])
    listed = {(zone.path, entry.entry().sha256) for zone, texts in shipped.items() for entry in texts}
    assert listed == {(item.zone, item.content_digest) for item in prompt.segments[:-1]}


def test_first_start_publishes_and_the_prompt_keeps_its_zones(tmp_path: Path) -> None:
    prompt = assemble(claim(), (), (), tenant="local", plan=load_plan("synthetic-ppo"))
    case = Zone.parse(prompt.zone)
    before, denials = label_segments(
        prompt, tenant="local", is_shareable=ManifestSet(tmp_path, LOCAL, Clock(NOW)).is_shareable, demote_to=case
    )
    assert zones_of(before) == [case] * 4
    assert len(denials) == 3
    written = publish_shipped(tmp_path, KEY, LOCAL, now=NOW, **SHIPPED)
    assert len(written) == 2
    assert label_segments(prompt, tenant="local", is_shareable=load(tmp_path).is_shareable) == (prompt, ())
    assert {zone.path for zone in load(tmp_path).in_force()} == {"public", "tenant/local/plan/synthetic-ppo"}


def test_second_start_publishes_nothing_until_the_year_is_nearly_over(tmp_path: Path) -> None:
    publish_shipped(tmp_path, KEY, LOCAL, now=NOW, **SHIPPED)
    renewal = NOW + SHIPPED_VALIDITY_S - SHIPPED_RENEWAL_S
    assert publish_shipped(tmp_path, KEY, LOCAL, now=NOW + 1, **SHIPPED) == ()
    assert publish_shipped(tmp_path, KEY, LOCAL, now=renewal, **SHIPPED) == ()
    written = publish_shipped(tmp_path, KEY, LOCAL, now=renewal + 1, **SHIPPED)
    assert [path.name.rpartition(".r")[2] for path in written] == ["2.json", "2.json"]
    in_force = load(tmp_path, NOW + SHIPPED_VALIDITY_S + 1).in_force()
    assert [signed.manifest.revision for signed in in_force.values()] == [2, 2]
    assert load(tmp_path, renewal + 1 + SHIPPED_VALIDITY_S).in_force() == {}
    assert len(publish_shipped(tmp_path, KEY, LOCAL, now=renewal + 10 * SHIPPED_VALIDITY_S, **SHIPPED)) == 2


def test_shipped_texts_lie_beside_their_manifests_and_are_kept_again_where_they_have_gone(tmp_path: Path) -> None:
    publish_shipped(tmp_path, KEY, LOCAL, now=NOW, **SHIPPED)
    segments = shared_segments("local", load_plan("synthetic-ppo"))
    texts = [segment.text for segment in segments]
    assert [kept_text(tmp_path, segment.content_digest) for segment in segments] == texts
    for path in (tmp_path / "texts").iterdir():
        path.unlink()
    assert publish_shipped(tmp_path, KEY, LOCAL, now=NOW + 1, **SHIPPED) == ()
    assert [kept_text(tmp_path, segment.content_digest) for segment in segments] == texts


def test_changed_shipped_text_is_published_and_the_old_one_is_shared_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_shipped(tmp_path, KEY, LOCAL, now=NOW, **SHIPPED)
    old = shipped_publications("local", ["synthetic-ppo"])[PUBLIC][0].entry().sha256
    new = Publication("system", "Review claims.", "prompts/system.md 2027")
    monkeypatch.setattr(shareable, "shipped_publications", lambda *_: {PUBLIC: (new,)})
    (path,) = publish_shipped(tmp_path, KEY, LOCAL, now=NOW + 5, **SHIPPED)
    assert path.name == "public.r2.json"
    loaded = load(tmp_path, NOW + 5)
    assert loaded.is_shareable(PUBLIC, new.entry().sha256)
    assert not loaded.is_shareable(PUBLIC, old)


@pytest.mark.parametrize("texts", [(), ("mine",)])
def test_zone_that_somebody_else_published_last_is_left_alone(tmp_path: Path, texts: tuple[str, ...]) -> None:
    publish_shipped(tmp_path, KEY, LOCAL, now=NOW, **SHIPPED)
    theirs = Manifest(
        zone="public",
        revision=next_revision(tmp_path, PUBLIC),
        approver="Operator",
        effective=rfc3339(NOW),
        expires=rfc3339(NOW + 60),
        segments=tuple(SharedSegment(id=text, sha256="0" * 64, title=text) for text in texts),
    )
    publish(tmp_path, theirs, KEY)
    for later in (1, 61, SHIPPED_VALIDITY_S):
        assert "public" not in {
            path.name.split(".")[0] for path in publish_shipped(tmp_path, KEY, LOCAL, now=NOW + later, **SHIPPED)
        }
    assert load(tmp_path, NOW + 1).in_force()[PUBLIC].manifest == theirs


def test_key_that_may_not_sign_publishes_nothing(tmp_path: Path) -> None:
    only_public = TrustedKeys([TrustedKey(KEY.public_key(), ("public",))])
    for trusted in (TrustedKeys(), only_public):
        with pytest.raises(ManifestError, match="foreign_zone"):
            publish_shipped(tmp_path, KEY, trusted, now=NOW, **SHIPPED)
    assert list(tmp_path.iterdir()) == []
    assert not only_public.may_sign_for(key_id_of(KEY.public_key()), PLAN)


@pytest.mark.parametrize(
    "text",
    [Publication("a", "call 555-555-0100", "fine"), Publication("a", "fine", "for jo@example.com")],
)
def test_shipped_text_that_a_detector_objects_to_publishes_nothing(
    text: Publication, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = Publication("fine", "fine", "fine")
    monkeypatch.setattr(
        shareable, "shipped_publications", lambda *_: {Zone.parse("tenant/local/plan/p"): (fine,), PUBLIC: (text,)}
    )
    with pytest.raises(PublicationVetoed) as veto:
        publish_shipped(tmp_path, KEY, LOCAL, now=NOW, **SHIPPED)
    assert "0100" not in str(veto.value)
    assert list(tmp_path.iterdir()) == []


def test_unknown_plan_or_tenant_is_refused(tmp_path: Path) -> None:
    for changes in ({"plans": ["none"]}, {"tenant": "../x"}):
        with pytest.raises(ValueError):
            publish_shipped(tmp_path, KEY, LOCAL, now=NOW, **(SHIPPED | changes))
