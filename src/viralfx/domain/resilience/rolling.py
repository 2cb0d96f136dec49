"""Counts over the last so many seconds, forgotten slice by slice."""

from viralfx.domain.resilience.quantities import require_positive


class RollingCounts:
    """Integer counters of several kinds over a window of monotonic time.

    The window is divided into slices; the oldest is forgotten when a new one begins, so that the
    window is exact to one slice. Call :meth:`forget` from ``stale_at`` on, then add to ``current``
    and to ``totals`` alike: two additions, whatever was counted before.
    """

    __slots__ = ("_newest", "_slices", "_width", "current", "stale_at", "totals")

    def __init__(self, window: float, kinds: int, slices: int = 10) -> None:
        require_positive("window", window)
        self._slices = [[0] * kinds for _ in range(slices)]
        self._width = window / slices
        self._newest = 0
        self.stale_at = 0.0
        """Monotonic time at which the current slice ends."""
        self.totals = [0] * kinds
        """What was counted in the window."""
        self.current = self._slices[0]
        """The share of ``totals`` that the current slice has."""

    def add(self, now: float, kind: int) -> None:
        """Count one of a kind."""
        if now >= self.stale_at:
            self.forget(now)
        self.current[kind] += 1
        self.totals[kind] += 1

    def forget(self, now: float) -> None:
        """Move the window up to ``now``; it never moves back."""
        slice_now = int(now // self._width)
        begun = min(slice_now - self._newest, len(self._slices))
        if begun <= 0:
            return
        for number in range(slice_now - begun + 1, slice_now + 1):
            expired = self._slices[number % len(self._slices)]
            for kind, count in enumerate(expired):
                self.totals[kind] -= count
                expired[kind] = 0
        self._newest = slice_now
        self.current = self._slices[slice_now % len(self._slices)]
        self.stale_at = (slice_now + 1) * self._width
