"""An event loop whose clock jumps: waits cost nothing, runs repeat exactly, and a wait without a limit is an error."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")
_TICK_S = 1e-9  # past the moment waited for, whatever the rounding


class Hang(AssertionError):
    """Tasks wait, and nothing is scheduled that could ever wake one."""


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Moves the clock to the next timer instead of sleeping until it."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if timeout is None:
            raise Hang("no timer is set and no callback is ready")
        self.now_s += timeout + _TICK_S
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`num_turns` counts passes over the ready callbacks: between two of them, anything else may happen first."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        self._interruptions: dict[int, Callable[[], object]] = {}
        self.num_turns = 0
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def interrupt(self, num_turns: int, action: Callable[[], object]) -> None:
        """Run `action` before the turn that comes after `num_turns` more."""
        self._interruptions[self.num_turns + num_turns] = action

    def _run_once(self) -> None:
        self._interruptions.pop(self.num_turns, lambda: None)()
        self.num_turns += 1
        super()._run_once()  # type: ignore[misc]


def virtual_loop() -> VirtualTimeLoop:
    """The running one."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop


def run_in_virtual_time(job: Coroutine[Any, Any, _T]) -> _T:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(job)
