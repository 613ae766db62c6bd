"""What an engine keeps of whom: floors and caps, pins, epochs, a new key, and the record of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from engine import cache_events, epoch_floors, kv_cache_manager
from engine.cache_events import CacheEvent, CacheEventLog
from engine.epoch_floors import EpochFloors
from engine.errors import PinRefused, RequestError, RequestStateError
from engine.kv_cache_manager import PurgeCount
from engine.quotas import NO_QUOTAS, Quota, Quotas
from engine.request import Request
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan
from tests.engine.toy_model import (
    CASE,
    OTHER_CASE,
    PLAN,
    RIVAL_CASE,
    ToyEngine,
    ToyModel,
    make_request,
    tokens_of,
    toy_hasher,
)

RIVAL_PLAN = Zone.parse("tenant/rival/plan/gold")
SILVER = Zone.parse("tenant/acme/plan/silver")
PROMPT = tokens_of(1, 17)  # four blocks and one token
SPANS = (ZoneSpan(8, PUBLIC), ZoneSpan(12, PLAN), ZoneSpan(17, CASE))


def stamped(**epochs: int) -> tuple[ZoneSpan, ...]:
    """`SPANS` with epochs: public, plan, case."""
    names = {PUBLIC: "public", PLAN: "plan", CASE: "case"}
    return tuple(ZoneSpan(span.end, span.zone, epochs.get(names[span.zone], 0)) for span in SPANS)


def serve(engine: ToyEngine, name: str, zone: Zone | Sequence[ZoneSpan] = SPANS, **fields: object) -> int:
    """Run one request over `PROMPT` to its end; the tokens that it found."""
    prompt = fields.pop("prompt", PROMPT)
    engine.run(make_request(name, prompt, zone, max_tokens=1, **fields))  # type: ignore[arg-type]
    assert engine.tokens(name) == ToyModel.continuation(prompt, 1, ignore_eos=True)  # type: ignore[arg-type]
    return engine.last(name).num_cached_tokens


def warm(engine: ToyEngine, name: str, zone: Zone | Sequence[ZoneSpan] = PLAN, seed: int = 1, count: int = 16) -> int:
    """Compute a prompt and pin it."""
    engine.run(make_request(name, tokens_of(seed, count), zone, is_prefill_only=True, max_tokens=1))
    num_pinned = engine.pin(name)
    engine.check()
    return num_pinned


def events(engine: ToyEngine) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for event in engine.take_cache_events():
        found[event.kind, event.reason] += event.num_blocks
    return found


# -- quotas


class Neighbours:
    """Tenant rival repeats the same few prompts; tenant acme floods the engine between them, or does not."""

    def __init__(self, quotas: Quotas, seed: int, *, is_flooded: bool) -> None:
        self.engine = ToyEngine(
            48, quotas=quotas, max_model_len=96, max_num_batched_tokens=64, max_num_seqs=6, local_output_reserve=8
        )
        self.random = random.Random(seed)
        self.is_flooded = is_flooded
        self.num_flood = 0

    def flood_request(self) -> Request:
        self.num_flood += 1
        plan = Zone.parse(f"tenant/acme/plan/p{self.random.randrange(3)}")
        case = Zone.parse(f"tenant/acme/case/c{self.random.randrange(40)}")
        zone, length = self.random.choice([plan, case, case, EPHEMERAL, PUBLIC]), self.random.choice([3, 20, 40, 80])
        return make_request(
            f"a{self.num_flood}",
            tokens_of(1000 + self.random.randrange(60), length),
            zone,
            tenant=self.random.choice(["acme", "acme", ""]) if zone == EPHEMERAL else "acme",
            max_tokens=self.random.randint(1, 16),
            priority=self.random.choice([-1, 0, 1]),
        )

    def rival_request(self, name: str) -> Request:
        """A plan of 12 tokens, then one of three cases; at most 3 + 3 * 4 blocks in all."""
        case = self.random.randrange(3)
        prompt = tokens_of(1, 12) + tokens_of(2 + case, 13)
        spans = (ZoneSpan(12, RIVAL_PLAN), ZoneSpan(25, Zone.parse(f"tenant/rival/case/c{case}")))
        return make_request(name, prompt, spans, tenant="rival", max_tokens=4)

    def hits(self, count: int) -> list[int]:
        """Tokens that each of rival's requests found, one request after the other."""
        found, rival = [], random.Random(7)
        for index in range(count):
            if self.is_flooded:
                for _ in range(self.random.randint(0, 6)):
                    self.engine.add_request(self.flood_request())
                for _ in range(self.random.randint(0, 4)):
                    self.engine.step()
            flood_state = self.random
            self.random = rival
            request = self.rival_request(f"b{index}")
            self.random = flood_state
            self.engine.add_request(request)
            while self.engine._scheduler.get(request.request_id) is not None:
                self.engine.step()
                self.engine.check()
            found.append(self.engine.last(request.request_id).num_cached_tokens)
        return found


