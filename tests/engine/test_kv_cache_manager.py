"""The cache manager: tables, what may be shared, and for how long."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.block_pool import BlockPool
from engine.errors import IntegrityError
from engine.kv_cache_manager import KVCacheManager, PurgeCount
from engine.quotas import NO_QUOTAS, Quota, Quotas
from engine.request import Request
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan
from tests.engine.toy_model import (
    CASE,
    OTHER_CASE,
    PLAN,
    RIVAL_CASE,
    FakeClock,
    make_request,
    tokens_of,
    toy_hasher,
)

SILVER = Zone.parse("tenant/acme/plan/silver")
PROMPT = tokens_of(1, 14)  # three full blocks of 4 and a tail


class Cache(KVCacheManager):
    def __init__(self, num_blocks: int = 16, quotas: Quotas = NO_QUOTAS) -> None:
        self.scrubbed: list[int] = []
        self.clock = FakeClock()
        super().__init__(
            BlockPool(num_blocks, self.scrubbed.extend, quotas=quotas),
            toy_hasher(),
            4,
            clock=self.clock,
            case_idle_ttl_s=900.0,
        )

    def compute(self, request: Request, *, free: bool = False) -> list[int]:
        """Allocate for all known tokens, compute them, publish; perhaps free."""
        assert self.allocate(request, request.num_tokens)
        request.num_computed_tokens = request.num_tokens
        self.publish(request)
        block_ids = list(self.table(request.request_id).block_ids)
        if free:
            self.free(request)
        self.check()
        return block_ids


def request(
    name: str, prompt: Sequence[int] = PROMPT, zone: Zone | Sequence[ZoneSpan] = CASE, **fields: int
) -> Request:
    return make_request(name, prompt, zone, **fields)


def test_two_requests_of_one_zone_share_their_full_blocks() -> None:
    cache = Cache()
    first = cache.compute(request("a"))
    second = cache.compute(request("b"))
    assert first[:3] == second[:3]
    assert first[3] != second[3]
    assert (cache.num_queried_tokens, cache.num_hit_tokens) == (28, 12)
    assert cache.pool.num_used == 5


@pytest.mark.parametrize("other", [OTHER_CASE, RIVAL_CASE, PLAN, PUBLIC, EPHEMERAL])
def test_two_zones_share_nothing_though_the_text_is_the_same(other: Zone) -> None:
    cache = Cache()
    first = cache.compute(request("a"))
    second = cache.compute(request("b", zone=other))
    assert set(first).isdisjoint(second)
    assert cache.num_hit_tokens == 0


@pytest.mark.parametrize("zone", [EPHEMERAL, Zone.parse("tenant/acme/mixed")])
def test_an_uncacheable_zone_does_not_even_share_with_itself(zone: Zone) -> None:
    cache = Cache()
    cache.compute(request("a", zone=zone), free=True)
    assert cache.match_prefix(request("b", zone=zone)) == []
    assert cache.pool.num_idle == 0


def test_a_mixed_prompt_shares_exactly_its_public_and_plan_prefix() -> None:
    cache = Cache(32)
    # Tokens 0-9 public, 10-17 plan, 18-25 case: blocks 0-1 public, 2-3 plan, 4 and later case.
    prompt = tokens_of(1, 26)

    def spans(case: Zone) -> list[ZoneSpan]:
        return [ZoneSpan(10, PUBLIC), ZoneSpan(18, PLAN), ZoneSpan(26, case)]

    first = cache.compute(request("a", prompt, spans(CASE)))
    second = cache.compute(request("b", prompt, spans(OTHER_CASE)))
    assert [one == other for one, other in zip(first, second, strict=True)] == [True] * 4 + [False] * 3
    same_case = cache.compute(request("c", prompt, spans(CASE)))
    assert [one == other for one, other in zip(first, same_case, strict=True)] == [True] * 6 + [False]
    other_plan = [ZoneSpan(10, PUBLIC), ZoneSpan(18, SILVER), ZoneSpan(26, CASE)]
    third = cache.compute(request("d", prompt, other_plan))
    assert [one == other for one, other in zip(first, third, strict=True)] == [True] * 2 + [False] * 5


def test_nothing_after_an_uncacheable_block_is_shared() -> None:
    cache = Cache(32)
    spans = [ZoneSpan(4, PLAN), ZoneSpan(8, SILVER), ZoneSpan(14, CASE)]  # plan, mixed, case
    cache.compute(request("a", zone=spans), free=True)
    assert cache.pool.num_idle == 1
    assert len(cache.match_prefix(request("b", zone=spans))) == 1


def test_another_epoch_is_a_miss_for_the_own_zone_and_a_hit_for_wider_ones() -> None:
    cache = Cache(32)
    spans = [ZoneSpan(8, PUBLIC), ZoneSpan(14, CASE)]
    cache.compute(request("a", zone=spans, epoch=0), free=True)
    assert len(cache.match_prefix(request("b", zone=spans, epoch=0))) == 3
    assert len(cache.match_prefix(request("c", zone=spans, epoch=1))) == 2


def test_the_last_known_token_is_never_taken_from_the_cache() -> None:
    cache = Cache()
    cache.compute(request("a", PROMPT[:8]))
    assert len(cache.match_prefix(request("b", PROMPT[:8]))) == 1
    assert len(cache.match_prefix(request("c", PROMPT[:9]))) == 2


def test_the_same_tokens_after_another_beginning_are_no_hit() -> None:
    cache = Cache()
    other = tokens_of(2, 4)
    cache.compute(request("a", (*PROMPT[:8], 1)))
    cache.compute(request("b", (*other, 1)))
    assert len(cache.match_prefix(request("c", (*other, *PROMPT[4:8], 1)))) == 1


def test_looking_for_a_prefix_changes_nothing() -> None:
    cache = Cache()
    cache.compute(request("a"), free=True)
    before = (cache.pool.num_idle, cache.num_queried_tokens)
    cache.match_prefix(request("b"))
    assert (cache.pool.num_idle, cache.num_queried_tokens) == before
    cache.check()


def test_only_computed_full_blocks_become_findable() -> None:
    cache = Cache()
    one = request("a")
    assert cache.allocate(one, 14)
    cache.publish(one)
    assert cache.match_prefix(request("b")) == []
    one.num_computed_tokens = 7
    cache.publish(one)
    assert len(cache.match_prefix(request("b"))) == 1


def test_generated_tokens_are_findable_within_the_case() -> None:
    cache = Cache()
    one = request("a", PROMPT[:6])
    one.output_token_ids += [1, 2, 3]
    cache.compute(one, free=True)
    assert len(cache.match_prefix(request("b", (*PROMPT[:6], 1, 2, 3)))) == 2


def test_allocation_counts_idle_blocks_that_the_prefix_revives_only_once() -> None:
    cache = Cache(4)
    cache.compute(request("a"), free=True)  # three idle, one free
    assert cache.allocate(request("b"), 16)
    cache.check()
    assert cache.pool.num_available == 0


def test_allocation_without_room_changes_nothing() -> None:
    cache = Cache(4)
    cache.compute(request("a"), free=True)
    late = request("b")
    assert not cache.allocate(late, 17)
    assert not cache.allocate(late, 14, headroom=1)
    assert (cache.pool.num_idle, cache.pool.num_free, late.num_computed_tokens) == (3, 1, 0)
    assert cache.request_ids() == set()
    cache.check()


def test_extending_without_room_changes_nothing() -> None:
    cache = Cache(4)
    one = request("a")
    assert cache.allocate(one, 14)
    assert cache.extend(one, 16)
    assert not cache.extend(one, 17)
    assert len(cache.table("a").block_ids) == 4
    cache.check()


def test_a_table_as_tuple_is_rebuilt_only_after_it_has_grown() -> None:
    cache = Cache()
    one = request("a")
    assert cache.allocate(one, 14)
    before = cache.table("a").as_tuple()
    assert cache.table("a").as_tuple() is before
    assert cache.extend(one, 16)
    assert cache.table("a").as_tuple() is before
    assert cache.extend(one, 17)
    assert len(cache.table("a").as_tuple()) == 5


def test_fits_foresees_what_freeing_others_would_allow() -> None:
    cache = Cache(6)
    first, second, late = request("a"), request("b"), request("c")
    cache.compute(first)  # four blocks
    cache.compute(second)  # shares three of them
    assert cache.pool.num_available == 1
    assert cache.fits(late, 14, headroom=0, without=[])
    assert not cache.fits(late, 14, headroom=1, without=[])
    assert cache.fits(late, 14, headroom=1, without=[first])
    assert not cache.fits(late, 14, headroom=3, without=[first, second])
    assert cache.fits(late, 14, headroom=2, without=[first, second])
    other = request("d", zone=OTHER_CASE)
    assert not cache.fits(other, 14, headroom=0, without=[first])
    assert cache.fits(other, 24, headroom=0, without=[first, second])


def test_a_foreign_block_in_a_table_is_refused() -> None:
    cache = Cache()
    [foreign, *_] = cache.compute(request("a", zone=OTHER_CASE))
    one = request("b")
    assert cache.allocate(one, 14)
    with pytest.raises(IntegrityError, match="does not belong"):
        cache._append(cache.table("b"), foreign)
    cache.table("b").block_ids[0] = foreign
    with pytest.raises(IntegrityError, match="does not belong"):
        cache.check()


def test_a_digest_that_forgets_its_zone_is_caught_by_the_pool() -> None:
    """The mutant of a hop: were the digest not bound to the zone, the block's owner still is."""
    cache = Cache()
    hasher = cache._hasher
    cache._hasher.digest = lambda parent, tokens, zone, epoch: type(hasher).digest(  # type: ignore[method-assign]
        hasher, parent, tokens, PUBLIC, 0
    )
    cache.compute(request("a"))
    with pytest.raises(IntegrityError, match="found from"):
        cache.match_prefix(request("b", zone=OTHER_CASE))


