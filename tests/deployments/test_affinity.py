"""A replica's threads stay on its cores, whichever existed before; a core is a place among those that may be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.affinity import can_pin, pin_process, usable_cpus

ROOT = Path(__file__).parents[2]
LAST = len(os.sched_getaffinity(0)) - 1


def in_a_process_of_its_own(program: str) -> object:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout)


def test_threads_from_before_and_after_are_kept_on_the_core() -> None:
    program = f"""
import json, os, threading
from pathlib import Path
from deployments.affinity import pin_process
ends = threading.Event()
def start():
    threading.Thread(target=ends.wait, daemon=True).start()
start()
cores = pin_process([{LAST}])
start()
found = [sorted(os.sched_getaffinity(int(thread.name))) for thread in Path("/proc/self/task").iterdir()]
print(json.dumps([cores, found]))
"""
    core = usable_cpus()[LAST]
    assert in_a_process_of_its_own(program) == [[core], [[core]] * 3]


def test_a_place_counts_among_the_cores_that_the_process_may_use() -> None:
    core = usable_cpus()[LAST]
    program = f"""
import json, os
from deployments.affinity import can_pin, pin_process
os.sched_setaffinity(0, {{{core}}})
print(json.dumps([can_pin([0]), can_pin([1]), pin_process([0])]))
"""
    assert in_a_process_of_its_own(program) == [True, False, [core]]


def test_a_core_that_is_not_there_changes_nothing() -> None:
    before = usable_cpus()
    assert not can_pin([0, len(before)])
    with pytest.raises(ValueError, match=f"core {len(before)} is not among the {len(before)}"):
        pin_process([0, len(before)])
    assert usable_cpus() == before