FLOORED = Quotas(public_cap=4, tenants={"rival": Quota(floor=15)})


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_no_flood_costs_another_tenant_one_block_within_its_floor(seed: int) -> None:
    quiet = Neighbours(FLOORED, seed, is_flooded=False).hits(60)
    flooded = Neighbours(FLOORED, seed, is_flooded=True)
    assert flooded.hits(60) == quiet
    assert sum(quiet) > 50 * 20
    assert flooded.engine.stats().evictions > 100
    # The control: the same flood, no floor.
    assert Neighbours(NO_QUOTAS, seed, is_flooded=False).hits(60) == quiet
    unprotected = Neighbours(NO_QUOTAS, seed, is_flooded=True).hits(60)
    assert sum(unprotected) < sum(quiet)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_zone_floor_protects_a_plan_from_its_own_tenants_cases(seed: int) -> None:
    def hits(quotas: Quotas) -> list[int]:
        engine = ToyEngine(24, quotas=quotas, max_model_len=64)
        source, found = random.Random(seed), []
        for index in range(40):
            found.append(serve(engine, f"p{index}", PLAN, prompt=PROMPT))
            for more in range(source.randint(1, 4)):
                case = Zone.parse(f"tenant/acme/case/c{source.randrange(10**6)}")
                prompt = tokens_of(100 + index * 5 + more, source.randint(5, 60))
                engine.add_request(make_request(f"c{index}.{more}", prompt, case, max_tokens=4))
            engine.run()
        return found

    assert hits(Quotas(zones={PLAN: Quota(floor=4)})) == [0] + [16] * 39
    assert sum(hits(NO_QUOTAS)) < 16 * 39


def test_above_its_cap_a_tenant_loses_its_own_least_recently_used_blocks_and_nobody_elses() -> None:
    engine = ToyEngine(64, quotas=Quotas(default=Quota(cap=6)), max_model_len=64)
    serve(engine, "rival", RIVAL_CASE)
    serve(engine, "plan", PLAN)
    serve(engine, "case", CASE)
    stats = engine.stats()
    assert (stats.blocks_cached, stats.quota_evictions, stats.evictions) == (10, 2, 0)
    assert serve(engine, "plan again", PLAN) == 8  # the chain was taken from its end
    assert serve(engine, "rival again", RIVAL_CASE) == 16


def test_public_blocks_above_their_cap_go_and_within_it_are_evicted_for_nobody() -> None:
    engine = ToyEngine(20, quotas=Quotas(public_cap=4), max_model_len=64)
    serve(engine, "old", PUBLIC)
    serve(engine, "new", PUBLIC, prompt=tokens_of(2, 17))
    assert engine.stats().quota_evictions == 4
    for index in range(10):
        serve(engine, f"case{index}", CASE, prompt=tokens_of(10 + index, 60))
    assert engine.stats().evictions > 0
    assert serve(engine, "new again", PUBLIC, prompt=tokens_of(2, 17)) == 16


def test_a_request_that_floors_keep_out_waits_and_is_no_work_until_there_is_room() -> None:
    engine = ToyEngine(24, quotas=Quotas(tenants={"rival": Quota(floor=4)}), max_model_len=72, local_output_reserve=0)
    serve(engine, "rival", RIVAL_CASE)
    assert engine.reserve(make_request("r", tokens_of(5, 40), CASE)) is not None
    engine.add_request(make_request("late", tokens_of(6, 60), CASE, max_tokens=1))
    assert engine.step() == []
    assert not engine.has_work
    assert engine.stats().waiting == 1
    engine.abort("r")
    assert engine.step() == []  # in quarantine
    assert not engine.has_work
    engine.release_quarantine("r")
    engine.run()
    assert engine.tokens("late") == ToyModel.continuation(tokens_of(6, 60), 1, ignore_eos=True)
    assert serve(engine, "rival again", RIVAL_CASE) == 16


