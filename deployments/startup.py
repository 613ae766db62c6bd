"""How long a replica took to become ready, counted from the start of its process, and where the time went."""

from __future__ import annotations

import os
import time
from pathlib import Path

_START_FIELD = 19  # starttime, counted from the field after the command's name


def process_age_s() -> float:
    """Seconds since the kernel started this process, to its clock tick of 10 ms."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started_s = int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


class StartupClock:
    """Splits a process's start into named phases. The first, `process`, ends when the clock is made: interpreter,
    Ray's worker, imports."""

    def __init__(self) -> None:
        self.seconds_by_phase = {"process": process_age_s()}

    def lap(self, phase: str) -> None:
        """The phase that ends now."""
        self.seconds_by_phase[phase] = process_age_s() - sum(self.seconds_by_phase.values())

    @property
    def total_s(self) -> float:
        return sum(self.seconds_by_phase.values())

    def __str__(self) -> str:
        return ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.seconds_by_phase.items())
