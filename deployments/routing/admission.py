"""Whether the ingress takes one more request. Pure: the clock comes in through the constructor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

DRAIN_WINDOW = 64
DEFAULT_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0


class Admission:
    """Bounds the requests in flight; a refusal says when to come back, from the measured drain rate."""

    def __init__(self, max_inflight: int, clock: Callable[[], float]) -> None:
        self._max_inflight = max_inflight
        self._clock = clock
        self._finished_at: deque[float] = deque(maxlen=DRAIN_WINDOW)
        self.num_inflight = 0

    def admit(self, num_places: int = 1) -> bool:
        """Take places; False when so many are not free, and then nothing has changed."""
        if self.num_inflight + num_places > self._max_inflight:
            return False
        self.num_inflight += num_places
        return True

    def finish(self, num_places: int = 1) -> None:
        """Give places back."""
        assert self.num_inflight >= num_places, "finish without admit"
        self.num_inflight -= num_places
        self._finished_at.extend([self._clock()] * num_places)

    def retry_after_s(self) -> float:
        """Seconds until a place is likely free: the mean gap between recent ends."""
        if len(self._finished_at) < 2:
            return DEFAULT_RETRY_AFTER_S
        gap = (self._clock() - self._finished_at[0]) / len(self._finished_at)
        return min(max(gap, DEFAULT_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