def test_room_that_comes_without_a_change_in_what_is_available_is_noticed() -> None:
    """Three idle blocks above the floor became three free ones, and the prefix may be used without going under it."""
    quotas = Quotas(tenants={"acme": Quota(floor=4)})
    engine = ToyEngine(24, quotas=quotas, max_model_len=72, local_output_reserve=0)
    serve(engine, "plan", PLAN)
    serve(engine, "case", CASE, prompt=tokens_of(8, 13))
    assert engine.reserve(make_request("r", tokens_of(7, 68), RIVAL_CASE, max_tokens=1)) is not None
    spans = (ZoneSpan(16, PLAN), ZoneSpan(28, OTHER_CASE))
    prompt = PROMPT[:16] + tokens_of(9, 12)
    engine.add_request(make_request("late", prompt, spans, max_tokens=1))
    assert engine.step() == []
    assert (engine.has_work, engine._pool.num_available) == (False, 3)
    engine.clock.now_s += 900.0
    assert engine.expire() == 3
    assert (engine.has_work, engine._pool.num_available) == (True, 3)
    engine.run()
    assert engine.last("late").num_cached_tokens == 16
    assert engine.tokens("late") == ToyModel.continuation(prompt, 1, ignore_eos=True)


def test_what_a_cap_takes_from_a_preempted_request_is_not_the_prefix_that_the_next_one_counts_on() -> None:
    quotas = Quotas(default=Quota(cap=4))
    engine = ToyEngine(12, quotas=quotas, max_model_len=48, local_output_reserve=0)
    serve(engine, "prefix", PLAN, prompt=tokens_of(1, 16))
    engine.add_request(make_request("low", tokens_of(2, 24), OTHER_CASE, max_tokens=8, priority=1))
    engine.step()
    spans = (ZoneSpan(16, PLAN), ZoneSpan(40, CASE))
    engine.add_request(make_request("high", tokens_of(1, 16) + tokens_of(3, 24), spans, max_tokens=1))
    engine.step()
    engine.check()
    assert engine.stats().preemptions == 1
    assert engine.stats().quota_evictions > 0
    assert engine.last("high").num_cached_tokens == 16


@pytest.mark.parametrize(
    "quotas",
    [
        Quotas(public_cap=9),
        Quotas(tenants={"acme": Quota(floor=5), "rival": Quota(floor=4)}),
        Quotas(public_cap=3, zones={PLAN: Quota(floor=3), SILVER: Quota(floor=3)}),
    ],
)
def test_quotas_that_would_keep_the_longest_request_out_for_ever_are_refused(quotas: Quotas) -> None:
    with pytest.raises(ValueError, match=r"leave 15 of 24 blocks; a request of 64 tokens, the longest, needs 16"):
        ToyEngine(24, quotas=quotas, max_model_len=64)
    ToyEngine(25, quotas=quotas, max_model_len=64)


def test_a_request_labelled_with_another_tenants_zone_is_refused() -> None:
    engine = ToyEngine()
    with pytest.raises(RequestError, match="another tenant"):
        engine.add_request(make_request("a", PROMPT, CASE, tenant="rival"))
    assert serve(engine, "b", CASE, tenant="acme") == 0


# -- pins


def test_a_pinned_prefix_outlives_any_flood_and_is_counted() -> None:
    engine = ToyEngine(24, max_model_len=64)
    assert warm(engine, "warm") == 4
    assert engine.pinned() == ("warm",)
    for index in range(10):
        serve(engine, f"r{index}", CASE, prompt=tokens_of(10 + index, 60))
    stats = engine.stats()
    assert stats.evictions > 0
    assert stats.blocks_pinned == 4
    assert stats.blocks_free + stats.blocks_used + stats.blocks_cached + stats.blocks_pinned == 24
    assert serve(engine, "user", PLAN) == 16


