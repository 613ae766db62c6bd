"""Tickets: only what we sealed, for us, now, once."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transfer.support import KEY, LAYOUT, NEW_KEY, WEIGHTS, ZONE
from transfer import wire
from transfer.ticket import (
    MAX_SEALED_BYTES,
    MAX_TICKET_LIFETIME_S,
    Expectation,
    RefusalReason,
    ReplayGuard,
    Ticket,
    TicketRefused,
    TicketSealer,
    TicketVerifier,
)

NOW_S = 1_000_000.0
TICKET = Ticket(
    request_id="r1",
    zone=ZONE,
    epoch=3,
    receiver="decode-" + "0" * 32,
    block_ids=(5, 9, 7),
    generations=(1, 4, 2),
    first_missing_block=2,
    num_prompt_tokens=70,
    layout_fingerprint=LAYOUT.fingerprint(),
    weights_digest=WEIGHTS,
    nonce=bytes(range(16)),
    expires_at_s=NOW_S + 30,
    sender="prefill-" + "1" * 32,
)
EXPECTED = Expectation(zone=ZONE, epoch=3, num_prompt_tokens=70, request_id="r1", epoch_floor=3)


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


def make_verifier(
    clock: Clock,
    *,
    key: bytes = KEY,
    layout: str = LAYOUT.fingerprint(),
    weights: str = WEIGHTS,
    agent: str = TICKET.sender,
    max_nonces: int = 100,
) -> TicketVerifier:
    return TicketVerifier(
        TicketSealer((key,), clock),
        ReplayGuard(clock, max_nonces),
        layout_fingerprint=layout,
        weights_digest=weights,
        agent_name=agent,
    )


def reason_of(verifier: TicketVerifier, sealed: bytes, expected: Expectation = EXPECTED) -> RefusalReason:
    with pytest.raises(TicketRefused) as caught:
        verifier.verify(sealed, expected)
    return caught.value.reason


def sealed_by(clock: Clock, ticket: Ticket = TICKET) -> bytes:
    return TicketSealer((KEY,), clock).seal(ticket).sealed


def test_ticket_survives_its_seal() -> None:
    clock = Clock()
    assert make_verifier(clock).verify(sealed_by(clock), EXPECTED).ticket == TICKET


def test_sealed_ticket_shows_nothing_of_its_content() -> None:
    sealed = sealed_by(Clock())
    assert ZONE.encode() not in sealed
    assert TICKET.nonce not in sealed
    assert sealed != sealed_by(Clock())


@given(position=st.integers(0, 10_000), mask=st.integers(1, 255))
def test_any_flipped_byte_is_refused_as_forged(position: int, mask: int) -> None:
    clock = Clock()
    sealed = bytearray(sealed_by(clock))
    sealed[position % len(sealed)] ^= mask
    assert reason_of(make_verifier(clock), bytes(sealed)) is RefusalReason.FORGED


@given(data=st.binary(max_size=400))
def test_random_bytes_are_refused_as_forged(data: bytes) -> None:
    assert reason_of(make_verifier(Clock()), data) is RefusalReason.FORGED


def test_every_truncation_is_refused_as_forged() -> None:
    clock = Clock()
    sealed, verifier = sealed_by(clock), make_verifier(clock)
    for length in range(len(sealed)):
        assert reason_of(verifier, sealed[:length]) is RefusalReason.FORGED
    assert reason_of(verifier, sealed + b"x") is RefusalReason.FORGED
    assert reason_of(verifier, bytes([1]) * (MAX_SEALED_BYTES + 1)) is RefusalReason.FORGED


def test_ticket_of_another_key_is_refused_as_forged() -> None:
    clock = Clock()
    assert reason_of(make_verifier(clock, key=bytes(32)), sealed_by(clock)) is RefusalReason.FORGED


def test_sealed_content_that_is_no_ticket_is_refused_as_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    values = [list(v) if isinstance(v, tuple) else v for v in (getattr(TICKET, f.name) for f in fields(Ticket))]
    damages: list[object] = [
        {"a": 1},
        values[:-1],
        [*values[:2], True, *values[3:]],  # a boolean is no epoch
        [*values[:2], -1, *values[3:]],
        [*values[:4], [1, 1, 1], *values[5:]],
        [*values[:5], [1], *values[6:]],
        [*values[:7], 0, *values[8:]],
        [*values[:10], b"short", *values[11:]],
        [*values[:11], 30, *values[12:]],
        ["r" * 300, *values[1:]],
    ]
    for damage in damages:
        monkeypatch.setattr(Ticket, "encode", lambda ticket, damage=damage: wire.pack(damage))
        assert reason_of(make_verifier(clock), sealed_by(clock)) is RefusalReason.MALFORMED, damage


def test_expired_ticket_is_refused() -> None:
    clock = Clock()
    sealed = sealed_by(clock)
    clock.now_s = TICKET.expires_at_s
    assert reason_of(make_verifier(clock), sealed) is RefusalReason.EXPIRED


def test_ticket_good_for_ever_is_refused() -> None:
    clock = Clock()
    for expiry, reason in [
        (NOW_S + MAX_TICKET_LIFETIME_S + 60, RefusalReason.TOO_LONG_LIVED),
        (float("inf"), RefusalReason.TOO_LONG_LIVED),
        (float("nan"), RefusalReason.EXPIRED),
    ]:
        sealed = sealed_by(clock, replace(TICKET, expires_at_s=expiry))
        assert reason_of(make_verifier(clock), sealed) is reason


def test_replayed_ticket_is_refused_even_after_many_others() -> None:
    clock = Clock()
    verifier, sealed = make_verifier(clock), sealed_by(clock)
    verifier.verify(sealed, EXPECTED)
    for index in range(50):
        other = replace(TICKET, nonce=index.to_bytes(16, "big"))
        verifier.verify(sealed_by(clock, other), EXPECTED)
    assert reason_of(verifier, sealed) is RefusalReason.REPLAYED


def test_guard_full_of_live_nonces_fails_closed_and_forgets_expired_ones() -> None:
    clock = Clock()
    verifier = make_verifier(clock, max_nonces=2)
    for index in range(2):
        verifier.verify(sealed_by(clock, replace(TICKET, nonce=bytes([index] * 16))), EXPECTED)
    third = replace(TICKET, nonce=bytes([9] * 16), expires_at_s=NOW_S + 60)
    assert reason_of(verifier, sealed_by(clock, third)) is RefusalReason.OVERLOADED
    clock.now_s = NOW_S + 31
    assert verifier.verify(sealed_by(clock, third), EXPECTED).ticket == third


@pytest.mark.parametrize(
    ("expected", "options", "reason"),
    [
        (replace(EXPECTED, zone="tenant/t/case/other"), {}, RefusalReason.WRONG_ZONE),
        (replace(EXPECTED, epoch=4), {}, RefusalReason.WRONG_EPOCH),
        (replace(EXPECTED, epoch=2), {}, RefusalReason.WRONG_EPOCH),
        (replace(EXPECTED, epoch_floor=4), {}, RefusalReason.WRONG_EPOCH),
        (replace(EXPECTED, request_id="r2"), {}, RefusalReason.WRONG_REQUEST),
        (EXPECTED, {"layout": "other"}, RefusalReason.WRONG_LAYOUT),
        (EXPECTED, {"weights": "other"}, RefusalReason.WRONG_WEIGHTS),
        (replace(EXPECTED, num_prompt_tokens=71), {}, RefusalReason.WRONG_PROMPT),
        (EXPECTED, {"agent": "prefill-" + "2" * 32}, RefusalReason.WRONG_SENDER),
    ],
)
def test_ticket_for_something_else_is_refused_and_not_spent(
    expected: Expectation, options: dict[str, str], reason: RefusalReason
) -> None:
    clock = Clock()
    sealed = sealed_by(clock)
    verifier = make_verifier(clock, **options)  # type: ignore[arg-type]
    assert reason_of(verifier, sealed, expected) is reason
    assert reason_of(verifier, sealed, expected) is reason  # not replayed: its nonce is unspent


def test_short_transfer_key_is_refused() -> None:
    with pytest.raises(ValueError):
        TicketSealer((bytes(31),), Clock())


def test_a_ring_seals_with_its_newest_key_and_opens_with_any() -> None:
    clock = Clock()
    sealer = TicketSealer((NEW_KEY, KEY), clock)
    assert sealer.open(sealed_by(clock)).transfer_key == KEY
    sealed = sealer.seal(TICKET)
    assert sealed.transfer_key == NEW_KEY
    assert TicketSealer((NEW_KEY,), clock).open(sealed.sealed) == sealed
    with pytest.raises(TicketRefused, match="forged"):
        TicketSealer((KEY,), clock).open(sealed.sealed)


def test_a_ticket_under_a_key_that_has_left_the_ring_is_refused_as_forged() -> None:
    clock = Clock()
    sealer = TicketSealer((KEY,), clock)
    sealed = sealer.seal(TICKET)
    sealer.set_keys((NEW_KEY, KEY))
    assert sealer.open(sealed.sealed) == sealed
    sealer.set_keys((NEW_KEY,))
    with pytest.raises(TicketRefused, match="forged"):
        sealer.open(sealed.sealed)


def test_the_key_named_by_the_header_is_part_of_what_is_sealed() -> None:
    clock = Clock()
    one, other = TicketSealer((KEY,), clock).seal(TICKET).sealed, TicketSealer((NEW_KEY,), clock).seal(TICKET).sealed
    with pytest.raises(TicketRefused, match="forged"):
        TicketSealer((NEW_KEY, KEY), clock).open(other[:9] + one[9:])


def test_an_opened_ticket_does_not_show_its_key() -> None:
    assert repr(KEY)[2:-1] not in repr(TicketSealer((KEY,), Clock()).seal(TICKET))


@pytest.mark.parametrize(
    "change",
    [
        {"generations": (1, 2)},
        {"block_ids": (5, 5, 7)},
        {"nonce": b"short"},
        {"num_prompt_tokens": 0},
        {"first_missing_block": -1},
    ],
)
def test_parts_that_make_no_ticket_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(TICKET, **change)  # type: ignore[arg-type]


def test_binding_depends_on_every_field() -> None:
    changes: list[dict[str, object]] = [
        {"request_id": "r2"},
        {"zone": "public"},
        {"epoch": 4},
        {"receiver": "x"},
        {"block_ids": (5, 7, 9)},
        {"generations": (1, 4, 3)},
        {"first_missing_block": 3},
        {"num_prompt_tokens": 71},
        {"layout_fingerprint": "x"},
        {"weights_digest": "x"},
        {"nonce": bytes(16)},
        {"expires_at_s": NOW_S},
        {"sender": ""},
    ]
    assert {key for change in changes for key in change} == {item.name for item in fields(Ticket)}
    bindings = {TICKET.binding(), *(replace(TICKET, **c).binding() for c in changes)}  # type: ignore[arg-type]
    assert len(bindings) == len(changes) + 1
