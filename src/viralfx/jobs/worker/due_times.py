"""The times at which a worker polls, since a job becomes due then."""

import heapq
import math

_MAX_DUE_TIMES = 1000
_SAME_MOMENT_SECONDS = 0.1
"""Polls that are no further apart find the same jobs."""


class DueTimes:
    """Monotonic times at which jobs become due, so that a poll is made then; a limited number."""

    def __init__(self) -> None:
        self._times: list[float] = []

    @property
    def first(self) -> float:
        """The first time; infinite without one."""
        return self._times[0] if self._times else math.inf

    def add(self, moment: float) -> bool:
        """Add a time; return False if there are too many already."""
        if len(self._times) >= _MAX_DUE_TIMES:
            return False
        heapq.heappush(self._times, moment)
        return True

    def has(self, moment: float) -> bool:
        """Return True if a poll at one of the times finds a job that is due at ``moment``."""
        return any(0 <= each - moment <= _SAME_MOMENT_SECONDS for each in self._times)

    def drop_until(self, moment: float) -> None:
        """Drop the times that are over at ``moment``."""
        while self.first <= moment:
            heapq.heappop(self._times)
