"""Each contender's own server, with what a client needs to know of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from load_tests.local import LOCAL_CONFIG, ROOT, free_port, local_server, stop, wait_until_ok
from load_tests.peers.contenders import NOT_HANDED_ON, OFFLINE, Settings, vllm_variables
from load_tests.peers.environments import missing_reason, python_of
from load_tests.peers.http_client import Endpoint
from load_tests.peers.memory import process_tree

START_TIMEOUT_S = 600.0  # vLLM compiles the model the first time
MAX_MODEL_LEN = 8192  # as in configs/local.yaml
KV_TOKENS = 49_152  # as both pools of configs/local.yaml have together, and the one of configs/local-monolithic.yaml
KV_BLOCK = 128
CONFIGS = {"ours": LOCAL_CONFIG, "ours_monolithic": LOCAL_CONFIG.with_name("local-monolithic.yaml")}
LABELS = {
    "ours": "zoneserve, prefill and decode apart",
    "ours_monolithic": "zoneserve, one pool",
    "vllm": "vLLM's server",
    "llama_cpp": "llama-cpp-python's server, one request at a time",
}


class ServerMissing(Exception):
    """A server cannot be run here. The message says why."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers."""

    name: str
    endpoint: Endpoint
    pid: int

    def freeze(self) -> None:
        """Stop every process of it where it stands, so that an idle server takes no time from another's measurement."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in process_tree(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def running_server(name: str, settings: Settings, eos_token_ids: frozenset[int]) -> Iterator[Running]:
    """Start one of `LABELS`, end it on leaving.

    Raises:
        ServerMissing: Its environment is missing.
        ServerError: It did not start.
    """
    directory = settings.out / "http" / name
    directory.mkdir(parents=True, exist_ok=True)
    if name in CONFIGS:
        with local_server(directory, config=_configuration(name, settings, directory)) as server:
            endpoint = Endpoint(
                server.url, _model_of(server.url, server.headers), True, server.headers,
                {"ignore_eos": True, "stream_options": {"include_usage": True}},
            )  # fmt: skip
            yield Running(name, endpoint, server.pid)
        return
    if reason := missing_reason(settings.out, name):
        raise ServerMissing(reason)
    port = free_port()
    command, variables = _peer(name, settings, port)
    with _process(command, variables, directory / "server.log", port) as pid:
        url = f"http://127.0.0.1:{port}"
        yield Running(name, _endpoint(name, url, eos_token_ids), pid)


def _configuration(name: str, settings: Settings, directory: Path) -> Path:
    document = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))
    document["engine"]["backend"] = settings.backend
    path = directory / "base.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def _peer(name: str, settings: Settings, port: int) -> tuple[list[str], Mapping[str, str]]:
    """(command, environment variables)"""
    python = str(python_of(settings.out, name))
    if name == "vllm":
        command = [
            python, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(settings.directory), "--served-model-name", name,
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16",
            "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "32",
            "--num-gpu-blocks-override", str(KV_TOKENS // KV_BLOCK), "--kv-cache-memory-bytes", str(4 << 30),
        ]  # fmt: skip
        return command, vllm_variables(settings)
    command = [
        python, "-m", "llama_cpp.server", "--model", str(settings.gguf), "--model_alias", name,
        "--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(MAX_MODEL_LEN),
        "--n_threads", str(settings.threads), "--n_threads_batch", str(settings.threads),
        "--logits_all", "False", "--interrupt_requests", "False", "--verbose", "False",
    ]  # fmt: skip
    return command, OFFLINE


def _endpoint(name: str, url: str, eos_token_ids: frozenset[int]) -> Endpoint:
    extra: dict[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    if name == "llama_cpp":  # it takes neither ids nor ignore_eos
        extra = {"logit_bias": {str(token): -100.0 for token in sorted(eos_token_ids)}, "top_k": 1}
    return Endpoint(url, name, takes_ids=name != "llama_cpp", extra=extra)


@contextmanager
def _process(command: list[str], variables: Mapping[str, str], log_file: Path, port: int) -> Iterator[int]:
    environment = {name: value for name, value in os.environ.items() if name not in NOT_HANDED_ON}
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_until_ok(f"http://127.0.0.1:{port}/v1/models", process, log_file, START_TIMEOUT_S)
            yield process.pid
        finally:
            stop(process)


def _model_of(url: str, headers: Mapping[str, str]) -> str:
    answer = httpx.get(f"{url}/v1/models", headers=dict(headers), timeout=30.0)
    model: str = answer.raise_for_status().json()["data"][0]["id"]
    return model
