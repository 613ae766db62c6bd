"""One JSON object a line: `{"command": ..., "arguments": {...}}` in, `{"result": ...}` or `{"error": ...}` out.

Both ends. Workers import this in the peers' environments: standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

LOG_TAIL_LINES = 12
STOP_TIMEOUT_S = 10.0
READ_BYTES = 1 << 16


class WorkerError(Exception):
    """A worker refused a command, ended, stayed silent, or spoke no JSON; the message tells which."""


class Worker:
    """A contender's process, seen from the bench. One command at a time."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        log_file: Path,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        self.name = name
        self._log_file = log_file
        self._stop_timeout_s = stop_timeout_s
        self._pending = b""
        with log_file.open("wb") as log:
            # A session of its own, so that what the worker started can be ended with it.
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, command: str, *, timeout_s: float, **arguments: Any) -> Any:
        """Send one command and wait for its result.

        Raises:
            WorkerError: The worker answered with an error, ended, or gave no answer within `timeout_s`.
        """
        line = json.dumps({"command": command, "arguments": arguments}) + "\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError as error:
            raise self._error(f"{command}: the worker has ended") from error
        answer = self._answer(command, self._read_line(command, timeout_s))
        if "error" in answer:
            raise WorkerError(f"{self.name}: {command}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Let the worker end by itself, and end it where it does not. Idempotent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # end of input: `serve` returns
        try:
            self._process.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()

    def _read_line(self, command: str, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0 or not select.select([descriptor], [], [], remaining_s)[0]:
                raise self._error(f"{command}: no answer within {timeout_s:g} s")
            received = os.read(descriptor, READ_BYTES)
            if not received:
                raise self._error(f"{command}: the worker has ended")
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _answer(self, command: str, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not answer.keys() & {"result", "error"}:
            raise self._error(f"{command}: no answer but {line[:200]!r}")
        return answer

    def _error(self, message: str) -> WorkerError:
        lines = self._log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(lines[-LOG_TAIL_LINES:]) or "(its log is empty)"
        return WorkerError(f"{self.name}: {message}\n{tail}")


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """The worker's end: answer commands until the input ends.

    Libraries print what they like: their standard output goes to standard error, which is the worker's log.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            answers.write(json.dumps(_handle(handlers, line)) + "\n")
            answers.flush()


def _handle(handlers: Mapping[str, Callable[..., Any]], line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
        handler = handlers[request["command"]]
        return {"result": handler(**request["arguments"])}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