def test_a_second_table_for_a_request_is_refused() -> None:
    cache = Cache()
    one = request("a")
    assert cache.allocate(one, 4)
    with pytest.raises(IntegrityError, match="already"):
        cache.allocate(one, 4)
    cache.free(one)
    with pytest.raises(IntegrityError, match="no block table"):
        cache.free(one)


def test_a_reservation_exposes_only_the_prompt_blocks_that_are_missing() -> None:
    cache = Cache()
    cache.compute(request("a", PROMPT[:9]), free=True)
    one = request("b")
    assert cache.reserve(one, 20)
    table = cache.table("b")
    assert (table.num_matched, table.exposed, len(table.block_ids)) == (2, (2, 4), 5)
    assert one.num_cached_tokens == 8
    assert cache.match_prefix(request("c")) == table.block_ids[:2]


def test_exposed_blocks_cannot_be_freed_only_quarantined() -> None:
    cache = Cache()
    cache.compute(request("a", PROMPT[:9]), free=True)
    one = request("b")
    assert cache.reserve(one, 20)
    with pytest.raises(IntegrityError, match="may still land"):
        cache.free(one)
    exposed = cache.table("b").block_ids[2:4]
    cache.quarantine(one)
    cache.check()
    assert cache.pool.num_quarantined == 2
    assert (cache.pool.num_used, cache.pool.num_idle) == (0, 2)
    assert cache.pool.release_quarantine("b") == 2
    assert set(exposed) <= set(cache.scrubbed)


