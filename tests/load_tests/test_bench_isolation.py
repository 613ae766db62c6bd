"""The price of isolation: all modes are sent the same calls, hits are by counters, the record says what was taken."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from deployments.trust.policy import load_policy
from load_tests import bench_isolation
from load_tests.bench_isolation import (
    AUDITED,
    FIGURES,
    MODES,
    NONE,
    PRINCIPALS,
    STRICT,
    TOGETHER,
    UNAUDITED,
    ZONES,
    arrivals,
    bursts,
    figures_of,
    section,
    strict_policy,
)
from load_tests.claim_chats import CASES, MAX_TURNS, TENANTS, plan_calls, sample_claims
from load_tests.exposition import Exposition
from load_tests.figures import spread
from load_tests.local import LOCAL_CONFIG, Server, _prepare
from load_tests.mixed_load import Answer

CLAIMS = ["a claim", "another claim"]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    key_files = {entry["principal"]: tmp_path / entry["principal"] for entry in PRINCIPALS}
    for name, path in key_files.items():
        path.write_text(f"key of {name}\n", encoding="utf-8")
    return Server("http://localhost", key_files[TENANTS[0]], key_files=key_files)


def test_a_plan_is_its_seeds_alone() -> None:
    first, again, other = (plan_calls(seed, rate_per_s=3, duration_s=20, claims=CLAIMS) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_call_carries_all_that_was_said_in_its_case_before_and_nothing_of_another() -> None:
    calls = plan_calls(1, rate_per_s=5, duration_s=60, claims=CLAIMS)
    last = {}
    turns = Counter[tuple[str, str]]()
    for call in calls:
        conversation = call.tenant, call.case
        assert call.messages[: len(last.get(conversation, ()))] == last.get(conversation, ())
        last[conversation] = call.messages
        turns[conversation] += 1
    assert max(turns.values()) == MAX_TURNS
    claims = [messages[3]["content"] for messages in last.values()]
    assert len(set(claims)) == len(claims) > 20
    assert {tenant for tenant, _ in last} == set(TENANTS)


def test_more_cases_than_a_principal_may_own_are_refused() -> None:
    with pytest.raises(ValueError, match="cases of one tenant"):
        plan_calls(1, rate_per_s=100, duration_s=60, claims=CLAIMS)


def test_every_sample_claim_has_a_private_text() -> None:
    claims = sample_claims()
    assert len(claims) > 10
    assert all(claim.startswith("CLAIM ") for claim in claims)


def test_modes_differ_in_caller_and_labels_alone(server: Server) -> None:
    calls = plan_calls(1, rate_per_s=3, duration_s=20, claims=CLAIMS)
    sent = {mode: arrivals(calls, server, mode, "m") for mode in MODES}
    assert sent[ZONES] == sent[STRICT]
    for call, zoned, bare in zip(calls, sent[ZONES], sent[NONE], strict=True):
        assert zoned.headers == {"Authorization": f"Bearer key of {call.tenant}"}
        assert bare.headers == {"Authorization": f"Bearer key of {TOGETHER}"}
        metadata = zoned.body.pop("metadata")
        assert metadata == {"zoneserve.case": call.case, "zoneserve.segments": "system,rubric,policies"}
        assert (zoned.at_s, zoned.body) == (bare.at_s, bare.body)


def test_callers_and_the_strict_policy_are_such_that_the_deployment_takes_them(tmp_path: Path) -> None:
    from deployments.config import load_config
    from deployments.trust.principals import Principals

    policy_file = strict_policy(tmp_path)
    trust = {"policy_file": str(policy_file), "audit": None}
    prepared, key_files = _prepare(tmp_path, LOCAL_CONFIG, 8123, PRINCIPALS, trust)
    config = load_config(prepared)
    assert config.trust.audit is None
    assert load_policy(policy_file).strict
    assert not load_policy(bench_isolation.DEFAULT_POLICY).strict
    principals = Principals.from_file(config.trust.keys_file)
    for name, key_file in key_files.items():
        principal = principals.find(key_file.read_text(encoding="utf-8").strip())
        assert principal is not None
        assert principal.name == name
        assert len(principal.cases) == (0 if name == TOGETHER else len(CASES))


def test_bursts_fit_into_the_deployment_and_no_two_turns_send_the_same() -> None:
    limit = yaml.safe_load(LOCAL_CONFIG.read_text(encoding="utf-8"))["routing"]["max_inflight_requests"]
    sent = [call.messages for turn in range(3) for calls in bursts(1, turn, CLAIMS).values() for call in calls]
    assert len({str(messages) for messages in sent}) == len(sent)
    for calls in bursts(1, 1, CLAIMS).values():
        assert 20 < len(calls) <= limit
        assert {call.at_s for call in calls} == {0.0}
        assert {call.tenant for call in calls} == set(TENANTS)


def test_the_hit_rate_is_of_what_the_counters_gained() -> None:
    def exposition(cached: int, pushed: int, computed: int) -> Exposition:
        counts = {"decode_cache": cached, "prefill_cache": pushed, "prefill_computed": computed}
        return Exposition.parse(
            "\n".join(f'zoneserve_prompt_tokens_total{{origin="{o}"}} {n}' for o, n in counts.items())
        )

    answers = [Answer("chat", 0.1, (0.01,), 2), Answer("chat", 0.3, (), 4), Answer("chat", fault="status 503")]
    found = figures_of(answers, exposition(1000, 0, 5), exposition(1030, 20, 55), seconds=2.0)
    assert found["hit_rate"] == pytest.approx(0.5)
    assert (found["ttft_p50_ms"], found["ttft_p99_ms"]) == (100.0, 300.0)
    assert (found["output_tokens_per_s"], found["failed"]) == (3.0, 1)


def test_the_section_sets_the_modes_side_by_side_and_the_ratio_of_the_log() -> None:
    three = spread([1.0, 2.0, 3.0])
    zones = {"tenants": 3, "arrivals_per_s": 1.5, "seconds": 40.0, "rounds": 3}
    audit = {"calls_per_s": {AUDITED: three, UNAUDITED: three}, "audited_over_unaudited": spread([0.99, 1.0, 1.01])}
    report = {
        "zones": {**zones, "modes": dict.fromkeys(MODES, dict.fromkeys(FIGURES, three))},
        "audit": {"claims": audit},
    }
    text = section(report)
    assert "| | with zones | strict | without zones |" in text
    assert text.count("| 2 (1 - 3) | 2 (1 - 3) | 2 (1 - 3) |") == len(FIGURES)
    assert "| claims | 2 (1 - 3) | 2 (1 - 3) | 1 (0.99 - 1.01) |" in text
    assert section({"zones": report["zones"]}) in text
