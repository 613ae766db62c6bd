"""The block pool: states, sharing, eviction order, scrubbing, quarantine, generations."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.block_pool import BlockPool
from engine.errors import IntegrityError
from engine.quotas import NO_QUOTAS, Quotas
from engine.zone import EPHEMERAL, PUBLIC, Zone
from tests.engine.toy_model import CASE, OTHER_CASE, PLAN, RIVAL_CASE

MIXED = Zone.parse("tenant/acme/mixed")


class Pool(BlockPool):
    """A pool that keeps what it scrubs and checks itself after each test's last step."""

    def __init__(self, num_blocks: int = 8, quotas: Quotas = NO_QUOTAS) -> None:
        self.scrubbed: list[list[int]] = []
        super().__init__(num_blocks, lambda block_ids: self.scrubbed.append(list(block_ids)), quotas=quotas)

    def take(self, zone: Zone, count: int = 1) -> list[int]:
        block_ids = self.allocate([zone] * count, zone)
        assert block_ids is not None
        return block_ids

    def cache(self, zone: Zone, *digests: bytes) -> list[int]:
        """Leave one idle block for each digest, the first used least recently."""
        block_ids = self.take(zone, len(digests))
        for block_id, digest in zip(block_ids, digests, strict=True):
            self.publish(block_id, digest)
            self.release([block_id])
        self.check()
        return block_ids


def ids(found: Sequence[int] | None) -> list[int]:
    assert found is not None
    return list(found)


def test_blocks_are_handed_out_lowest_id_first_so_that_tables_are_contiguous() -> None:
    pool = Pool()
    first, second = pool.take(PUBLIC, 3), pool.take(PUBLIC, 2)
    assert (first, second) == ([0, 1, 2], [3, 4])
    pool.release(first)
    assert pool.take(PUBLIC, 4) == [0, 1, 2, 5]


def test_allocating_more_than_is_available_changes_nothing() -> None:
    pool = Pool(4)
    pool.take(PUBLIC)
    pool.cache(PUBLIC, b"d")
    assert pool.allocate([PUBLIC] * 4, PUBLIC) is None
    assert (pool.num_free, pool.num_idle, pool.num_used, pool.num_evictions) == (2, 1, 1, 0)
    assert pool.find(b"d", PUBLIC) is not None
    pool.check()


def test_a_generation_rises_each_time_a_block_is_handed_out_anew() -> None:
    pool = Pool(1)
    for generation in (1, 2, 3):
        assert pool.take(PUBLIC) == [0]
        assert pool.generation(0) == generation
        pool.release([0])


def test_sharing_a_cached_block_does_not_raise_its_generation() -> None:
    pool = Pool(1)
    pool.cache(PUBLIC, b"d")
    pool.acquire([0])
    assert (pool.generation(0), pool.ref_count(0), pool.num_idle) == (1, 1, 0)


def test_a_published_block_is_shared_and_stays_findable_when_its_last_user_leaves() -> None:
    pool = Pool()
    [block_id] = pool.take(CASE)
    pool.publish(block_id, b"d")
    assert pool.find(b"d", CASE) == block_id
    pool.acquire([block_id])
    pool.release([block_id])
    assert (pool.ref_count(block_id), pool.num_idle) == (1, 0)
    pool.release([block_id])
    assert (pool.num_idle, pool.num_used, pool.find(b"d", CASE)) == (1, 0, block_id)
    assert pool.scrubbed == []


def test_content_that_is_cached_already_keeps_its_first_block() -> None:
    pool = Pool()
    first, second = pool.take(CASE, 2)
    pool.publish(first, b"d")
    pool.publish(second, b"d")
    assert pool.find(b"d", CASE) == first
    pool.release([second, first])
    assert (pool.num_idle, pool.scrubbed) == (1, [[second]])
    pool.check()


def test_publishing_a_block_twice_is_harmless_and_under_another_digest_refused() -> None:
    pool = Pool()
    [block_id] = pool.take(PUBLIC)
    pool.publish(block_id, b"d")
    pool.publish(block_id, b"d")
    with pytest.raises(IntegrityError):
        pool.publish(block_id, b"e")


