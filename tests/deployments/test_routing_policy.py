"""Choice of replica: affinity that survives scaling, load that stays bounded."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from deployments.routing.policy import choose_replica

NAMES = st.text("abcdef0123", min_size=1, max_size=6)
LOADS = st.dictionaries(NAMES, st.integers(0, 20), min_size=1, max_size=8)
AFFINITIES = st.binary(min_size=1, max_size=100)


def test_no_replica_no_choice() -> None:
    assert choose_replica({}, b"key", max_imbalance=4) is None
    assert choose_replica({}, b"", max_imbalance=4, avoid=frozenset({"a"})) is None


def test_without_affinity_the_least_busy_is_chosen_and_the_name_breaks_ties() -> None:
    assert choose_replica({"c": 2, "b": 1, "a": 3}, b"", max_imbalance=4) == "b"
    assert choose_replica({"c": 1, "b": 1, "a": 3}, b"", max_imbalance=4) == "b"


def test_affine_replica_is_left_when_it_is_much_busier_than_the_rest() -> None:
    idle = {"a": 0, "b": 0, "c": 0}
    affine = choose_replica(idle, b"plan", max_imbalance=4)
    assert affine is not None
    assert choose_replica(idle | {affine: 4}, b"plan", max_imbalance=4) == affine
    assert choose_replica(idle | {affine: 5}, b"plan", max_imbalance=4) != affine


def test_replica_that_failed_this_request_is_avoided_while_another_is_left() -> None:
    load = {"a": 0, "b": 9}
    assert choose_replica(load, b"", max_imbalance=0, avoid=frozenset({"a"})) == "b"
    assert choose_replica(load, b"", max_imbalance=0, avoid=frozenset({"a", "b"})) == "a"


def test_load_of_an_avoided_replica_does_not_count_as_the_least() -> None:
    load = {"a": 0, "b": 9, "c": 9}
    chosen = {choose_replica(load, bytes([key]), max_imbalance=1, avoid=frozenset({"a"})) for key in range(64)}
    assert chosen == {"b", "c"}


@given(LOADS, AFFINITIES, st.integers(0, 5), st.sets(NAMES))
def test_choice_is_a_known_replica_within_the_imbalance(
    load: dict[str, int], affinity: bytes, max_imbalance: int, avoid: set[str]
) -> None:
    chosen = choose_replica(load, affinity, max_imbalance=max_imbalance, avoid=frozenset(avoid))
    open_to = {name: count for name, count in load.items() if name not in avoid} or load
    assert chosen in open_to
    assert open_to[chosen] - min(open_to.values()) <= max_imbalance


@given(LOADS, AFFINITIES, st.randoms())
def test_choice_does_not_depend_on_the_order_of_the_replicas(
    load: dict[str, int], affinity: bytes, rng: random.Random
) -> None:
    names = list(load)
    rng.shuffle(names)
    shuffled = {name: load[name] for name in names}
    assert choose_replica(shuffled, affinity, max_imbalance=2) == choose_replica(load, affinity, max_imbalance=2)


@given(st.sets(NAMES, min_size=1, max_size=8), NAMES, AFFINITIES)
def test_added_replica_takes_a_key_or_leaves_it_where_it_was(names: set[str], added: str, affinity: bytes) -> None:
    before = choose_replica(dict.fromkeys(names, 0), affinity, max_imbalance=0)
    after = choose_replica(dict.fromkeys({*names, added}, 0), affinity, max_imbalance=0)
    assert after in (before, added)


@given(st.sets(NAMES, min_size=2, max_size=8), AFFINITIES, st.data())
def test_removed_replica_moves_only_its_own_keys(names: set[str], affinity: bytes, data: st.DataObject) -> None:
    removed = data.draw(st.sampled_from(sorted(names)))
    before = choose_replica(dict.fromkeys(names, 0), affinity, max_imbalance=0)
    after = choose_replica(dict.fromkeys(names - {removed}, 0), affinity, max_imbalance=0)
    assert after == before or before == removed


def test_keys_spread_evenly_and_a_new_replica_takes_its_share() -> None:
    keys = [index.to_bytes(4, "big") for index in range(2000)]
    names = [f"replica-{index}" for index in range(4)]
    before = [choose_replica(dict.fromkeys(names, 0), key, max_imbalance=0) for key in keys]
    assert all(400 < before.count(name) < 600 for name in names)
    after = [choose_replica(dict.fromkeys([*names, "replica-4"], 0), key, max_imbalance=0) for key in keys]
    moved = sum(left != right for left, right in zip(before, after, strict=True))
    assert 300 < moved < 500


def test_a_long_run_of_one_key_stays_within_the_imbalance() -> None:
    load = dict.fromkeys("abc", 0)
    for _ in range(300):
        chosen = choose_replica(load, b"hot plan", max_imbalance=4)
        assert chosen is not None
        load[chosen] += 1
        assert max(load.values()) - min(load.values()) <= 5
