"""Which key seals and which opens while a ring changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.sealing_keys import MAX_KEYS, SealingKeys

A, B, C = (bytes([value]) * 32 for value in (1, 2, 3))
SETTLE_S = 20.0


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make_keys(*keys: bytes, settle_s: float = SETTLE_S) -> tuple[SealingKeys, Clock]:
    clock = Clock()
    return SealingKeys(keys, b"test", clock, settle_s), clock


def test_the_first_ring_seals_with_its_newest_key_at_once() -> None:
    keys, _ = make_keys(A, B)
    assert keys.sealing[1] == A


def test_a_new_key_opens_at_once_and_seals_when_everybody_knows_it() -> None:
    keys, clock = make_keys(A)
    keys.set_keys((B, A))
    other, _ = make_keys(B)
    assert keys.opening(other.sealing[0]) == B
    clock.now_s += SETTLE_S - 0.1
    assert keys.sealing[1] == A
    clock.now_s += 0.1
    assert keys.sealing[1] == B
    assert keys.opening(make_keys(A)[0].sealing[0]) == A


def test_a_key_that_has_left_neither_seals_nor_opens() -> None:
    keys, _ = make_keys(A)
    old_id = keys.sealing[0]
    keys.set_keys((B,))
    assert keys.sealing[1] == B
    assert keys.opening(old_id) is None


def test_the_same_ring_again_does_not_put_the_new_key_off() -> None:
    keys, clock = make_keys(A)
    keys.set_keys((B, A))
    clock.now_s += SETTLE_S - 1
    keys.set_keys((B, A))
    clock.now_s += 1
    assert keys.sealing[1] == B


def test_a_second_change_before_the_first_has_settled_goes_on_with_the_key_that_all_know() -> None:
    keys, clock = make_keys(A)
    keys.set_keys((B, A))
    clock.now_s += 1
    keys.set_keys((C, B, A))
    assert keys.sealing[1] == A
    clock.now_s += SETTLE_S
    assert keys.sealing[1] == C


@pytest.mark.parametrize(
    "ring", [(), (bytes(31),), (A, bytes(31)), tuple(bytes([i]) * 32 for i in range(MAX_KEYS + 1))]
)
def test_a_ring_that_is_none_is_refused_and_changes_nothing(ring: tuple[bytes, ...]) -> None:
    with pytest.raises(ValueError):
        make_keys(*ring)
    keys, _ = make_keys(A)
    with pytest.raises(ValueError):
        keys.set_keys(ring)
    assert keys.sealing[1] == A


def test_ids_say_nothing_of_a_key_and_differ_by_use() -> None:
    ids = {SealingKeys((A,), info, Clock()).sealing[0] for info in (b"one", b"two")}
    assert len(ids) == 2
    assert all(key_id not in A for key_id in ids)


@given(st.lists(st.tuples(st.lists(st.sampled_from([A, B, C]), min_size=1, unique=True), st.floats(0, 30)), max_size=8))
def test_what_seals_is_always_in_the_ring(changes: list[tuple[list[bytes], float]]) -> None:
    keys, clock = make_keys(A)
    ring = [A]
    for later, pause_s in changes:
        keys.set_keys(later)
        ring = later
        clock.now_s += pause_s
        key_id, key = keys.sealing
        assert key in ring
        assert keys.opening(key_id) == key
    clock.now_s += SETTLE_S
    assert keys.sealing[1] == ring[0]