def test_landed_blocks_are_findable_and_freed_like_any_other() -> None:
    cache = Cache()
    one = request("a")
    assert cache.reserve(one, 20)
    assert cache.match_prefix(request("b")) == []
    cache.land(one)
    assert len(cache.match_prefix(request("b"))) == 3
    assert one.num_computed_tokens == 14
    cache.free(one)
    cache.check()
    assert cache.pool.num_idle == 3


def test_a_purge_makes_cached_blocks_unfindable_and_keeps_live_requests_from_publishing() -> None:
    cache = Cache(32)
    spans = [ZoneSpan(4, PUBLIC), ZoneSpan(14, CASE)]
    one = request("a", zone=spans)
    cache.compute(one)
    cache.compute(request("gone", tokens_of(9, 9)), free=True)
    assert cache.purge(CASE, 0, [one]) == PurgeCount(4, 2, 3, 0)  # two in use and the tail, two idle
    assert len(cache.match_prefix(request("b", zone=spans))) == 1  # the public block
    one.output_token_ids += [1, 2, 3]
    assert cache.extend(one, 17)
    one.num_computed_tokens = 17
    cache.publish(one)
    cache.free(one)
    cache.check()
    assert len(cache.match_prefix(request("b", zone=spans))) == 1
    assert cache.pool.num_idle == 1