def test_unpinning_drops_what_nobody_uses_and_is_idempotent() -> None:
    engine = ToyEngine(max_model_len=128)
    warm(engine, "warm")
    assert engine.unpin("warm") == 4
    assert engine.unpin("warm") == 0
    assert (engine.pinned(), engine.stats().blocks_free) == ((), 64)
    assert events(engine)["evict", "unpin"] == 4
    assert serve(engine, "user", PLAN) == 0


def test_unpinning_leaves_what_a_request_or_another_pin_uses() -> None:
    engine = ToyEngine(max_model_len=128)
    warm(engine, "one", count=16)
    warm(engine, "two", count=8)  # the same beginning
    assert engine.stats().blocks_pinned == 4
    engine.add_request(make_request("user", PROMPT[:13], PLAN, max_tokens=2))
    engine.step()
    assert engine.unpin("one") == 1
    engine.check()
    assert engine.stats().blocks_pinned == 2
    engine.run()
    assert engine.unpin("two") == 0 + 2
    engine.check()
    assert engine.stats().blocks_cached == 1  # the third stays findable, as any other


def test_what_a_pin_does_not_keep_is_freed_and_a_case_is_never_kept() -> None:
    engine = ToyEngine(max_model_len=128)
    assert warm(engine, "warm", SPANS, count=17) == 3
    stats = engine.stats()
    assert (stats.blocks_pinned, stats.blocks_cached, stats.held) == (3, 1, 0)
    engine.clock.now_s += 900.0
    assert engine.expire() == 1


def test_a_pin_holds_the_findable_block_and_not_its_duplicate() -> None:
    engine = ToyEngine(max_model_len=128)
    for name in ("a", "b"):  # computed side by side: the second's blocks are not findable
        engine.add_request(make_request(name, PROMPT[:16], PLAN, is_prefill_only=True, max_tokens=1))
    engine.run()
    assert engine.pin("b") == 4
    engine.release("a")
    engine.check()
    assert engine.stats().blocks_free == 60
    assert serve(engine, "user", PLAN) == 16


def test_a_request_that_is_not_held_cannot_be_pinned() -> None:
    engine = ToyEngine(max_model_len=128)
    engine.add_request(make_request("a", PROMPT, PLAN))
    for name in ("a", "nobody"):
        with pytest.raises(RequestStateError, match="not HELD"):
            engine.pin(name)


def test_a_pin_that_would_leave_the_longest_request_no_room_is_refused_and_changes_nothing() -> None:
    engine = ToyEngine(20, quotas=Quotas(public_cap=2), max_model_len=64)
    engine.run(make_request("warm", tokens_of(1, 16), PLAN, is_prefill_only=True, max_tokens=1))
    with pytest.raises(PinRefused, match="14 blocks would be left for requests, which need 16"):
        engine.pin("warm")
    assert engine.stats().held == 1
    assert engine.pinned() == ()
    engine.release("warm")
    engine.check()


def test_pinned_public_blocks_count_among_those_that_the_public_cap_bounds() -> None:
    engine = ToyEngine(20, quotas=Quotas(public_cap=4), max_model_len=64)
    serve(engine, "idle", PUBLIC, prompt=tokens_of(9, 13))
    assert engine.stats().blocks_cached == 3
    assert warm(engine, "warm", PUBLIC, count=12) == 3
    assert (engine.stats().blocks_cached, engine.stats().blocks_pinned) == (1, 3)
    assert engine.stats().quota_evictions == 2


def test_a_name_is_pinned_once_and_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache_manager, "MAX_PINS", 2)
    engine = ToyEngine(64, max_model_len=64)
    warm(engine, "a")
    with pytest.raises(PinRefused, match="a is pinned already"):
        warm(engine, "a")
    engine.release("a")
    warm(engine, "b", seed=2)
    with pytest.raises(PinRefused, match="2 prefixes"):
        warm(engine, "c", seed=3)


