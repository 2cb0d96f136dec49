"""Counts over the last so many seconds, forgotten slice by slice."""


class RollingCounts:
    """Integer counters of several kinds over a window of monotonic time.

    The window is divided into slices; the oldest is forgotten when a new one begins, so that the
    window is exact to one slice. Adding and reading cost the same however many were counted.
    """

    __slots__ = ("_newest", "_slices", "_width", "totals")

    def __init__(self, window: float, kinds: int, slices: int = 10) -> None:
        self.totals = [0] * kinds
        """What was counted in the window, as of the last :meth:`forget`."""
        self._slices = [[0] * kinds for _ in range(slices)]
        self._width = window / slices
        self._newest = 0

    def add(self, kind: int) -> None:
        """Count one of a kind at the time of the last :meth:`forget`."""
        self._slices[self._newest % len(self._slices)][kind] += 1
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
