"""The writer as its callers meet it: threads, batches, a full disk, a full queue, and a death at any moment."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from deployments.errors import AuditUnavailable
from deployments.trust.audit import AuditEvent, AuditOptions, AuditWriter, benchmark
from deployments.trust.audit.chain import Fault
from deployments.trust.audit.files import AuditDirectory, AuditError
from tests.deployments.trust.audit_support import MASTER_KEY, check, documents, files, hit, open_log, request_ids

ROOT = Path(__file__).parents[3]


def open_writer(path: Path, **options: object) -> AuditWriter:
    return AuditWriter(path, "decode-1", MASTER_KEY, AuditOptions(**options))  # type: ignore[arg-type]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.deployments.trust.audit_process", *arguments], cwd=ROOT, stdout=subprocess.PIPE
    )


def test_events_of_many_threads_are_all_written_each_threads_in_order(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "log", rotate_bytes=50_000, fsync_ms=1, anchor_records=100)

    def append(thread: int) -> None:
        for number in range(300):
            writer.append(hit(thread * 1000 + number))

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert check(tmp_path / "log").is_intact
    ids = request_ids(tmp_path / "log")
    for thread in range(4):
        assert [i for i in ids if int(i[2:]) // 1000 == thread] == [f"r-{thread * 1000 + n}" for n in range(300)]
    counts = writer.counts()
    assert counts.appended == len(documents(tmp_path / "log"))
    assert counts.rotations == len(files(tmp_path / "log")) - 1 > 0
    assert (counts.lost, counts.refused, counts.failures) == (0, 0, 0)


def test_a_durable_record_is_in_the_file_when_the_call_returns(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "log")

    async def run() -> None:
        for number in range(5):
            await writer.append_durable(hit(number))
            assert request_ids(tmp_path / "log") == [f"r-{n}" for n in range(number + 1)]

    asyncio.run(run())
    writer.close()


def test_records_that_come_together_share_an_fsync(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "log", fsync_records=64, fsync_ms=200)
    before = writer.counts().fsyncs

    async def run() -> None:
        await asyncio.gather(*(writer.append_durable(hit(number)) for number in range(64)))

    asyncio.run(run())
    assert writer.counts().fsyncs - before <= 2  # the thread may wake between two of them
    writer.close()


def test_a_closed_log_ends_with_an_anchor_that_its_file_repeats(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "log")
    writer.append(hit(0))
    writer.close()
    writer.close()
    records = documents(tmp_path / "log")
    assert [r["event"] for r in records] == ["audit.open", "cache.hit", "audit.anchor"]
    files(tmp_path / "log")[0].write_text("")
    assert Fault.TAIL_CUT in check(tmp_path / "log").counts


def test_an_anchor_is_written_while_nothing_happens(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "log", anchor_s=1)
    writer.append(hit(0))
    deadline = time.monotonic() + 30
    while writer.counts().anchors == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert writer.counts().anchors == 1
    writer.close()


@pytest.mark.parametrize("on_failure", ["refuse", "continue"])
def test_after_the_end_nothing_is_taken(on_failure: str, tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "log", on_failure=on_failure)
    writer.close()
    assert writer.failure == "closed"
    calls = [writer.require_writable, lambda: writer.append(hit(1)), lambda: asyncio.run(writer.append_durable(hit(2)))]
    for call in calls:
        if on_failure == "continue":
            call()
        else:
            with pytest.raises(AuditUnavailable) as refusal:
                call()
            assert refusal.value.status == 503
    assert writer.counts().lost == 2
    assert writer.counts().refused == (0 if on_failure == "continue" else 3)
    assert request_ids(tmp_path / "log") == []


def test_a_thread_that_dies_of_a_fault_of_its_own_refuses_all_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = open_writer(tmp_path / "log", durable_timeout_s=0.5)

    def broken(*_: object, **__: object) -> None:
        raise ValueError("a fault in the log")

    monkeypatch.setattr(writer._log, "add", broken)
    with pytest.raises(AuditUnavailable):
        asyncio.run(writer.append_durable(hit(0)))
    assert writer.failure == "stopped"
    with pytest.raises(AuditUnavailable):
        writer.require_writable()
    with pytest.raises(AuditUnavailable):
        writer.append(hit(1))
    assert "has stopped" in caplog.text


def test_a_log_that_cannot_be_opened_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file")
    with pytest.raises(AuditError, match="log"):
        open_writer(tmp_path / "log")


def test_a_directory_that_is_gone_refuses_work(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "log", rotate_bytes=1, probe_s=0.01, fsync_ms=1)
    for file in (tmp_path / "log").iterdir():
        file.unlink()
    (tmp_path / "log").rmdir()
    writer.append(hit(0))
    deadline = time.monotonic() + 20
    while writer.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert writer.failure == "write_error"  # the file that is open still takes records, but the next cannot be made
    with pytest.raises(AuditUnavailable):
        writer.require_writable()
    writer.close()
    assert writer.failure == "closed"


@pytest.mark.parametrize("on_failure", ["refuse", "continue"])
def test_a_full_disk_and_then_a_full_queue_and_then_room_again(on_failure: str, tmp_path: Path) -> None:
    process = start("full", str(tmp_path / "log"), on_failure)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    seen = json.loads(output)
    may_go_on = on_failure == "continue"
    assert seen["before"] == [True, True, True]
    assert seen["durable"] == [may_go_on, may_go_on]
    assert seen["failure"] == "disk_full"
    assert seen["require_writable"] is may_go_on
    num_lost = seen["counts_while_full"]["lost"]
    assert 10 <= num_lost < 50  # the queue has 40 places, the writer may hold a batch
    assert seen["appends"].count(False) == (0 if may_go_on else num_lost)
    assert seen["counts_while_full"]["refused"] == (0 if may_go_on else 3 + num_lost)
    assert seen["after"] == [True, True]
    assert seen["failures"] > 0
    assert seen["lost"] == num_lost
    assert check(tmp_path / "log").is_intact
    assert request_ids(tmp_path / "log", "full") == seen["taken"]  # each once, in order, and those refused not at all
    gaps = [d["fields"] for d in documents(tmp_path / "log", "full") if d["event"] == "audit.open"][1:]
    assert gaps == [{"reason": "gap", "num_lost": num_lost}]
    assert seen["appended"] == len(documents(tmp_path / "log", "full"))


@pytest.mark.parametrize("seed", range(6))
def test_no_durable_record_is_lost_to_a_kill_at_any_moment(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    process = start("write", str(tmp_path / "log"))
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(chance.randint(1, 300))]
    time.sleep(chance.uniform(0, 0.01))
    process.kill()
    rest, _ = process.communicate(timeout=60)
    durable = [line.strip() for line in (b"".join(told) + rest).splitlines(keepends=True) if line.endswith(b"\n")]
    assert len(durable) >= len(told)
    result = check(tmp_path / "log")
    assert set(result.counts) <= {Fault.TORN}
    kept = request_ids(tmp_path / "log", "killed")
    assert {f"r-{number.decode()}" for number in durable} <= set(kept)
    assert len(set(kept)) == len(kept)
    open_log(tmp_path / "log", "killed").close()
    assert check(tmp_path / "log").is_intact
    assert request_ids(tmp_path / "log", "killed") == kept


def test_a_log_is_intact_while_it_is_written(tmp_path: Path) -> None:
    process = start("write", str(tmp_path / "log"))
    assert process.stdout is not None
    try:
        for _ in range(10):
            process.stdout.readline()
            result = check(tmp_path / "log")
            assert set(result.counts) <= {Fault.TORN}  # half of a write may be seen
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert result.num_records > 0


def test_the_benchmark_counts_what_it_did(tmp_path: Path) -> None:
    fast = benchmark.measure(tmp_path / "fast", 1000)
    each = benchmark.measure(tmp_path / "each", 100, fsync_records=1)
    durable = benchmark.measure_durable(tmp_path / "durable", 160)
    assert fast["records"] >= 1000
    assert fast["fsyncs"] < 50
    assert each["fsyncs"] >= 100
    assert durable["records"] >= 160
    assert durable["fsyncs"] < 100
    for name in ("fast", "each", "durable"):
        with closing(AuditDirectory(tmp_path / name)) as directory:
            assert directory.streams() == ["benchmark"]


def test_an_event_that_is_not_listed_never_reaches_the_writer() -> None:
    with pytest.raises(ValueError, match="no such kind"):
        AuditEvent("cache.read", zone="public")
