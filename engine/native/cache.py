"""Cache directories that no other user can write, since what lies in them is run, and a lock for each entry."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_INTERVAL_S = 0.05


def private_directory(path: Path) -> None:
    """Make the directory when it is missing.

    Raises:
        PermissionError: Another user owns it, or may write it.
        OSError: It cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by other users")


@contextmanager
def file_lock(path: Path, timeout_s: float) -> Iterator[None]:
    """One process, or thread, at a time holds the lock of `path`; one that ends releases it. The file stays.

    Raises:
        TimeoutError: Another holds it for longer than `timeout_s`.
        OSError: The file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{path} is locked by another process for over {timeout_s:.0f} s")
            time.sleep(POLL_INTERVAL_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
