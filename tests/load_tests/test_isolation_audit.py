"""The audit passes a tight deployment, and fails one that leaks, one that caches nothing and one without floors."""

from __future__ import annotations

import itertools
import json
import math
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.isolation import attack, chart, interference, timing
from load_tests.isolation.__main__ import NUM_SAMPLES, PARTS, SEED, chance_lines, run_part
from load_tests.isolation.checks import Check
from load_tests.isolation.stats import (
    auc_of_lower,
    auc_standard_error,
    chance_outside,
    ks_test,
    p_of_at_least,
)
from load_tests.isolation.system import ATTACKER, INSIDER, PRINCIPALS, VICTIM, AuditError, HttpSystem
from load_tests.isolation.texts import fresh_prompt, member_ids, record_of
from load_tests.local import Server
from tests.load_tests.leaky_system import FakeSystem, by_nobody

SAMPLES = st.lists(st.integers(0, 20).map(float), min_size=1, max_size=30)


def failed(checks: Sequence[Check]) -> set[str]:
    return {check.name for check in checks if not check.holds}


def run_parts(
    system: FakeSystem, parts: Sequence[str], num_samples: int = NUM_SAMPLES
) -> tuple[dict[str, Any], dict[str, Any], list[Check]]:
    found = {part: run_part(part, system, num_samples, SEED) for part in parts}
    return (
        {part: figures for part, (figures, _, _) in found.items()},
        {part: samples for part, (_, samples, _) in found.items() if samples is not None},
        [check for _, _, checks in found.values() for check in checks],
    )


# -- statistics


@given(SAMPLES, SAMPLES)
def test_the_area_is_the_share_of_pairs_in_order(positives: list[float], negatives: list[float]) -> None:
    pairs = list(itertools.product(positives, negatives))
    wanted = sum((low < high) + (low == high) / 2 for low, high in pairs) / len(pairs)
    assert auc_of_lower(positives, negatives) == pytest.approx(wanted)


@given(SAMPLES, SAMPLES)
def test_the_distance_is_the_greatest_between_the_two_steps(a: list[float], b: list[float]) -> None:
    def share(sample: list[float], limit: float) -> float:
        return sum(value <= limit for value in sample) / len(sample)

    wanted = max(abs(share(a, limit) - share(b, limit)) for limit in a + b)
    assert ks_test(a, b).distance == pytest.approx(wanted)


def test_p_of_two_samples_that_do_not_overlap_is_exact() -> None:
    assert ks_test([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]).p == pytest.approx(2 / math.comb(8, 4))
    assert ks_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).p == 1.0
    single_step = [float(value) for value in range(250)], [float(value) for value in (*range(249), 300)]
    assert ks_test(*single_step).p == pytest.approx(1.0)


def test_the_standard_error_is_what_shuffled_ranks_show() -> None:
    rng = random.Random(1)
    areas = [auc_of_lower((ranks := rng.sample(range(40), 40))[:15], ranks[15:]) for _ in range(3000)]
    spread = math.sqrt(sum((area - 0.5) ** 2 for area in areas) / len(areas))
    assert auc_standard_error(15, 25) == pytest.approx(spread, rel=0.05)
    assert auc_standard_error(250, 250) == pytest.approx(0.02585, abs=1e-5)


def test_chances_are_the_normals_and_the_binomials() -> None:
    assert chance_outside(1.959964, 1.0) == pytest.approx(0.05, abs=1e-6)
    assert p_of_at_least(2, 3, 0.5) == pytest.approx(0.5)
    assert p_of_at_least(0, 3, 0.5) == 1.0
    assert p_of_at_least(3, 3, 0.125) == pytest.approx(0.125**3)


def test_an_empty_arm_is_an_error() -> None:
    for positives, negatives in (([], [1.0]), ([1.0], [])):
        with pytest.raises(ValueError, match="both kinds"):
            auc_of_lower(positives, negatives)


# -- what is sent


def test_prompts_are_the_seeds_alone_and_differ_from_the_first_words_on() -> None:
    first, again = ([fresh_prompt(rng) for _ in range(50)] for rng in (random.Random(1), random.Random(1)))
    assert first == again
    assert len({" ".join(prompt.split()[:2]) for prompt in first}) == 50


def test_records_are_alike_but_for_the_id() -> None:
    ids = member_ids(random.Random(1), 100)
    assert len(set(ids)) == 100
    assert len({record_of(member_id).replace(member_id, "") for member_id in ids}) == 1
    assert len({len(member_id) for member_id in ids}) == 1