def test_purging_a_zone_unpins_every_prefix_that_holds_a_block_of_it() -> None:
    engine = ToyEngine(64, max_model_len=64)
    assert warm(engine, "both", [ZoneSpan(8, PUBLIC), ZoneSpan(16, PLAN)]) == 4
    assert warm(engine, "public", PUBLIC, count=8) == 2
    assert warm(engine, "silver", SILVER, seed=3) == 4
    assert engine.purge(PLAN.path, 1) == PurgeCount(num_findable=2, num_scrubbed=2, num_in_use=0, num_pinned=2)
    assert engine.pinned() == ("public", "silver")
    assert engine.stats().blocks_pinned == 6
    engine.check()
    assert serve(engine, "user", [ZoneSpan(8, PUBLIC), ZoneSpan(17, PLAN, 1)], epoch=1) == 8


def test_a_pinned_block_that_a_request_uses_is_scrubbed_when_it_leaves() -> None:
    engine = ToyEngine(64, max_model_len=64)
    warm(engine, "warm")
    engine.add_request(make_request("user", PROMPT, PLAN, max_tokens=4))
    engine.step()
    assert engine.purge(PLAN.path, 1) == PurgeCount(num_findable=4, num_scrubbed=0, num_in_use=5, num_pinned=4)
    engine.check()
    engine.run()
    assert engine.stats().blocks_free == 64
    assert not engine.runner.kv_buffer.any()


# -- epochs


@pytest.mark.parametrize(
    ("stale", "num_found"), [({"public": 1}, 0), ({"plan": 1}, 8), ({"case": 1}, 12), ({"plan": 1, "case": 1}, 8)]
)
def test_from_the_first_block_of_a_zone_whose_epoch_is_stale_nothing_is_found_or_published(
    stale: dict[str, int], num_found: int
) -> None:
    zones = {"public": PUBLIC, "plan": PLAN, "case": CASE}
    engine = ToyEngine()
    serve(engine, "before", stamped(), epoch=0)
    for name, epoch in stale.items():
        engine.purge(zones[name].path, epoch)
    num_cached = engine.stats().blocks_cached
    assert serve(engine, "late", stamped(), epoch=0) == num_found
    assert serve(engine, "later", stamped(), epoch=0) == num_found
    assert engine.stats().blocks_cached == num_cached
    assert engine.stats().stale_epochs == 2
    fresh = {"public": 0, "plan": 0, "case": 0} | stale
    serve(engine, "fresh", stamped(**fresh), epoch=fresh["case"])
    assert serve(engine, "fresh again", stamped(**fresh), epoch=fresh["case"]) == 16
    assert engine.stats().stale_epochs == 2


def test_a_higher_epoch_raises_the_floor_and_purges_what_is_older() -> None:
    engine = ToyEngine()
    serve(engine, "old", stamped())
    engine.take_cache_events()
    engine.add_request(make_request("live", PROMPT, stamped(), max_tokens=4))
    engine.step()
    assert serve(engine, "new", stamped(plan=3)) == 8
    assert [engine.epoch_floor(zone) for zone in (PUBLIC, PLAN, CASE)] == [0, 3, 0]
    assert engine.stats().blocks_cached == 4 + 1  # and the case's block of "old", which nothing leads to
    assert events(engine)["evict", "purge"] == 1
    assert serve(engine, "stale", stamped(plan=2)) == 8
    assert serve(engine, "again", stamped(plan=3)) == 16


def test_a_purge_never_lowers_the_floor_and_may_be_repeated() -> None:
    engine = ToyEngine()
    serve(engine, "a", PLAN)
    assert engine.purge(PLAN.path, 5) == PurgeCount(num_findable=4, num_scrubbed=4)
    assert engine.purge(PLAN.path, 5) == PurgeCount()
    assert engine.purge(PLAN.path, 2) == PurgeCount()
    assert engine.epoch_floor(PLAN) == 5
    serve(engine, "b", [ZoneSpan(17, PLAN, 5)], epoch=5)
    assert engine.purge(PLAN.path, 5) == PurgeCount(num_findable=4, num_scrubbed=4)


def test_a_purge_reaches_a_zone_too_short_to_own_a_block() -> None:
    engine = ToyEngine()

    def spans(epoch: int) -> list[ZoneSpan]:
        return [ZoneSpan(4, PUBLIC), ZoneSpan(6, PLAN, epoch), ZoneSpan(17, CASE)]

    serve(engine, "a", spans(0))
    assert serve(engine, "b", spans(0)) == 16
    engine.purge(PLAN.path, 1)
    assert serve(engine, "c", spans(0)) == 4  # stale
    assert serve(engine, "d", spans(1)) == 4
    assert serve(engine, "e", spans(1)) == 16


