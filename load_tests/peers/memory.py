"""Memory of a process and its descendants, from /proc."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

PROC = Path("/proc")
_KIB = re.compile(r"^(VmHWM|Pss):\s+(\d+) kB", re.MULTILINE)


def process_tree(pid: int) -> list[int]:
    """`pid` and all that descend from it, as they are now."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def memory_mib(pid: int) -> dict[str, float]:
    """`peak_mib`: the greatest resident size so far, summed over the tree; a page that two share counts twice.
    `pss_mib`: resident now, each shared page divided among those that share it."""
    peak_kib = pss_kib = 0
    for each in process_tree(pid):
        with contextlib.suppress(OSError):
            peak_kib += _read(PROC / str(each) / "status").get("VmHWM", 0)
            pss_kib += _read(PROC / str(each) / "smaps_rollup").get("Pss", 0)
    return {"peak_mib": peak_kib / 1024, "pss_mib": pss_kib / 1024}


def _read(file: Path) -> dict[str, int]:
    return {name: int(value) for name, value in _KIB.findall(file.read_text())}
