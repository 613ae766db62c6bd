"""Replays without a deployment: which record, which claim, which field. The rest is in test_replay_over_http.py."""

from __future__ import annotations

import asyncio
import base64
import copy
import datetime as dt
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from deployments.claims.reviewer import ClaimReviewer, ModelIdentity
from deployments.claims.scripted_model import ScriptedReviewModel
from deployments.trust.audit import AuditEvent
from deployments.trust.keyring import Keyring
from deployments.trust.replay import (
    VERIFY_TRIES,
    AuditedReviews,
    ClaimDigests,
    NotComparable,
    _review_of,
    first_difference,
)
from tests.deployments.claims.builders import claim, line
from tests.deployments.test_reviews_over_http import CLAIM
from tests.deployments.trust.audit_support import MASTER_KEY, files, open_log

OTHER_KEY = bytes(reversed(MASTER_KEY))
FIELDS: dict[str, Any] = {
    "review_id": "a" * 32, "zone": "tenant/acme/case/c1", "outcome": "answered", "output_digest": "0" * 64
}  # fmt: skip


@cache
def a_review() -> dict[str, Any]:
    """With flags, the model's word on them, and every kind of field."""
    reviewer = ClaimReviewer(
        ScriptedReviewModel(),
        identity=ModelIdentity("scripted", "1"),
        clock=lambda: dt.datetime(2026, 10, 6, tzinfo=dt.UTC),
    )
    subject = claim(line(1, "97110", units=9), line(2, "90472"))
    return asyncio.run(reviewer.review(subject, tenant="acme", plan="synthetic-ppo")).review


Place = tuple[str | int, ...]


def leaves(value: object, place: Place = ()) -> Iterator[Place]:
    match value:
        case dict():
            for name, inner in value.items():
                yield from leaves(inner, (*place, name))
        case list():
            for index, inner in enumerate(value):
                yield from leaves(inner, (*place, index))
        case _:
            yield place


def spelled(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def test_a_review_does_not_differ_from_itself() -> None:
    assert first_difference(a_review(), copy.deepcopy(a_review())) is None


@pytest.mark.parametrize("value", ["Jane Doe", 17.25, None, ["Jane Doe"], {"Jane Doe": 1}], ids=str)
def test_every_leaf_that_is_changed_is_named_and_its_content_is_not_shown(value: object) -> None:
    places = [place for place in leaves(a_review()) if place[0] not in ("created", "narrative_ref")]
    assert len(places) > 60
    for place in places:
        stored = copy.deepcopy(a_review())
        inner: Any = stored
        for part in place[:-1]:
            inner = inner[part]
        if inner[place[-1]] == value:
            continue
        inner[place[-1]] = value
        told = first_difference(stored, a_review())
        assert told is not None
        assert told.partition(": ")[0] == spelled(place)
        assert not [word for word in ("Jane", "17.25", "97110", "units") if word in told.partition(": ")[2]]


def test_ids_that_follow_from_the_rest_are_told_last() -> None:
    stored = copy.deepcopy(a_review()) | {"review_id": "0" * 32}
    assert first_difference(stored, a_review()) == "review_id"
    stored["provenance"]["prompt_digest"] = "0" * 64
    assert first_difference(stored, a_review()) == "provenance.prompt_digest"
    stored["next_steps"][0]["flags"] = []
    assert first_difference(stored, a_review()) == "next_steps[0].flags: 0 entries, now 1"
    stored["risk_category"] = "none"
    assert first_difference(stored, a_review()) == "risk_category: none, now high"


@pytest.mark.parametrize("comes_whole", [True, False])
def test_a_line_that_is_being_written_is_waited_for_and_no_longer_than_its_limit(
    comes_whole: bool, tmp_path: Path
) -> None:
    log = open_log(tmp_path / "log", "ingress-1")
    log.add([(AuditEvent("review.complete", **FIELDS), 1000), (AuditEvent("review.complete", **FIELDS), 2000)])
    log.commit()
    log.close()
    (path,) = files(tmp_path / "log", "ingress-1")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    pauses: list[float] = []

    def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if comes_whole and len(pauses) == 2:
            path.write_bytes(whole)

    reviews = AuditedReviews(tmp_path / "log", Keyring((OTHER_KEY, MASTER_KEY)), sleep=sleep)
    if comes_whole:
        assert [record.time_ms for record in reviews.of("a" * 32)] == [1000, 2000]
        assert reviews.of("b" * 32) == []
        assert len(pauses) == 2
    else:
        with pytest.raises(NotComparable, match="not intact"):
            reviews.of("a" * 32)
        assert len(pauses) == VERIFY_TRIES - 1


def digests(*claims: dict[str, Any], keys: tuple[bytes, ...] = (MASTER_KEY,)) -> ClaimDigests:
    data = b"".join(json.dumps(item).encode() + b"\n" for item in claims)
    return ClaimDigests([{"name": "a.jsonl", "content_base64": base64.b64encode(data).decode()}], "acme", Keyring(keys))


def event(review_id: str, claim_digest: str) -> dict[str, Any]:
    return {"type": "review", "review": {"review_id": review_id, "provenance": {"claim_digest": claim_digest}}}


@pytest.fixture(params=[(MASTER_KEY, OTHER_KEY), (OTHER_KEY, MASTER_KEY)], ids=["newest first", "oldest first"])
def by_keys(request: pytest.FixtureRequest) -> tuple[ClaimDigests, str, str]:
    """A claim's digests, and the plain ones under the two keys."""
    both = digests(CLAIM, CLAIM | {"claim_id": "SYNTH-J2"}, keys=request.param)
    under = {key: next(iter(digests(CLAIM, keys=(key,))._by_key.values()))[0] for key in request.param}
    return both, under[MASTER_KEY], under[OTHER_KEY]


def test_the_review_of_the_claim_is_found_among_those_of_its_call(by_keys: tuple[ClaimDigests, str, str]) -> None:
    claims, plain, other = by_keys
    assert plain != other  # a pseudonym follows its key
    (second,) = set(claims.same_claim(plain)) - {plain}
    assert second == other
    others = [{"type": "accepted"}, event("r-2", "f" * 64), {"type": "done"}]
    assert _review_of([*others, event("r-1", plain)], "r-1", plain, claims)["review_id"] == "r-1"
    assert _review_of([event("r-9", plain), *others], "r-1", plain, claims)["review_id"] == "r-9"  # one: it is this
    twice = [event("r-1", plain), event("r-9", plain)]
    assert _review_of(twice, "r-9", plain, claims)["review_id"] == "r-9"
    with pytest.raises(NotComparable, match="2 times"):
        _review_of(twice, "r-5", plain, claims)
    with pytest.raises(NotComparable, match="another master key by now"):
        _review_of([event("r-1", other)], "r-1", plain, claims)
    with pytest.raises(NotComparable, match="no such claim"):
        _review_of(others, "r-1", plain, claims)


def test_a_field_that_was_put_in_is_told_by_its_place_and_not_by_its_name() -> None:
    stored = copy.deepcopy(a_review())
    stored["flags"][0]["Jane Doe"] = 1
    assert first_difference(stored, a_review()) == "flags[0]: has a field that it should not have"
    del stored["flags"][0]["Jane Doe"], stored["flags"][0]["carc"]
    assert first_difference(stored, a_review()) == "flags[0].carc: missing"