def test_a_request_queued_or_running_at_the_purge_publishes_nothing_more_of_the_zone() -> None:
    engine = ToyEngine(max_prefill_chunk=8, max_num_seqs=1, max_num_batched_tokens=8)
    engine.add_request(make_request("running", PROMPT, PLAN))
    engine.add_request(make_request("queued", tokens_of(2, 17), PLAN))
    engine.step()
    assert engine.purge(PLAN.path, 1) == PurgeCount(num_findable=2, num_scrubbed=0, num_in_use=5)
    engine.run()
    assert engine.stats().blocks_cached == 0
    assert engine.stats().blocks_free == 64
    assert engine.stats().scrubbed_blocks == 5


def test_a_reservation_with_a_stale_epoch_finds_nothing_and_is_served() -> None:
    engine = ToyEngine()
    serve(engine, "a", PLAN)
    engine.purge(PLAN.path, 1)
    reservation = engine.reserve(make_request("r", PROMPT, PLAN))
    assert reservation is not None
    assert (reservation.first_missing_block, engine.stats().stale_epochs) == (0, 1)


def test_looking_for_a_stale_prefix_finds_nothing_and_counts_nothing() -> None:
    engine = ToyEngine()
    serve(engine, "a", PLAN)
    engine.purge(PLAN.path, 1)
    assert engine.num_cached_prompt_tokens(make_request("b", PROMPT, PLAN)) == 0
    assert engine.stats().stale_epochs == 0


@pytest.mark.parametrize("epoch", [-1, 2**63])
def test_an_epoch_out_of_range_is_refused(epoch: int) -> None:
    engine = ToyEngine()
    with pytest.raises(RequestError, match="epoch"):
        engine.purge(PLAN.path, epoch)
    with pytest.raises(RequestError, match="epoch"):
        engine.add_request(make_request("a", PROMPT, PLAN, epoch=epoch))
    with pytest.raises(RequestError, match="epoch"):
        engine.add_request(make_request("a", PROMPT, [ZoneSpan(8, PUBLIC, epoch), ZoneSpan(17, PLAN)]))


def test_where_the_table_of_floors_is_full_everything_misses_and_nothing_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch_floors, "MAX_EPOCH_FLOORS", 2)
    engine = ToyEngine(64, max_model_len=64)
    warm(engine, "warm", SILVER, seed=2)
    serve(engine, "a", PLAN)
    engine.purge(CASE.path, 7)
    engine.purge(OTHER_CASE.path, 2)
    assert serve(engine, "b", PLAN) == 16
    engine.add_request(make_request("live", tokens_of(5, 17), SILVER, max_tokens=2))
    engine.step()
    engine.purge(RIVAL_CASE.path, 1)
    assert [engine.epoch_floor(zone) for zone in (PUBLIC, PLAN, CASE, OTHER_CASE, RIVAL_CASE)] == [7] * 5
    assert engine.pinned() == ()
    assert serve(engine, "c", PLAN) == 0
    assert engine.stats().blocks_cached == 0
    current = [ZoneSpan(17, PLAN, 7)]
    serve(engine, "d", current, epoch=7)
    assert serve(engine, "e", current, epoch=7) == 16


def test_no_floor_is_ever_lower_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch_floors, "MAX_EPOCH_FLOORS", 3)
    floors, source, zones = EpochFloors(), random.Random(1), [Zone.parse(f"tenant/t/case/c{i}") for i in range(8)]
    for _ in range(500):
        before = {zone: floors.of(zone) for zone in zones}
        zone, epoch = source.choice(zones), source.randrange(60)
        others_rose = floors.raise_to(zone, epoch)
        assert floors.of(zone) >= max(before[zone], epoch)
        assert all(floors.of(other) >= before[other] for other in zones)
        if not others_rose:
            assert all(floors.of(other) == before[other] for other in zones if other != zone)
        assert len(floors._floors) <= 3
        assert bool(floors) == any(floors.of(other) for other in zones)