def test_a_purge_holds_for_a_live_request_that_has_to_be_computed_again() -> None:
    cache = Cache()
    one = request("a")
    cache.compute(one)
    cache.purge(CASE, 0, [one])
    cache.free(one)  # preempted
    cache.compute(one, free=True)
    assert cache.pool.num_idle == 0


def test_a_new_request_of_a_purged_zone_may_cache_again() -> None:
    cache = Cache()
    cache.compute(request("a"), free=True)
    cache.purge(CASE, 0, [])
    assert cache.match_prefix(request("b")) == []
    cache.compute(request("b"), free=True)
    assert len(cache.match_prefix(request("c"))) == 3


def test_purging_one_zone_leaves_the_others() -> None:
    cache = Cache()
    cache.compute(request("a", zone=OTHER_CASE), free=True)
    assert cache.purge(CASE, 0, []) == PurgeCount()
    assert len(cache.match_prefix(request("b", zone=OTHER_CASE))) == 3


def test_a_case_unused_for_its_time_to_live_is_scrubbed_and_forgotten() -> None:
    cache = Cache()
    block_ids = cache.compute(request("a"), free=True)
    cache.clock.now_s += 899.0
    assert cache.expire(cache.clock()) == 0
    cache.clock.now_s += 1.0
    assert cache.expire(cache.clock()) == 3
    assert set(block_ids) <= set(cache.scrubbed)
    assert cache.pool.num_free == 16
    cache.check()


def test_use_of_a_case_starts_its_time_to_live_anew() -> None:
    cache = Cache()
    cache.compute(request("a"), free=True)
    cache.compute(request("z", zone=OTHER_CASE), free=True)
    cache.clock.now_s += 600.0
    cache.compute(request("b", PROMPT[:5]), free=True)
    cache.clock.now_s += 600.0
    assert cache.expire(cache.clock()) == 3  # the other case
    assert len(cache.match_prefix(request("c"))) == 3


def test_blocks_in_use_outlive_their_cases_time_to_live() -> None:
    cache = Cache()
    cache.compute(request("a"))
    cache.clock.now_s += 10_000.0
    assert cache.expire(cache.clock()) == 0
    assert len(cache.match_prefix(request("b"))) == 3


def test_a_case_joined_with_another_still_expires() -> None:
    cache = Cache()
    spans = [ZoneSpan(8, CASE), ZoneSpan(14, OTHER_CASE)]  # ephemeral from the third block on
    cache.compute(request("a", zone=spans), free=True)
    assert cache.pool.num_idle == 2
    cache.clock.now_s += 900.0
    assert cache.expire(cache.clock()) == 2


def test_plan_and_public_blocks_do_not_expire_with_cases() -> None:
    cache = Cache()
    cache.compute(request("a", zone=PLAN), free=True)
    cache.compute(request("b", zone=PUBLIC), free=True)
    cache.clock.now_s += 10_000.0
    assert cache.expire(cache.clock()) == 0


def test_only_cases_that_have_idle_blocks_are_tracked_and_no_one_elses_flood_makes_a_case_expire() -> None:
    cache = Cache(16, Quotas(tenants={"rival": Quota(floor=3)}))
    cache.compute(request("kept", zone=RIVAL_CASE), free=True)
    for index in range(100):
        zone = Zone.parse(f"tenant/acme/case/c{index}")
        cache.compute(request(f"r{index}", zone=zone), free=True)
        assert len(cache._case_last_used_s) <= 33
    assert len(cache.match_prefix(request("again", zone=RIVAL_CASE))) == 3
    cache.clock.now_s += 900.0
    cache.expire(cache.clock())
    assert (cache.pool.num_idle, len(cache._case_last_used_s)) == (0, 0)


def test_check_notices_a_reference_that_no_table_holds() -> None:
    cache = Cache()
    cache.compute(request("a"))
    cache.pool.acquire([cache.table("a").block_ids[0]])
    with pytest.raises(IntegrityError, match="no table holds"):
        cache.check()
