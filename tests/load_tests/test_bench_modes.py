"""The comparison of the two modes sends both the same, counts what met the objectives, and says so in a document."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from load_tests import bench_modes
from load_tests.bench_modes import ITL_OBJECTIVE_S, TTFT_OBJECTIVE_S, figures_of, is_good, section
from load_tests.exposition import Exposition
from load_tests.figures import spread
from load_tests.local import Server
from load_tests.mixed_load import WEIGHTS, Answer, Arrival, plan_arrivals, review_answer, send_plan

EMPTY = Exposition.parse("")


def test_a_plan_is_its_seeds_alone() -> None:
    first, again, other = (plan_arrivals(seed, rate_per_s=5, duration_s=20, model="m") for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_plan_has_every_kind_in_order_of_time_and_no_prompt_twice() -> None:
    plan = plan_arrivals(1, rate_per_s=10, duration_s=60, model="m")
    kinds = Counter(arrival.kind for arrival in plan)
    assert 450 < len(plan) < 750  # a seeded draw: 600 on average
    assert kinds.most_common() == sorted(kinds.items(), key=lambda item: -WEIGHTS[item[0]])
    times = [arrival.at_s for arrival in plan]
    assert times == sorted(times)
    assert times[-1] < 60
    prompts = [json.dumps({key: arrival.body.get(key) for key in ("messages", "prompt", "x12")}) for arrival in plan]
    assert len(set(prompts)) == len(plan)


def test_each_review_is_of_claims_that_nobody_has_sent() -> None:
    plan = [
        arrival for arrival in plan_arrivals(1, rate_per_s=10, duration_s=30, model="m") if arrival.kind == "review"
    ]
    assert len(plan) > 5
    for index, arrival in enumerate(plan):
        claims = [line for line in arrival.body["x12"].splitlines() if line.startswith("CLM*")]
        assert claims
        assert len({line.split("*")[1].rpartition("-")[0] for line in claims}) == 1
        assert all(claims[0] not in other.body["x12"] for other in plan[index + 1 :])


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (Answer("chat", TTFT_OBJECTIVE_S, (ITL_OBJECTIVE_S,) * 10, 11), True),
        (Answer("chat", TTFT_OBJECTIVE_S * 1.01, (ITL_OBJECTIVE_S,), 2), False),
        (Answer("chat", 0.1, (ITL_OBJECTIVE_S,) * 50 + (ITL_OBJECTIVE_S * 2,), 52), False),
        (Answer("chat", 0.1, (ITL_OBJECTIVE_S,) * 199 + (ITL_OBJECTIVE_S * 2,), 201), True),  # within its 1 %
        (Answer("chat", 0.1, (), 1), True),
        (Answer("chat", 0.1, (0.001,), 2, fault="TimeoutError"), False),
    ],
)
def test_an_answer_is_good_when_whole_and_inside_both_objectives(answer: Answer, good: bool) -> None:
    assert is_good(answer) is good


def test_figures_count_failures_and_keep_reviews_out_of_the_gaps() -> None:
    after = Exposition.parse(
        'zoneserve_request_queue_time_seconds_sum{role="decode"} 3\n'
        'zoneserve_request_queue_time_seconds_count{role="decode"} 4\n'
        'zoneserve_handoff_seconds_count{role="decode"} 7\n'
    )
    answers = [
        Answer("chat", 0.1, (0.01, 0.03), 3),
        Answer("review", 0.2, (0.5,), 5),
        Answer("completion", fault="status 503"),
    ]
    found = figures_of(answers, EMPTY, after, seconds=2.0)
    assert (found["goodput_per_s"], found["good_share"], found["failed"]) == (0.5, pytest.approx(1 / 3), 1)
    assert (found["output_tokens_per_s"], found["handoffs"]) == (4.0, 7)
    assert (found["itl_p50_ms"], found["itl_p99_ms"]) == (10.0, 30.0)
    assert found["queue_mean_ms"] == 750.0


def test_a_review_is_judged_by_what_the_ingress_reports() -> None:
    serving = {"finish_reason": "stop", "completion_tokens": 5, "ttft_s": 0.2, "e2e_s": 1.0}
    answer = review_answer({"serving": serving})
    assert (answer.ttft_s, answer.gaps_s, answer.num_tokens) == (0.2, (pytest.approx(0.2),), 5)
    assert review_answer({"serving": {**serving, "completion_tokens": 0}}).fault == "finish reason stop"


STREAMS = {
    "/v1/chat/completions": [
        {"choices": [{"delta": {"role": "assistant", "content": "a"}}]},
        {"choices": [{"delta": {"content": "b"}}]},
        {"choices": [{"delta": {}, "finish_reason": "length"}]},
    ],
    "/v1/completions": [{"choices": [{"text": "a"}]}, {"error": {"message": "gone"}}],
    "/v1/reviews": [
        {"type": "accepted"},
        *[{"type": "review", "serving": {"finish_reason": "stop", "completion_tokens": 1, "ttft_s": 0.1, "e2e_s": 0.1}}]
        * 2,
    ],
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("refuse"):
            self.send_error(503)
            return
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in STREAMS[self.path])
        text += "" if body.get("cut") else "data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "key").write_text("secret\n", encoding="utf-8")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield Server(f"http://127.0.0.1:{http.server_port}", tmp_path / "key")
        http.shutdown()
        thread.join()


def test_answers_are_read_to_their_end_or_have_a_fault(server: Server) -> None:
    chat = "/v1/chat/completions"
    plan = [
        Arrival(0.0, "chat", chat, {}),
        Arrival(0.0, "chat", chat, {"cut": True}),
        Arrival(0.0, "chat", chat, {"refuse": True}),
        Arrival(0.0, "completion", "/v1/completions", {}),
        Arrival(0.0, "review", "/v1/reviews", {}),
    ]
    whole, cut, refused, failed, *reviews = asyncio.run(send_plan(server, plan))
    assert (whole.num_tokens, len(whole.gaps_s), whole.fault) == (2, 1, None)
    assert (cut.fault, refused.fault, failed.fault) == ("ValueError", "status 503", "ValueError")
    assert [(answer.num_tokens, answer.fault) for answer in reviews] == [(1, None)] * 2


def test_the_section_has_a_table_a_level_with_both_modes() -> None:
    figures = {name: spread([1.0, 2.0, 3.0]) for name in bench_modes.FIGURES}
    report = {
        "objectives": {"ttft_s": 0.5, "itl_p99_s": 0.05},
        "mix": WEIGHTS,
        "seconds": 30.0,
        "rounds": 3,
        "engines": {},
        "start_s": {"disaggregated decode": spread([4.0])},
        "levels": [{"arrivals_per_s": rate, **dict.fromkeys(bench_modes.MODES, figures)} for rate in (2.0, 4.0)],
    }
    text = section(report)
    assert text.count("| disaggregated | monolithic |") == 2
    assert text.count("| goodput, sequences/s | 2 (1 - 3) | 2 (1 - 3) |") == 2
    assert "TTFT at most 500 ms" in text
    assert "disaggregated decode 4 (4 - 4)" in text
