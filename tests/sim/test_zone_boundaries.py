"""Zones between the hops: what was spoiled after the ingress sealed it, purged or re-keyed on the way, never lands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from deployments.messages import GenerateCall, PrefillCall
from engine.zone import PUBLIC, ZoneSpan
from tests.deployments.support import GRANT_KEY
from tests.engine.toy_model import CASE, OTHER_CASE, PLAN, RIVAL_CASE, ToyModel, tokens_of
from tests.sim.cluster import NEW_GRANT_KEY, NEW_TRANSFER_KEY, TRANSFER_KEY, Cluster, running_cluster
from tests.sim.test_every_moment import MIN_TURNS
from tests.sim.test_handoff_scenarios import NUM_BLOCKS, PROMPT, assert_landed, assert_recomputed, on_a_cluster
from tests.sim.virtual_time import run_in_virtual_time, virtual_loop
from transfer.local_connector import Fault

SPANS = (ZoneSpan(8, PUBLIC), ZoneSpan(16, PLAN), ZoneSpan(30, CASE))
Spoil = Callable[[GenerateCall], GenerateCall]


def in_zone(*spans: ZoneSpan) -> Spoil:
    return lambda call: replace(call, zone_spans=spans)


SPOILED: dict[str, Spoil] = {
    "no grant": lambda call: replace(call, grant=b""),
    "public": in_zone(ZoneSpan(30, PUBLIC)),
    "another case": in_zone(*SPANS[:2], ZoneSpan(30, OTHER_CASE)),
    "another tenant": in_zone(ZoneSpan(8, PUBLIC), ZoneSpan(30, RIVAL_CASE)),
    "a wider plan": in_zone(ZoneSpan(8, PUBLIC), ZoneSpan(28, PLAN), ZoneSpan(30, CASE)),
    "another epoch": lambda call: replace(call, epoch=1),
    "another tenant's blocks": lambda call: replace(call, tenant="rival"),
    "another prompt": lambda call: replace(call, prompt_token_ids=tokens_of(9, 30)),
    "another request": lambda call: replace(call, request_id="gen-other"),
}


def steps(cluster: Cluster) -> tuple[int, int]:
    return (
        cluster.decode.host._engine.stats().steps,
        cluster.prefill.replica.host._engine.stats().steps,
    )


def spoil_on_the_way(cluster: Cluster, change: Callable[[PrefillCall], PrefillCall]) -> None:
    """What decode sends to prefill is another call than the one it was given."""
    dispatch = cluster.pool.dispatch
    cluster.pool.dispatch = lambda selection, call: dispatch(selection, change(call))  # type: ignore[method-assign]


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_decode_computes_nothing_for_a_call_that_is_not_as_the_ingress_sealed_it(spoil: Spoil) -> None:
    async def body(cluster: Cluster) -> None:
        answer = await cluster.answer(PROMPT, zone=SPANS, spoil=spoil)
        assert answer.error == "internal_error: the call has no valid grant"
        assert answer.tokens == []
        assert steps(cluster) == (0, 0)
        assert cluster.grant_refusals(cluster.decode) == {"forged": 1}
        (denial,) = cluster.log.fields("zone.deny")
        assert denial["reason"] == "grant_forged"
        assert denial["request_id"].startswith("gen-")

    on_a_cluster(body)


def test_a_malformed_grant_and_an_id_that_is_none_are_told_by_reason_alone() -> None:
    async def body(cluster: Cluster) -> None:
        def spoil(call: GenerateCall) -> GenerateCall:
            return replace(call, grant=call.grant[:-1], request_id="a patient's name")

        assert (await cluster.answer(PROMPT, spoil=spoil)).tokens == []
        assert cluster.grant_refusals(cluster.decode) == {"malformed": 1}
        assert cluster.log.fields("zone.deny") == [{"reason": "grant_malformed"}]

    on_a_cluster(body)


def test_an_expired_grant_computes_nothing() -> None:
    async def body(cluster: Cluster) -> None:
        calls: list[GenerateCall] = []
        await cluster.answer(PROMPT, spoil=lambda call: (calls.append(call), call)[1])
        before = steps(cluster)
        await asyncio.sleep(66.0)
        answer = await cluster.answer(PROMPT, spoil=lambda call: calls[0])
        assert answer.error == "internal_error: the call has no valid grant"
        assert steps(cluster) == before
        assert cluster.grant_refusals(cluster.decode) == {"expired": 1}

    on_a_cluster(body)


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_prefill_trusts_the_ingress_and_not_decode(spoil: Spoil) -> None:
    """Decode sends on another call than it was given: prefill computes nothing of it, and decode its own."""

    async def body(cluster: Cluster) -> None:
        spoil_on_the_way(cluster, lambda call: replace(call, granted=spoil(call.granted)))
        answer = await cluster.answer(PROMPT, zone=SPANS)
        assert answer.tokens == ToyModel.continuation(PROMPT, 6, ignore_eos=True)
        assert_recomputed(cluster, answer, "refused_grant_forged")
        assert steps(cluster)[1] == 0
        assert cluster.grant_refusals(cluster.prefill.replica) == {"forged": 1}
        assert [denial["reason"] for denial in cluster.log.fields("transfer.deny")] == ["grant_forged"]
        assert cluster.log.fields("transfer.send") == cluster.log.fields("transfer.recv") == []

    on_a_cluster(body)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"zone": OTHER_CASE}, "wrong_zone"),
        ({"zone": CASE, "request_id": "gen-x"}, "wrong_request"),
    ],
)
def test_a_ticket_of_one_request_is_not_good_for_the_grant_of_another(other: dict[str, Any], reason: str) -> None:
    """Decode mixes two good calls up: blocks of one request under the grant of the other."""

    async def body(cluster: Cluster) -> None:
        good: list[GenerateCall] = []
        await cluster.answer(PROMPT, spoil=lambda call: (good.append(call), call)[1], **other)
        spoil_on_the_way(cluster, lambda call: replace(call, granted=good[0]))
        before = steps(cluster)[1]
        answer = await cluster.answer(tokens_of(2, 30), zone=CASE)
        assert answer.provenance is not None
        assert answer.provenance.fallback == f"refused_{reason}"
        assert steps(cluster)[1] == before
        (denial,) = cluster.log.fields("transfer.deny")
        assert (denial["reason"], denial["zone"]) == (reason, good[0].zone_spans[-1].zone.path)

    on_a_cluster(body)


@pytest.mark.parametrize("damage", [lambda sealed: sealed[:-1], lambda sealed: b"", lambda sealed: bytes(len(sealed))])
def test_a_damaged_ticket_is_refused_counted_and_audited(damage: Callable[[bytes], bytes]) -> None:
    async def body(cluster: Cluster) -> None:
        spoil_on_the_way(cluster, lambda call: replace(call, sealed_ticket=damage(call.sealed_ticket)))
        assert_recomputed(cluster, await cluster.answer(PROMPT, zone=SPANS), "refused_forged")
        assert cluster.prefill.replica._sender.stats().refused["forged"] == 1
        (denial,) = cluster.log.fields("transfer.deny")
        assert denial == {"reason": "forged", "request_id": "gen-0", "zone": CASE.path, "epoch": 0}

    on_a_cluster(body)


def test_an_expired_ticket_is_refused_and_audited() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.network.delays_call_s = 9.0
        cluster.network.loses_cancel = 1.0
        assert_recomputed(cluster, await cluster.answer(PROMPT, zone=SPANS), "timeout")
        await cluster.come_to_rest()
        assert cluster.prefill.replica._sender.stats().refused["expired"] == 1
        assert [denial["reason"] for denial in cluster.log.fields("transfer.deny")] == ["timeout", "expired"]
        assert steps(cluster)[1] == 0

    on_a_cluster(body)


def test_a_replayed_ticket_is_refused_and_audited() -> None:
    async def body(cluster: Cluster) -> None:
        calls: list[PrefillCall] = []
        spoil_on_the_way(cluster, lambda call: (calls.append(call), call)[1])
        assert_landed(await cluster.answer(PROMPT, zone=SPANS), prefill_computed=30)
        replayed = replace(calls[0], request_id=calls[0].request_id + "-again")
        events = [event async for event in cluster.prefill.replica.prefill(replayed)]  # type: ignore[attr-defined]
        assert [event.reason for event in events] == ["replayed"]
        (denial,) = cluster.log.fields("transfer.deny")
        assert denial["reason"] == "replayed"

    on_a_cluster(body)


def test_both_sides_record_a_transfer_alike() -> None:
    async def body(cluster: Cluster) -> None:
        assert_landed(await cluster.answer(PROMPT, zone=SPANS), prefill_computed=30)
        (sent,), (received,) = cluster.log.fields("transfer.send"), cluster.log.fields("transfer.recv")
        assert sent["peer"] == cluster.decode.connector.name
        assert received["peer"] == cluster.prefill.name
        assert sent | {"peer": ""} == received | {"peer": ""}
        assert (received["zone"], received["epoch"], received["num_blocks"]) == (CASE.path, 0, NUM_BLOCKS)
        assert received["request_id"].startswith("gen-0/")
        assert cluster.log.fields("transfer.deny") == []

    on_a_cluster(body)


def test_a_landing_that_is_refused_is_audited_and_not_as_received() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.fabric.faults.extend([Fault(), Fault(corrupt_block=1)])
        assert_recomputed(cluster, await cluster.answer(PROMPT, zone=SPANS), "digest_mismatch")
        (denial,) = cluster.log.fields("transfer.deny")
        assert (denial["reason"], denial["zone"]) == ("digest_mismatch", CASE.path)
        assert denial["peer"] == cluster.prefill.name
        assert cluster.log.fields("transfer.recv") == []

    on_a_cluster(body)


def test_nothing_is_taken_on_while_the_audit_log_cannot_be_written() -> None:
    async def body(cluster: Cluster) -> None:
        cluster.log.is_writable = False
        answer = await cluster.answer(PROMPT, zone=SPANS)
        assert answer.error == "audit_unavailable: the audit log cannot be written"
        assert steps(cluster) == (0, 0)
        cluster.log.is_writable = True
        assert_landed(await cluster.answer(PROMPT, zone=SPANS), prefill_computed=30)

    on_a_cluster(body)


def test_prefill_takes_nothing_on_while_its_own_audit_log_cannot_be_written() -> None:
    async def body(cluster: Cluster) -> None:
        def fail(call: PrefillCall) -> PrefillCall:
            cluster.log.is_writable = False
            return call

        spoil_on_the_way(cluster, fail)
        assert_recomputed(cluster, await cluster.answer(PROMPT, zone=SPANS), "refused_audit_unavailable")
        assert steps(cluster)[1] == 0

    on_a_cluster(body)


def test_prefill_refuses_a_ticket_of_an_epoch_that_it_has_purged() -> None:
    """The purge has reached prefill; the call was sealed before it."""

    async def body(cluster: Cluster) -> None:
        prefill = cluster.prefill.replica
        await prefill.host.call(lambda engine: engine.purge(CASE.path, 1))
        answer = await cluster.answer(PROMPT, zone=SPANS)
        assert answer.tokens == ToyModel.continuation(PROMPT, 6, ignore_eos=True)
        assert_recomputed(cluster, answer, "refused_wrong_epoch")
        assert prefill._sender.stats().refused["wrong_epoch"] == 1
        assert steps(cluster)[1] == 0
        assert [denial["reason"] for denial in cluster.log.fields("transfer.deny")] == ["wrong_epoch"]
        cluster.epochs.raise_epoch(CASE)
        assert_landed(await cluster.answer(PROMPT, zone=SPANS), prefill_computed=14, decode_cache=16)

    on_a_cluster(body)


def test_after_a_purge_the_same_prompt_is_a_miss_on_both_sides_and_then_a_hit_again() -> None:
    async def body(cluster: Cluster) -> None:
        for _ in range(2):
            assert_landed(await cluster.answer(PROMPT, zone=CASE), prefill_computed=30)
            answer = await cluster.answer(PROMPT + tokens_of(3, 20), zone=CASE)
            assert answer.provenance is not None
            assert answer.provenance.origins["decode_cache"] == 28
            epoch = cluster.epochs.raise_epoch(CASE)
            for replica in (cluster.decode, cluster.prefill.replica):
                await replica.host.call(lambda engine, epoch=epoch: engine.purge(CASE.path, epoch))

    on_a_cluster(body)


@pytest.mark.parametrize("keeps_old", [True, False])
def test_keys_that_change_at_any_moment_cost_no_answer(keeps_old: bool) -> None:
    """Grants and tickets under the old keys are good while the ring holds those; else prefill's part is computed
    again, or the call refused: never a wrong token, never a block left behind."""
    ends: set[str | None] = set()

    async def one(num_turns: int) -> bool:
        async with running_cluster(num_turns) as cluster:
            cluster.fabric.draw_fault = lambda: Fault(delay_s=0.01)

            def rotate() -> None:
                old = (TRANSFER_KEY,) if keeps_old else ()
                cluster.rotate((NEW_TRANSFER_KEY, *old), (NEW_GRANT_KEY, *((GRANT_KEY,) if keeps_old else ())))

            loop = virtual_loop()
            started = loop.num_turns
            answer, task = cluster.ask(PROMPT, zone=SPANS, max_tokens=3)
            loop.interrupt(num_turns, rotate)
            await asyncio.wait([task])
            is_over = loop.num_turns - started < num_turns
            ends.add(answer.error or (answer.provenance and answer.provenance.fallback) or None)
            if keeps_old:
                assert_landed(answer, prefill_computed=30)
            return is_over

    num_turns = 0
    while not run_in_virtual_time(one(num_turns)):
        num_turns += 1
    assert num_turns > MIN_TURNS
    if not keeps_old:
        assert ends == {None, "refused_grant_forged", "internal_error: the call has no valid grant"}


def test_a_new_key_seals_only_when_the_slowest_replica_has_had_time_to_learn_it() -> None:
    """Decode has the new ring first; prefill looks a moment later."""

    async def body(cluster: Cluster) -> None:
        ring = (NEW_TRANSFER_KEY, TRANSFER_KEY), (NEW_GRANT_KEY, GRANT_KEY)
        cluster.decode.rotate(*ring)
        assert_landed(await cluster.answer(PROMPT, zone=SPANS), prefill_computed=30)
        cluster.prefill.replica.rotate(*ring)
        await asyncio.sleep(120.0)
        cluster.prefill.replica.rotate((NEW_TRANSFER_KEY,), (NEW_GRANT_KEY, GRANT_KEY))
        assert_landed(await cluster.answer(tokens_of(5, 30), zone=OTHER_CASE), prefill_computed=30)
        assert sum(cluster.prefill.replica._sender.stats().refused.values()) == 0

    on_a_cluster(body)
