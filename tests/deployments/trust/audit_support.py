"""What the audit tests share: a clock, events, a log written as asked, and its verification."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from deployments.trust.audit import AuditEvent, AuditOptions
from deployments.trust.audit.chain import Head, chain_key
from deployments.trust.audit.files import AuditDirectory
from deployments.trust.audit.log import AuditLog
from deployments.trust.audit.verify import Verification, verify

MASTER_KEY = bytes(range(32))
KEY = chain_key(MASTER_KEY)
OPTIONS = AuditOptions(rotate_bytes=2500, anchor_records=5)


class Clock:
    """Unix time in ms, moved by hand."""

    def __init__(self, now_ms: int = 1_800_000_000_000) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


def hit(number: int, zone: str = "tenant/acme/case/c1") -> AuditEvent:
    return AuditEvent("cache.hit", request_id=f"r-{number}", zone=zone, num_blocks=number)


def open_log(path: Path, stream: str = "decode-1", clock: Clock | None = None, **options: object) -> AuditLog:
    return AuditLog(path, stream, KEY, replace(OPTIONS, **options), clock or Clock())  # type: ignore[arg-type]


def write_log(path: Path, num_events: int = 30, stream: str = "decode-1", clock: Clock | None = None) -> Head:
    """A log of several files, closed as a writer closes it; its head."""
    clock = clock or Clock()
    log = open_log(path, stream, clock)
    for number in range(num_events):
        clock.now_ms += 10
        log.add([(hit(number), clock.now_ms)])
        log.commit()
    log.add((), anchor=True)
    log.commit()
    log.close()
    return log.committed


def check(path: Path, key: bytes = KEY, anchors: tuple[Head, ...] = ()) -> Verification:
    with closing(AuditDirectory(path)) as directory:
        return verify(directory, [key], anchors)


def files(path: Path, stream: str = "decode-1") -> list[Path]:
    return sorted(path.glob(f"{stream}.*.jsonl"))


def documents(path: Path, stream: str = "decode-1") -> list[dict[str, object]]:
    """A stream's whole lines, parsed by a plain JSON reader."""
    text = "".join(file.read_text() for file in files(path, stream))
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def request_ids(path: Path, stream: str = "decode-1") -> list[str]:
    return [d["fields"]["request_id"] for d in documents(path, stream) if d["event"] == "cache.hit"]  # type: ignore[index]
