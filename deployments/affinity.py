"""Pins a replica to cores. A core is named by its place among those that the process may use, so that one
configuration means the same on a bare machine and inside a container's set of cores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

_THREADS = Path("/proc/self/task")


def usable_cpus() -> tuple[int, ...]:
    """The kernel's numbers of the cores that this process may use, ascending."""
    return tuple(sorted(os.sched_getaffinity(0)))


def can_pin(places: Sequence[int]) -> bool:
    """True where this process may use a core at each of the places."""
    return max(places, default=-1) < len(usable_cpus())


def pin_process(places: Sequence[int]) -> tuple[int, ...]:
    """Keep every thread of this process, and each that they will start, on the cores at `places`.

    Threads that Ray started before are moved too: what they do for this replica would otherwise
    preempt the other replica's engine on its own core.

    Returns:
        The kernel's numbers of the cores.

    Raises:
        ValueError: The process may use no core at some place; nothing has changed then.
    """
    usable = usable_cpus()
    if not can_pin(places):
        raise ValueError(f"core {max(places)} is not among the {len(usable)} that this process may use")
    cores = tuple(usable[place] for place in places)
    moved: set[int] = set()
    while found := {int(thread.name) for thread in _THREADS.iterdir()} - moved:  # one that is moved starts no strays
        for thread_id in found:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.sched_setaffinity(thread_id, cores)
        moved |= found
    return cores
