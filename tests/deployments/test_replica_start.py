"""What a replica is when it has started: its parts, what it brought into memory, what it says of itself."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from deployments import replica as module
from deployments.metrics import exposition
from deployments.replica import EngineReplica, short_reason
from deployments.startup import StartupClock, process_age_s
from tests.deployments.support import lines_of, local_config, write_yaml
from tests.sim.cluster import running_cluster

ROOT = Path(__file__).parents[2]
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# Each takes as long to import as the engine does to start, or longer, and no replica needs it.
UNNEEDED = ("transformers", "accelerate", "scipy", "pandas", "locust", "x12sdk", "torch._inductor", "rich", "typer")


def run_python(program: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(exposition(registry)):
        for sample in family.samples:
            if sample.name == f"zoneserve_{name}" and sample.labels == labels:
                return float(sample.value)
    return None


def test_a_processs_age_is_counted_from_its_start() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    program = """
import json, time
from deployments.startup import process_age_s
print(json.dumps([time.clock_gettime(time.CLOCK_BOOTTIME), process_age_s()]))
"""
    now, age_s = run_python(program)
    assert before - TICK_S <= now - age_s <= now


def test_phases_add_up_to_the_whole() -> None:
    clock = StartupClock()
    before = clock.total_s
    clock.lap("one")
    clock.lap("two")
    assert list(clock.seconds_by_phase) == ["process", "one", "two"]
    assert before <= clock.total_s <= process_age_s()
    assert clock.total_s == pytest.approx(sum(clock.seconds_by_phase.values()))


def with_replica(check: Any) -> None:
    async def job() -> None:
        async with running_cluster(has_threads=True) as cluster:
            await check(cluster.decode)

    asyncio.run(job())


def test_a_replica_is_ready_once_at_its_first_good_health_check() -> None:
    async def check(replica: EngineReplica) -> None:
        replica._startup = StartupClock()
        assert value(replica.metrics.registry, "replica_start_seconds") == 0
        await replica.check_health()
        first = value(replica.metrics.registry, "replica_start_seconds")
        await replica.check_health()
        assert first
        assert value(replica.metrics.registry, "replica_start_seconds") == first

    with lines_of("ray.serve.zoneserve.replica") as lines:
        with_replica(check)
    (line,) = lines
    assert line.startswith("decode ready ")
    assert "toy (process " in line


def test_a_replica_names_its_arithmetic_and_counts_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_replica_name", lambda: "r")

    async def check(replica: EngineReplica) -> None:
        state = await replica.health()
        assert (state["arithmetic"], state["backend_fallback"]) == ("toy", None)
        assert value(replica.metrics.registry, "engine_info", arithmetic="toy") == 1
        assert "backend_fallbacks_total{" not in exposition(replica.metrics.registry)
        assert value(replica.metrics.registry, "pinned_cpus") == 0

    with_replica(check)


@pytest.mark.parametrize(
    ("reason", "short"),
    [
        ("no g++ on the PATH to compile its kernels", "no g++ on the PATH to compile its kernels"),
        ("its kernels do not compile: /home/x/engine.cpp:1: error", "its kernels do not compile"),
        ("g++ does not run ([Errno 13] /usr/bin/g++)", "g++ does not run"),
    ],
)
def test_what_a_compiler_said_stays_in_the_log(reason: str, short: str) -> None:
    assert short_reason(reason) == short


BUILD = """
import json, os, sys
from pathlib import Path
from deployments.config import load_config
from deployments import decode, prefill
from deployments.replica import build_parts, compatibility
config = load_config(Path(sys.argv[1]))
parts = build_parts("decode", config, config.decode, sys.argv[2])
mapped = Path("/proc/self/maps").read_text().splitlines()
print(json.dumps({
    "modules": sorted(name for name in sys.modules if name in sys.argv[3:]),
    "packed": sorted({line.split()[1] + " " + line.split()[-1] for line in mapped if line.endswith(".packed")}),
    "cores": sorted({tuple(os.sched_getaffinity(int(t.name))) for t in Path("/proc/self/task").iterdir()}),
    "said_cores": parts.cores,
    "arithmetic": [parts.runner.arithmetic, compatibility(config, parts.runner, parts.tokenizer)["arithmetic"]],
    "fallback": parts.runner.fallback_reason,
    "phases": list(parts.startup.seconds_by_phase),
}))
sys.stdout.flush()
os._exit(0)
"""


def build(config_path: Path, model: Path, cache: Path) -> dict[str, Any]:
    program = f"import sys; sys.argv[1:] = [{str(config_path)!r}, {str(model)!r}, *{UNNEEDED!r}]\n{BUILD}"
    result: dict[str, Any] = run_python(program, ZONESERVE_CACHE=str(cache))
    return result


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def config_file(folder: Path, **sections: Any) -> Path:
    (folder / "master.key").write_text("ab" * 32)
    config = local_config(trust={"master_key_file": str(folder / "master.key")}, **sections)
    return write_yaml(folder / "config.yaml", config.model_dump(mode="json"))


@pytest.mark.model
def test_replicas_map_one_packed_file_and_bring_nothing_that_they_do_not_need(
    smollm2_path: Path, tmp_path: Path, cache: Path
) -> None:
    path = config_file(tmp_path, decode={"cpus": [0]})
    first = build(path, smollm2_path, cache)
    assert first["fallback"] is None
    assert first["modules"] == []
    assert first["arithmetic"][0].startswith("native-")
    assert first["arithmetic"][0] == first["arithmetic"][1]
    core = min(os.sched_getaffinity(0))
    assert (first["said_cores"], first["cores"]) == ([core], [[core]])
    assert first["phases"] == ["process", "tokenizer", "model", "digests", "shared texts", "transfer"]
    (packed,) = cache.glob("packed/*.packed")
    assert len(first["packed"]) == 1
    assert first["packed"][0].endswith(str(packed))

    kept = {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.suffix in (".packed", ".so")}
    assert build(path, smollm2_path, cache)["packed"] == first["packed"]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept  # nothing was packed or compiled again
    assert len([file for file in cache.rglob("*") if file.suffix in (".packed", ".so")]) == len(kept) == 2


@pytest.mark.model
def test_a_replica_on_a_machine_with_fewer_cores_starts_and_is_not_pinned(
    smollm2_path: Path, tmp_path: Path, cache: Path
) -> None:
    there = len(os.sched_getaffinity(0))
    built = build(config_file(tmp_path, decode={"cpus": [there]}), smollm2_path, cache)
    assert built["said_cores"] == []
    assert built["cores"] == [sorted(os.sched_getaffinity(0))]