# -- a new key


def test_a_new_key_drops_everything_and_live_requests_publish_nothing_under_it() -> None:
    engine = ToyEngine(64, max_model_len=64)
    warm(engine, "warm", SILVER, seed=2)
    serve(engine, "a", SPANS)
    engine.add_request(make_request("live", tokens_of(3, 17), PLAN, max_tokens=8))
    engine.step()
    assert engine.rekey(toy_hasher(b"n" * 32)) == 4 + 4 + 4
    engine.check()
    assert engine.pinned() == ()
    engine.run()
    assert engine.tokens("live") == ToyModel.continuation(tokens_of(3, 17), 8, ignore_eos=True)
    assert engine.stats().blocks_free == 64
    assert serve(engine, "b", SPANS) == 0
    assert serve(engine, "c", SPANS) == 16
    assert events(engine)["evict", "rekey"] == 12


def test_a_request_preempted_across_a_change_of_key_is_computed_again_and_stays_unfindable() -> None:
    engine = ToyEngine(12, max_num_seqs=1, max_model_len=48)
    engine.add_request(make_request("low", PROMPT, PLAN, priority=1))
    engine.step()
    engine.add_request(make_request("high", tokens_of(4, 9), PLAN, max_tokens=1))
    engine.rekey(toy_hasher(b"n" * 32))
    engine.run()
    assert engine.stats().preemptions == 1
    assert engine.tokens("low") == ToyModel.continuation(PROMPT, 8, ignore_eos=True)
    assert engine.stats().blocks_cached == 0


# -- events


def test_hits_and_stores_name_the_request_and_evictions_for_whom() -> None:
    engine = ToyEngine(8, max_model_len=32, local_output_reserve=0)
    serve(engine, "a", SPANS)
    stores = [
        CacheEvent("store", span.zone, count, "", "a", CASE) for span, count in zip(SPANS, (2, 1, 1), strict=True)
    ]
    assert engine.take_cache_events() == [*stores, CacheEvent("scrub", CASE, 1)]
    assert engine.take_cache_events() == []
    serve(engine, "b", SPANS)
    hits = [CacheEvent("hit", span.zone, count, "", "b", CASE) for span, count in zip(SPANS, (2, 1, 1), strict=True)]
    assert engine.take_cache_events() == [*hits, CacheEvent("scrub", CASE, 1)]
    serve(engine, "c", RIVAL_CASE, prompt=tokens_of(9, 23))
    assert engine.take_cache_events()[:3] == [
        CacheEvent("evict", CASE, 1, "demand", "c", RIVAL_CASE),
        CacheEvent("evict", PLAN, 1, "demand", "c", RIVAL_CASE),
        CacheEvent("scrub", CASE, 1),
    ]


def test_evictions_tell_their_reason() -> None:
    engine = ToyEngine(64, quotas=Quotas(zones={PLAN: Quota(cap=3)}), max_model_len=64)
    serve(engine, "plan", PLAN)
    serve(engine, "case", CASE)
    serve(engine, "other", OTHER_CASE)
    engine.take_cache_events()
    engine.purge(CASE.path, 1)
    engine.clock.now_s += 900.0
    engine.expire()
    serve(engine, "plan again", PLAN)
    engine.rekey(toy_hasher(b"n" * 32))
    found = events(engine)
    assert {reason: count for (kind, reason), count in found.items() if kind == "evict"} == {
        "purge": 4,
        "ttl": 4,
        "cap": 1,
        "rekey": 3,
    }
    assert found["scrub", ""] == 8


def test_events_are_bounded_and_lost_ones_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_events, "MAX_CACHE_EVENTS", 2)
    log = CacheEventLog()
    for name in ("a", "b", "c", "a"):
        log.record("hit", CASE, 2, request_id=name)
    assert [(event.request_id, event.num_blocks) for event in log.take()] == [("a", 4), ("b", 2)]
    assert log.num_lost == 1
    log.record("hit", CASE, 1, request_id="c")
    assert len(log.take()) == 1


def test_lost_events_are_in_the_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_events, "MAX_CACHE_EVENTS", 1)
    engine = ToyEngine()
    serve(engine, "a", SPANS)
    assert engine.stats().lost_cache_events == 3
