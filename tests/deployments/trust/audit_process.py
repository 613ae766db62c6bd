"""A process that writes an audit log: killed at any moment (`write`), or met by a full disk (`full`)."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from deployments.errors import AuditUnavailable
from deployments.trust.audit import AuditOptions, AuditWriter
from tests.deployments.trust.audit_support import MASTER_KEY, hit

NUM_CALLERS = 4
MAX_QUEUE = 40


def write(path: Path) -> None:
    """Says each record's number once it is durable; every other record is not waited for."""
    writer = AuditWriter(path, "killed", MASTER_KEY, AuditOptions(rotate_bytes=20_000, anchor_records=20, fsync_ms=1))
    numbers = count()

    async def caller() -> None:
        for number in numbers:
            writer.append(hit(1_000_000 + number))
            await writer.append_durable(hit(number))
            os.write(1, f"{number}\n".encode())

    async def callers() -> None:
        await asyncio.gather(*(caller() for _ in range(NUM_CALLERS)))

    asyncio.run(callers())


def full(path: Path, on_failure: str) -> None:
    """Prints what callers met before, while, and after the log could not grow."""
    options = AuditOptions(on_failure=on_failure, max_queue=MAX_QUEUE, fsync_records=4, fsync_ms=1, probe_s=0.02)  # type: ignore[arg-type]
    writer = AuditWriter(path, "full", MASTER_KEY, options)
    seen: dict[str, object] = {}
    taken: list[str] = []
    numbers = count()

    def met(call: Callable[[], object]) -> bool:
        try:
            call()
        except AuditUnavailable:
            return False
        return True

    def append() -> bool:
        number = next(numbers)
        lost = writer.counts().lost
        is_met = met(lambda: writer.append(hit(number)))
        if writer.counts().lost == lost:
            taken.append(f"r-{number}")
        return is_met

    def append_durable() -> bool:
        number = next(numbers)
        taken.append(f"r-{number}")
        return met(lambda: asyncio.run(writer.append_durable(hit(number))))

    seen["before"] = [append_durable(), append_durable(), met(writer.require_writable)]
    size = next(path.glob("full.*.jsonl")).stat().st_size
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))  # in the middle of a record
    seen["durable"] = [append_durable(), append_durable()]
    seen["failure"] = writer.failure
    seen["require_writable"] = met(writer.require_writable)
    seen["appends"] = [append() for _ in range(MAX_QUEUE + 10)]
    seen["counts_while_full"] = {name: getattr(writer.counts(), name) for name in ("lost", "refused")}
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    deadline = time.monotonic() + 20
    while writer.failure is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    seen["after"] = [append_durable(), met(writer.require_writable)]
    writer.close()
    counts = writer.counts()
    seen |= {"taken": taken, "failures": counts.failures, "lost": counts.lost, "appended": counts.appended}
    print(json.dumps(seen))


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        full(Path(sys.argv[2]), sys.argv[3])
