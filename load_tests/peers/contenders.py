"""Who is compared, and how each worker is started and told to load."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load_tests.local import ROOT
from load_tests.peers.environments import missing_reason, python_of
from load_tests.peers.protocol import Worker

KV_TOKENS = 40_960  # 16 sequences of 2,048 and their answers, with room for vLLM's blocks of 128
MAX_MODEL_LEN = 4096
MAX_BATCHED_TOKENS = 2048  # of a step, ours and vLLM's alike
MAX_SEQS = 32
BLOCK_SIZE = 16

# Workarounds for other programs, which would decide how fast a contender runs.
NOT_HANDED_ON = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_WAIT_POLICY", "LD_PRELOAD")


@dataclass(frozen=True, slots=True)
class Settings:
    """What all contenders share. `gguf`: the served file. `directory`: the same weights for transformers."""

    gguf: Path
    directory: Path
    out: Path
    threads: int
    backend: str
    cpus: tuple[int, ...] = field(default_factory=lambda: tuple(sorted(os.sched_getaffinity(0))))


@dataclass(frozen=True, slots=True)
class Contender:
    """`environment_name`: whose virtual environment it runs in; None for our own."""

    name: str
    label: str
    environment_name: str | None
    module: str
    arguments: Mapping[str, Any]
    variables: Mapping[str, str]

    def missing_reason(self, out: Path) -> str | None:
        return missing_reason(out, self.environment_name) if self.environment_name else None

    def start(self, out: Path) -> Worker:
        """The process, with nothing loaded."""
        python = str(python_of(out, self.environment_name)) if self.environment_name else sys.executable
        environment = {name: value for name, value in os.environ.items() if name not in NOT_HANDED_ON}
        return Worker(
            self.name,
            [python, "-m", f"load_tests.peers.{self.module}"],
            cwd=ROOT,
            environment=environment | dict(self.variables),
            log_file=out / f"{self.name}.log",
        )


def contenders(settings: Settings, kv_tokens: int = KV_TOKENS) -> dict[str, Contender]:
    """By name, ours first."""
    threads = {"OMP_NUM_THREADS": str(settings.threads)}
    gguf, directory = str(settings.gguf), str(settings.directory)
    engine = {
        "kv_tokens": kv_tokens,
        "max_model_len": MAX_MODEL_LEN,
        "max_batched_tokens": MAX_BATCHED_TOKENS,
        "max_seqs": MAX_SEQS,
    }
    llama_cpp = {"path": gguf, "threads": settings.threads}
    requantised = str((settings.out / "llama_cpp" / "q4_0.gguf").absolute())
    listed = (
        Contender(
            "ours",
            "zoneserve",
            None,
            "worker_ours",
            {"path": gguf, "backend": settings.backend, "threads": settings.threads, "block_size": BLOCK_SIZE} | engine,
            threads | {"OMP_WAIT_POLICY": "passive"},  # as a replica runs
        ),
        Contender(
            "vllm", "vLLM-CPU", "vllm", "worker_vllm", {"directory": directory} | engine,
            threads | vllm_variables(settings) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        ),
        Contender("llama_cpp", "llama.cpp, same file", "llama_cpp", "worker_llama_cpp", llama_cpp, threads),
        Contender(
            "llama_cpp_q4_0", "llama.cpp, requantised Q4_0", "llama_cpp", "worker_llama_cpp",
            llama_cpp | {"requantised": requantised}, threads,
        ),
        Contender(
            "transformers", "transformers", "transformers", "worker_transformers",
            {"directory": directory, "threads": settings.threads}, threads | OFFLINE,
        ),
    )  # fmt: skip
    return {contender.name: contender for contender in listed}


OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def vllm_variables(settings: Settings) -> dict[str, str]:
    """As vLLM sets up a worker of its own: torch's OpenMP first, a thread pinned to each core."""
    cores = settings.cpus[: settings.threads]
    variables = OFFLINE | {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str((settings.out / "vllm" / "cache").absolute()),
        "TORCHINDUCTOR_CACHE_DIR": str((settings.out / "vllm" / "inductor").absolute()),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cores)),
    }
    packages = python_of(settings.out, "vllm").parents[1] / "lib"
    library = next(iter(sorted(packages.glob("python*/site-packages/torch/lib/libgomp*.so*"))), None)
    return variables | ({"LD_PRELOAD": str(library)} if library else {})