def test_both_halves_of_a_round_send_alike_and_only_the_warm_one_repeats() -> None:
    system = FakeSystem()
    timing.measure(system, random.Random(1), 40)
    asked = system.asked[3 * timing.NUM_WARM_UP :]
    halves = [asked[start : start + 3] for start in range(0, len(asked), 3)]
    assert {tuple(caller for caller, _ in half) for half in halves} == {(VICTIM, ATTACKER, INSIDER)}
    num_texts = [len({text for _, text in half}) for half in halves]
    assert Counter(num_texts) == {1: 40, 3: 40}
    rounds = list(zip(num_texts[::2], num_texts[1::2], strict=True))
    assert set(rounds) == {(1, 3), (3, 1)}
    repeats = Counter(text for _, text in asked)
    assert set(repeats.values()) == {1, 3}


def test_a_search_tries_the_victims_id_in_every_place() -> None:
    system = FakeSystem()
    searches = attack.measure(system, random.Random(1), 250)
    whole = [search for search in searches["cross_zone"] if search.is_whole]
    assert len(whole) == 60
    sent = system.asked[3 * attack.NUM_WARM_UP :]
    places, run = [], 0
    secret = ""
    for caller, text in sent:
        run = run + 1 if caller == ATTACKER else 0
        if caller == VICTIM:
            secret = text
        elif caller == ATTACKER and text == secret:
            places.append(run)
    assert len(places) == 250
    assert set(places) == set(range(1, attack.NUM_CANDIDATES + 1))


# -- verdicts


@pytest.fixture(scope="module")
def tight() -> tuple[dict[str, Any], dict[str, Any], list[Check]]:
    return run_parts(FakeSystem(), PARTS)


def test_a_tight_deployment_passes_every_check(tight: tuple[dict[str, Any], dict[str, Any], list[Check]]) -> None:
    figures, samples, checks = tight
    assert failed(checks) == set()
    assert sum(check.is_control for check in checks) == 5
    assert len(checks) == 9
    assert {len(arm) for arm in samples["timing"].values()} == {NUM_SAMPLES}
    assert {len(found) for found in samples["attack"].values()} == {NUM_SAMPLES}
    assert figures["attack"]["auc_standard_error"] == pytest.approx(0.02585, abs=1e-5)
    assert figures["attack"]["same_zone"]["recovery_rate"] > 0.9


def test_one_zone_for_all_fails_the_timing_audit_and_the_attack_and_no_control() -> None:
    _, _, checks = run_parts(FakeSystem(by_nobody), ("timing", "attack"))
    assert failed(checks) == {check.name for check in checks if not check.is_control}


def test_a_leak_far_below_the_noise_of_one_answer_is_found() -> None:
    """A tenth of what a hit gains: a few milliseconds within a noise of six."""

    class Slight(FakeSystem):
        seen: set[str]

        def ask(self, caller: str, text: str) -> float:
            self.seen = getattr(self, "seen", set())
            is_known = caller == ATTACKER and text in self.seen
            self.seen.add(text)
            return super().ask(caller, text) - (0.004 if is_known else 0.0)

    _, _, checks = run_parts(Slight(), ("timing", "attack"))
    assert not any(check.is_control for check in checks if not check.holds)
    assert "what another tenant has sent is not told apart" in failed(checks)
    assert "another tenant's ids are ranked as by chance" in failed(checks)


def test_a_deployment_that_caches_nothing_fails_the_controls() -> None:
    _, _, checks = run_parts(FakeSystem(caches=False), PARTS)
    assert {check.name for check in checks if check.is_control} <= failed(checks)


def test_a_tenant_without_a_floor_loses_hits_to_a_flood() -> None:
    figures = interference.measure(FakeSystem(floor=False), random.Random(1))
    assert figures["hits_after"][VICTIM] < figures["hits_before"][VICTIM]
    assert failed(interference.judge(figures)) == {"it takes none from a tenant within its floor"}


def test_a_flood_that_evicts_nothing_proves_nothing() -> None:
    class Dry(FakeSystem):
        def flood(self, caller: str, prompts: Sequence[Sequence[int]]) -> None:
            pass

    checks = interference.judge(interference.measure(Dry(), random.Random(1)))
    assert failed(checks) == {check.name for check in checks if check.is_control}


def test_a_part_draws_the_same_alone(tight: tuple[dict[str, Any], dict[str, Any], list[Check]]) -> None:
    together, alone = FakeSystem(), FakeSystem()
    run_parts(together, ("timing", "attack"), 5)
    run_parts(alone, ("attack",), 5)
    assert together.asked[-len(alone.asked) :] == alone.asked