@pytest.mark.parametrize("zone", [MIXED, EPHEMERAL])
def test_a_zone_that_is_not_cacheable_is_never_findable(zone: Zone) -> None:
    pool = Pool()
    [block_id] = pool.take(zone)
    with pytest.raises(IntegrityError, match="findable"):
        pool.publish(block_id, b"d")


def test_a_block_of_another_zone_is_not_found_but_refused() -> None:
    pool = Pool()
    pool.cache(CASE, b"d")
    with pytest.raises(IntegrityError, match="found from"):
        pool.find(b"d", OTHER_CASE)


def test_a_block_that_is_not_findable_cannot_be_shared() -> None:
    pool = Pool()
    [block_id] = pool.take(PUBLIC)
    with pytest.raises(IntegrityError, match="shared"):
        pool.acquire([block_id])
    with pytest.raises(IntegrityError):
        pool.acquire([5])


def test_freeing_twice_is_refused() -> None:
    pool = Pool()
    block_ids = pool.take(PUBLIC)
    pool.release(block_ids)
    with pytest.raises(IntegrityError, match="twice"):
        pool.release(block_ids)


@pytest.mark.parametrize("zone", [CASE, MIXED, EPHEMERAL])
def test_private_blocks_are_scrubbed_before_they_are_free(zone: Zone) -> None:
    pool = Pool()
    pool.release(pool.take(zone, 3))
    assert pool.scrubbed == [[0, 1, 2]]  # one call
    assert pool.zone(0) is None


@pytest.mark.parametrize("zone", [PUBLIC, PLAN])
def test_blocks_that_hold_nothing_private_are_not_scrubbed(zone: Zone) -> None:
    pool = Pool()
    pool.release(pool.take(zone, 3))
    assert pool.scrubbed == []


def test_an_evicted_private_block_is_scrubbed_before_it_is_handed_out() -> None:
    pool = Pool(1)
    pool.cache(CASE, b"d")
    assert pool.take(OTHER_CASE) == [0]
    assert (pool.scrubbed, pool.num_evictions, pool.find(b"d", CASE)) == ([[0]], 1, None)
    assert pool.zone(0) == OTHER_CASE


def test_free_blocks_are_used_before_anything_is_evicted() -> None:
    pool = Pool(3)
    pool.cache(CASE, b"d")
    assert pool.take(CASE, 2) == [1, 2]
    assert pool.num_evictions == 0


def test_the_least_recently_used_block_of_the_own_zone_is_evicted_first() -> None:
    pool = Pool(4)
    old, new = pool.cache(CASE, b"1", b"2")
    pool.acquire([old])
    pool.release([old])  # now the other one is older
    pool.cache(RIVAL_CASE, b"3")
    pool.cache(PUBLIC, b"4")
    assert ids(pool.allocate([CASE], CASE)) == [new]


def test_a_chain_is_evicted_from_its_end() -> None:
    pool = Pool(3)
    block_ids = pool.take(CASE, 3)
    for block_id in block_ids:
        pool.publish(block_id, bytes([block_id]))
    pool.release(block_ids)
    assert pool.take(CASE) == [2]


def test_after_the_own_zone_the_tenants_cases_give_way_then_its_plans_then_others_and_public_last() -> None:
    pool = Pool(6)
    [public] = pool.cache(PUBLIC, b"1")
    [rival] = pool.cache(RIVAL_CASE, b"2")
    [plan] = pool.cache(PLAN, b"3")
    [other_plan] = pool.cache(Zone.parse("tenant/rival/plan/p"), b"4")
    [sibling] = pool.cache(OTHER_CASE, b"5")
    [own] = pool.cache(CASE, b"6")
    taken = [ids(pool.allocate([CASE], CASE))[0] for _ in range(6)]
    assert taken == [own, sibling, plan, rival, other_plan, public]


def test_an_ephemeral_request_of_a_tenant_takes_that_tenants_cases_first() -> None:
    pool = Pool(3)
    pool.cache(RIVAL_CASE, b"1")
    [plan] = pool.cache(PLAN, b"2")
    [case] = pool.cache(CASE, b"3")
    taken = [ids(pool.allocate([EPHEMERAL], EPHEMERAL, tenant="acme"))[0] for _ in range(2)]
    assert taken == [case, plan]


