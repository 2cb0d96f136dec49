"""A retry budget: however many callers fail, retries stay a bounded share of the calls."""

import threading

from viralfx.domain.resilience.quantities import require_not_negative
from viralfx.domain.resilience.rolling import RollingCounts

_CALL, _RETRY = 0, 1


class RetryBudget:
    """Allows ``ratio`` retries per call plus ``per_second``, over the last ``window`` seconds.

    Share one between everything that calls the same dependency: without it, three attempts each
    turn an outage into three times the load. Times are monotonic and passed in.

    Raises ``ValueError`` for a negative or non-finite number or a window that is not positive.
    """

    def __init__(
        self, *, ratio: float = 0.2, per_second: float = 10.0, window: float = 10.0
    ) -> None:
        require_not_negative("ratio", ratio)
        require_not_negative("per_second", per_second)
        self._ratio = ratio
        self._reserve = per_second * window
        self._counts = RollingCounts(window, kinds=2)
        self._lock = threading.Lock()

    def deposit(self, now: float) -> None:
        """Record one call; not its retries."""
        with self._lock:
            self._counts.add(now, _CALL)

    def withdraw(self, now: float) -> bool:
        """Pay for one retry; tell whether it is allowed."""
        with self._lock:
            if self._available(now) < 1:
                return False
            self._counts.add(now, _RETRY)
            return True

    def available(self, now: float) -> float:
        """Return how many retries are allowed now."""
        with self._lock:
            return self._available(now)

    def _available(self, now: float) -> float:
        self._counts.forget(now)
        calls, retries = self._counts.totals
        return max(0.0, self._ratio * calls + self._reserve - retries)
