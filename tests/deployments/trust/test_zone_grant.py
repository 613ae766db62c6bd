"""Grants: what the ingress sealed, for that request alone, in its time; everything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.messages import GenerateCall
from deployments.trust.zone_grant import (
    GRANT_BYTES,
    MAX_CLOCK_SKEW_S,
    GrantReason,
    GrantRefused,
    GrantSealer,
    GrantVerifier,
)
from engine.request import SamplingParams
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan

NOW_S = 1_000_000.0
KEY, NEW_KEY = b"k" * 32, b"n" * 32
PLAN = Zone.parse("tenant/t/plan/p")
CASE = Zone.parse("tenant/t/case/c")
SPANS = (ZoneSpan(1, PUBLIC, 4), ZoneSpan(2, PLAN, 1), ZoneSpan(4, CASE, 2))
CALL = GenerateCall("gen-1", (7, 8, 9, 10), SamplingParams(), SPANS, timeout_s=30.0, epoch=2, affinity=b"a", tenant="t")


def sealed(call: GenerateCall = CALL, key: bytes = KEY) -> GenerateCall:
    return replace(call, grant=GrantSealer((key,), lambda: NOW_S).seal(call))


def refusal(call: GenerateCall, *keys: bytes, now_s: float = NOW_S) -> GrantReason | None:
    """None: the call is good."""
    try:
        GrantVerifier(keys or (KEY,), lambda: now_s).verify(call)
    except GrantRefused as refused:
        return refused.reason
    return None


def with_span(index: int, **changes: Any) -> Callable[[GenerateCall], GenerateCall]:
    def change(call: GenerateCall) -> GenerateCall:
        spans = list(call.zone_spans)
        spans[index] = replace(spans[index], **changes)
        return replace(call, zone_spans=tuple(spans))

    return change


def with_fields(**changes: Any) -> Callable[[GenerateCall], GenerateCall]:
    return lambda call: replace(call, **changes)


CHANGES: dict[str, Callable[[GenerateCall], GenerateCall]] = {
    "another request": with_fields(request_id="gen-2"),
    "another tenant": with_fields(tenant="u"),
    "no tenant": with_fields(tenant=""),
    "an earlier epoch": with_fields(epoch=1),
    "a later epoch": with_fields(epoch=3),
    "another token": with_fields(prompt_token_ids=(7, 8, 9, 11)),
    "a token more": with_fields(prompt_token_ids=(7, 8, 9, 10, 11)),
    "a token less": with_fields(prompt_token_ids=(7, 8, 9)),
    "tokens in another order": with_fields(prompt_token_ids=(8, 7, 9, 10)),
    "no spans": with_fields(zone_spans=()),
    "a span less": with_fields(zone_spans=SPANS[:2]),
    "spans of another request": with_fields(zone_spans=(ZoneSpan(4, EPHEMERAL),)),
    "a wider span": with_span(0, end=2),
    "a case's text in the plan": with_span(2, zone=PLAN),
    "a case's text in public": with_span(2, zone=PUBLIC),
    "another case": with_span(2, zone=Zone.parse("tenant/t/case/d")),
    "another tenant's case": with_span(2, zone=Zone.parse("tenant/u/case/c")),
    "a public zone that has a tenant": with_span(0, zone=replace(PUBLIC, tenant="u")),
    "an earlier epoch of the plan": with_span(1, epoch=0),
    "a later epoch of public text": with_span(0, epoch=5),
}


def test_a_sealed_call_is_good() -> None:
    assert refusal(sealed()) is None


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_call_that_was_changed_after_its_seal_is_forged(change: Callable[[GenerateCall], GenerateCall]) -> None:
    changed = change(sealed())
    assert changed != sealed()
    assert refusal(changed) is GrantReason.FORGED


def test_what_decides_no_zone_may_change_on_the_way() -> None:
    call = replace(sealed(), sampling=SamplingParams(max_tokens=3), priority=1, affinity=b"", timeout_s=1.0)
    assert refusal(call) is None


def test_a_grant_of_another_call_is_forged() -> None:
    other = sealed(replace(CALL, request_id="gen-2"))
    assert refusal(replace(CALL, grant=other.grant)) is GrantReason.FORGED


def test_a_missing_grant_is_forged() -> None:
    assert refusal(CALL) is GrantReason.FORGED


def test_every_truncation_and_every_addition_is_malformed() -> None:
    grant = sealed().grant
    assert len(grant) == GRANT_BYTES
    for length in range(1, len(grant)):
        assert refusal(replace(CALL, grant=grant[:length])) is GrantReason.MALFORMED
    assert refusal(replace(CALL, grant=grant + b"x")) is GrantReason.MALFORMED


@given(position=st.integers(0, GRANT_BYTES - 1), mask=st.integers(1, 255))
def test_any_flipped_byte_is_refused(position: int, mask: int) -> None:
    grant = bytearray(sealed().grant)
    grant[position] ^= mask
    expected = GrantReason.MALFORMED if position == 0 else GrantReason.FORGED
    assert refusal(replace(CALL, grant=bytes(grant))) is expected


@given(st.binary(min_size=1, max_size=2 * GRANT_BYTES))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert refusal(replace(CALL, grant=data)) in (GrantReason.FORGED, GrantReason.MALFORMED)


def test_a_grant_lasts_as_long_as_its_call_may_and_no_longer() -> None:
    end_s = NOW_S + CALL.timeout_s + MAX_CLOCK_SKEW_S
    assert refusal(sealed(), now_s=end_s - 0.1) is None
    assert refusal(sealed(), now_s=end_s) is GrantReason.EXPIRED


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": (-1,)},
        {"prompt_token_ids": (2**32,)},
        {"prompt_token_ids": ("7",)},
        {"epoch": 2**70},
        {"request_id": object()},
    ],
)
def test_a_field_of_another_type_or_size_is_malformed(changes: dict[str, Any]) -> None:
    assert refusal(replace(sealed(), **changes)) is GrantReason.MALFORMED


def test_new_keys_come_before_old_ones_and_old_ones_go() -> None:
    before, after = sealed(), sealed(key=NEW_KEY)
    assert refusal(before, NEW_KEY, KEY) is None
    assert refusal(after, NEW_KEY, KEY) is None
    assert refusal(before, NEW_KEY) is GrantReason.FORGED
    assert refusal(after, KEY) is GrantReason.FORGED


def test_a_new_key_seals_when_every_replica_has_had_time_to_learn_it() -> None:
    now_s = NOW_S

    def clock() -> float:
        return now_s

    sealer, slow = GrantSealer((KEY,), clock, settle_s=20.0), GrantVerifier((KEY,), clock)
    sealer.set_keys((NEW_KEY, KEY))
    slow.verify(replace(CALL, grant=sealer.seal(CALL)))
    now_s += 20.0
    call = replace(CALL, grant=sealer.seal(CALL))
    with pytest.raises(GrantRefused, match="forged"):
        slow.verify(call)
    slow.set_keys((NEW_KEY, KEY))
    slow.verify(call)


def test_a_zone_of_another_tenant_is_never_sealed() -> None:
    for tenant in ("u", ""):
        with pytest.raises(ValueError, match="another tenant") as caught:
            GrantSealer((KEY,)).seal(replace(CALL, tenant=tenant))
        assert "case/c" not in str(caught.value)


def test_neither_a_grant_nor_a_refusal_shows_anything_of_the_call() -> None:
    call = sealed()
    for hidden in (b"gen-1", b"tenant", b"case"):
        assert hidden not in call.grant
    assert "grant" not in repr(call)
    with pytest.raises(GrantRefused) as caught:
        GrantVerifier((KEY,)).verify(CALL)
    assert str(caught.value) == "zone grant refused: forged"