def test_a_public_requester_evicts_public_blocks_last_too() -> None:
    pool = Pool(2)
    pool.cache(PUBLIC, b"1")
    [case] = pool.cache(CASE, b"2")
    assert pool.take(PUBLIC) == [case]


def test_an_ephemeral_requester_has_no_tenant_whose_blocks_go_first() -> None:
    pool = Pool(2)
    [old] = pool.cache(PLAN, b"1")
    pool.cache(CASE, b"2")
    assert pool.take(EPHEMERAL) == [old]


def test_quarantined_blocks_are_nobodys_until_their_fence_has_passed() -> None:
    pool = Pool(3)
    block_ids = pool.take(PUBLIC, 2)
    pool.quarantine(block_ids, "r")
    pool.check()
    assert (pool.num_quarantined, pool.num_used, pool.num_available) == (2, 0, 1)
    assert pool.has_quarantined("r")
    assert pool.allocate([PUBLIC] * 2, PUBLIC) is None
    with pytest.raises(IntegrityError, match="twice"):
        pool.release(block_ids)
    assert pool.release_quarantine("r") == 2
    assert pool.scrubbed == [block_ids]  # whatever their zone: anything may have landed
    assert pool.release_quarantine("r") == 0
    assert pool.num_free == 3
    pool.check()


def test_quarantine_is_kept_by_owner() -> None:
    pool = Pool()
    pool.quarantine(pool.take(CASE, 2), "a")
    pool.quarantine(pool.take(CASE, 3), "b")
    assert pool.release_quarantine("a") == 2
    assert (pool.num_quarantined, pool.has_quarantined("b")) == (3, True)
    pool.check()


def test_a_second_quarantine_of_one_owner_is_refused() -> None:
    pool = Pool()
    pool.quarantine(pool.take(CASE), "a")
    with pytest.raises(IntegrityError, match="already"):
        pool.quarantine(pool.take(CASE), "a")


def test_a_shared_or_findable_block_cannot_go_to_quarantine() -> None:
    pool = Pool()
    block_ids = pool.take(CASE)
    pool.publish(block_ids[0], b"d")
    with pytest.raises(IntegrityError, match="quarantine"):
        pool.quarantine(block_ids, "a")


def test_an_empty_quarantine_leaves_no_trace() -> None:
    pool = Pool()
    pool.quarantine([], "a")
    assert not pool.has_quarantined("a")


def test_purge_scrubs_idle_blocks_at_once_and_used_ones_when_they_are_freed() -> None:
    pool = Pool()
    [idle] = pool.cache(PLAN, b"1")
    [used] = pool.take(PLAN)
    pool.publish(used, b"2")
    [other] = pool.cache(CASE, b"3")
    assert pool.purge(PLAN) == 2
    assert (pool.find(b"1", PLAN), pool.find(b"2", PLAN), pool.find(b"3", CASE)) == (None, None, other)
    assert pool.scrubbed == [[idle]]
    pool.release([used])
    assert pool.scrubbed == [[idle], [used]]
    pool.check()


def test_purging_twice_finds_nothing_the_second_time() -> None:
    pool = Pool()
    pool.cache(CASE, b"1")
    assert (pool.purge(CASE), pool.purge(CASE)) == (1, 0)
    pool.check()


def test_check_notices_a_block_in_two_states() -> None:
    pool = Pool()
    [block_id] = pool.take(CASE)
    pool._free.append(block_id)
    with pytest.raises(IntegrityError, match="states"):
        pool.check()


def test_check_notices_a_leaked_block() -> None:
    pool = Pool()
    pool._free.pop()
    with pytest.raises(IntegrityError, match="0 states"):
        pool.check()


def test_check_notices_a_free_block_that_was_not_scrubbed() -> None:
    pool = Pool()
    pool._blocks[0].needs_scrub = True
    with pytest.raises(IntegrityError, match="dirty"):
        pool.check()


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError):
        Pool(0)
