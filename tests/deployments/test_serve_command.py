"""`zoneserve serve` as a process: it answers, reviews files for another process, and ends without a trace."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from deployments.config import BUNDLED
from deployments.review_client import SAMPLES
from tests.conformance.greedy import NUM_OUTPUT_TOKENS

pytestmark = [pytest.mark.cluster, pytest.mark.model]

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 30.0
COMMAND = [sys.executable, "-c", "from deployments.cli import main; main()"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """A running `zoneserve serve` in its own folder and process group."""

    def __init__(self, folder: Path) -> None:
        document = yaml.safe_load((BUNDLED / "local.yaml").read_text())
        document["mode"] = "monolithic"
        document["model"] |= {"dtype": "float32", "max_model_len": 4096}
        document["decode"] |= {"num_blocks": 320}
        document["prefill"] |= {"num_blocks": 320}
        document["trust"] |= {"report_cached_tokens": False, "metrics_role": "operator"}
        (folder / "monolithic.yaml").write_text(yaml.safe_dump(document))
        self.folder = folder
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.log = folder / "serve.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", "--config", "monolithic.yaml", "--port", str(port)],
                cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "stop: Ctrl-C" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    @property
    def key(self) -> str:
        return (self.folder / "out" / "local-key").read_text().strip()

    def descendants(self) -> set[int]:
        """Processes that it started, and those that they started."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = stat.read_text()
            except OSError:
                continue
            parents[int(text.split()[0])] = int(text.rpartition(")")[2].split()[1])
        found, size = {self.process.pid}, 0
        while len(found) > size:
            size = len(found)
            found |= {pid for pid, parent in parents.items() if parent in found}
        return found - {self.process.pid}


@pytest.fixture(scope="module")
def served(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(tmp_path_factory.mktemp("served"))
    try:
        running.wait_until_up()
        yield running
    finally:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGINT)
            running.process.wait(END_TIMEOUT_S)


def test_where_nothing_of_reuse_is_told_usage_has_no_cached_tokens_and_metrics_ask_for_a_role(served: Served) -> None:
    headers = {"Authorization": f"Bearer {served.key}"}
    body = {"model": "smollm2-135m-instruct", "prompt": "One visit a day. " * 30, "max_tokens": 2}
    for _ in range(2):
        answer = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=60.0).json()
        assert set(answer["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert httpx.get(f"{served.url}/metrics", timeout=20.0).status_code == 401
    assert "zoneserve_prompt_tokens_total" in httpx.get(f"{served.url}/metrics", headers=headers, timeout=20.0).text


def test_one_pool_gives_the_tokens_of_transformers_too(
    served: Served, greedy_prompts, greedy_oracle, tokenizer
) -> None:
    """The monolithic side of the comparison: the same oracle as for prefill and decode apart."""
    for name in ("p1", "p65", "p300", "p1000"):
        body = {
            "model": "smollm2-135m-instruct",
            "prompt": list(greedy_prompts[name]),
            "max_tokens": NUM_OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        headers = {"Authorization": f"Bearer {served.key}"}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=60.0).json()
        assert answer["choices"][0]["text"] == tokenizer.decode(greedy_oracle[name]), name
    exposed = httpx.get(f"{served.url}/metrics", headers=headers, timeout=20.0).text
    assert re.search(r'origin="decode_computed".* [1-9]', exposed)
    assert not re.search(r'^zoneserve_prompt_tokens_total\{origin="prefill.* [1-9]', exposed, re.MULTILINE)


def test_a_backend_that_gave_way_is_said_once_at_the_terminal(served: Served) -> None:
    """The configuration asks for native; its dtype here is one that only torch computes with."""
    said = [line for line in served.log.read_text().splitlines() if "warning" in line]
    reason = "decode: its KV cache is bfloat16, not float32"
    assert said == [f"warning: torch computes instead of the native backend ({reason})"]


def test_files_are_reviewed_through_a_server_that_is_up(served: Served, tmp_path: Path) -> None:
    (tmp_path / "garbage.edi").write_bytes(bytes(range(256)))
    result = subprocess.run(
        [
            *COMMAND, "review", str(SAMPLES / "10-total.edi"), "garbage.edi",
            "--url", served.url, "--key-file", str(served.folder / "out" / "local-key"),
        ],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr  # one input was refused
    assert "garbage.edi: refused (not_a_claim_file)" in result.stdout
    assert "charge_total_mismatch" in result.stdout
    (review,) = (tmp_path / "out" / "reviews").glob("*.json")
    assert json.loads(review.read_text())["recommended_action"] == "pend"
    assert review.with_suffix(".md").read_text().startswith("# Claim SYNTH-")


def test_an_interrupt_ends_it_and_everything_it_started(served: Served) -> None:
    started = served.descendants()
    assert len(started) > 3  # Ray and the replicas
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(END_TIMEOUT_S) == 0
    assert "Traceback" not in served.log.read_text()
    deadline = time.monotonic() + END_TIMEOUT_S
    while left := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health", timeout=5.0)
