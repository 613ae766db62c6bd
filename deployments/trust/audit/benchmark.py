"""What auditing costs: `python -m deployments.trust.audit.benchmark [RECORDS]`. A table, then one line of JSON."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deployments.trust.audit.log import AuditOptions
from deployments.trust.audit.record import AuditEvent
from deployments.trust.audit.writer import AuditWriter

RECORDS_PER_S = 2000  # offered in the paced run: above what a busy replica audits
DURABLE_CALLERS = 16


def measure(directory: Path, num_records: int, *, fsync_records: int = 256, paced: bool = False) -> dict[str, float]:
    """Appends `num_records` records and closes.

    `cpu_us_per_record` is of the whole process, callers and writer together: what serving loses; `append_us` is how
    long a caller is held up. `paced`: offered at `RECORDS_PER_S`, as serving does, else as fast as they are taken.
    """
    options = AuditOptions(max_queue=num_records + 1, fsync_records=fsync_records)
    writer = AuditWriter(directory, "benchmark", b"k" * 32, options)
    called_s, cpu_before, began = 0.0, time.process_time(), time.perf_counter()
    for number in range(num_records):
        if paced and number % 20 == 0:
            time.sleep(max(0.0, began + number / RECORDS_PER_S - time.perf_counter()))
        before = time.perf_counter()
        writer.append(_event(number))
        called_s += time.perf_counter() - before
    writer.close()
    elapsed_s = time.perf_counter() - began
    counts = writer.counts()
    return {
        "records": counts.appended,
        "records_per_s": counts.appended / elapsed_s,
        "fsyncs": counts.fsyncs,
        "append_us": called_s / num_records * 1e6,
        "cpu_us_per_record": (time.process_time() - cpu_before) / num_records * 1e6,
    }


def measure_durable(directory: Path, num_records: int) -> dict[str, float]:
    """`DURABLE_CALLERS` coroutines that each wait for every record of theirs to be on the medium."""

    async def caller(writer: AuditWriter) -> None:
        for number in range(num_records // DURABLE_CALLERS):
            await writer.append_durable(_event(number))

    async def callers(writer: AuditWriter) -> None:
        await asyncio.gather(*(caller(writer) for _ in range(DURABLE_CALLERS)))

    writer = AuditWriter(directory, "benchmark", b"k" * 32)
    began = time.perf_counter()
    asyncio.run(callers(writer))
    elapsed_s = time.perf_counter() - began
    writer.close()
    counts = writer.counts()
    return {"records": counts.appended, "records_per_s": counts.appended / elapsed_s, "fsyncs": counts.fsyncs}


def _event(number: int) -> AuditEvent:
    return AuditEvent(
        "cache.hit", request_id=f"gen-{number:032x}", zone="tenant/acme/case/claim-1", num_blocks=4, num_tokens=64
    )


def main() -> None:
    num_records = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        results["as fast as taken"] = measure(root / "fast", num_records)
        results[f"paced, {RECORDS_PER_S}/s"] = measure(root / "paced", num_records // 4, paced=True)
        results["one fsync a record"] = measure(root / "each", num_records // 10, fsync_records=1)
        results[f"durable, {DURABLE_CALLERS} callers"] = measure_durable(root / "durable", num_records // 20)
    columns = list(next(iter(results.values())))
    table = Table("run", *columns)
    for name, result in results.items():
        table.add_row(name, *(f"{result[column]:,.1f}" if column in result else "" for column in columns))
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