def test_the_output_says_how_often_chance_fails_it(tight: tuple[dict[str, Any], dict[str, Any], list[Check]]) -> None:
    timing_line, attack_line = chance_lines(tight[0])
    assert "below 0.01 in 1% of runs" in timing_line
    assert "standard error of 0.026" in attack_line
    assert "5.3% of runs" in attack_line


def test_the_chart_has_a_panel_of_two_arms_for_each_control_and_each_attack(
    tight: tuple[dict[str, Any], dict[str, Any], list[Check]],
) -> None:
    figures, samples, _ = tight
    found = list(chart.panels(json.loads(json.dumps({**figures, "samples_s": samples}))))
    assert [len(arms) for _, arms in found] == [2] * 4
    assert {len(ttft_s) for _, arms in found for ttft_s in arms.values()} == {NUM_SAMPLES}
    assert found[1][1] == {name: samples["timing"][name] for name in (timing.CROSS_WARM, timing.CROSS_COLD)}


# -- over HTTP


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    keys: set[str]
    num_finished = 0

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer(json.dumps({"data": [{"id": "m"}]}))
        else:
            self._answer(
                f"zoneserve_e2e_request_latency_seconds_count {type(self).num_finished}\n"
                'zoneserve_prompt_tokens_total{origin="decode_cache"} 5\n'
                'zoneserve_prompt_tokens_total{origin="prefill_cache"} 2\n'
                'zoneserve_prompt_tokens_total{origin="prefill_computed"} 100\n'
                'zoneserve_evictions_total{role="decode"} 3\n'
            )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"] if "messages" in body else ""
        type(self).keys.add(self.headers["Authorization"])
        type(self).num_finished += 1
        if text == "refuse":
            self._answer("no", 503)
            return
        chunk = {"error": {"message": "gone"}} if text == "fail" else {"choices": [{"delta": {"content": "a"}}]}
        self._answer(f"data: {json.dumps(chunk)}\n\n" + ("" if text == "cut" else "data: [DONE]\n\n"))

    def _answer(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def system(tmp_path: Path) -> Iterator[HttpSystem]:
    Handler.keys, Handler.num_finished = set(), 0
    key_files = {entry["principal"]: tmp_path / entry["principal"] for entry in PRINCIPALS}
    for name, path in key_files.items():
        path.write_text(f"key of {name}\n", encoding="utf-8")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        server = Server(f"http://127.0.0.1:{http.server_port}", key_files[VICTIM], key_files=key_files)
        found = HttpSystem(server, {"decode": 4096})
        yield found
        found.close()
        http.shutdown()
        thread.join()


def test_each_caller_has_a_key_of_its_own_and_all_that_was_asked_is_counted(system: HttpSystem) -> None:
    for caller in (VICTIM, INSIDER, ATTACKER):
        assert system.ask(caller, "hello") > 0
    system.flood(ATTACKER, [[1, 2], [3, 4], [5, 6], [7, 8]])
    counts = system.counts()
    assert Handler.num_finished == 3 + 4
    assert Handler.keys == {f"Bearer key of {caller}" for caller in (VICTIM, INSIDER, ATTACKER)}
    assert (counts.cached_tokens, counts.evicted_blocks) == (7, {"decode": 3})


@pytest.mark.parametrize("text", ["refuse", "fail", "cut"])
def test_an_answer_that_is_not_whole_ends_the_audit(text: str, system: HttpSystem) -> None:
    with pytest.raises(AuditError, match="attacker"):
        system.ask(ATTACKER, text)


def test_answers_that_are_never_counted_end_the_audit(system: HttpSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("load_tests.isolation.system.COUNTED_WITHIN_S", 0.0)
    system.ask(VICTIM, "hello")
    Handler.num_finished = 0
    with pytest.raises(AuditError, match="did not reach"):
        system.counts()


def test_the_callers_are_two_of_one_case_and_strangers_and_the_floor_is_the_victims() -> None:
    from load_tests.isolation.system import QUOTAS

    zones = {entry["principal"]: entry["zone"] for entry in PRINCIPALS}
    tenants = {entry["principal"]: entry["tenant"] for entry in PRINCIPALS}
    assert zones[VICTIM] == zones[INSIDER]
    assert len(set(zones.values())) == len(set(tenants.values())) == 3
    assert list(QUOTAS["tenants"]) == [tenants[VICTIM]]
