"""How late the event loop is: what every request waits for when something blocks it."""

import asyncio

from prometheus_client import CollectorRegistry, Histogram

_PERIOD = 0.5
"""Seconds between two samples: each costs some ten microseconds."""

_MOST_MISSED = 600
"""Samples that are made up for after one delay, the worst of them: making up for them takes a
millisecond, and a process that was stopped for a night has better things to do."""

_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class LoopLag:
    """Has the loop call back at a time, and notes how much later it did.

    While the loop is blocked others would have been due, each late by what is left of the delay.
    They count as well, or a loop that is blocked for a third of its time, in one piece, would be
    late once in a hundred times.

    Nothing runs before :meth:`start`, which an application that is never started never calls.
    """

    def __init__(self, registry: CollectorRegistry, period: float = _PERIOD) -> None:
        """``period`` is the time between two samples in seconds."""
        self._period = period
        self._lag = Histogram(
            "viralfx_event_loop_lag_seconds",
            "Time by which the event loop called back later than it was asked to.",
            buckets=_BUCKETS,
            registry=registry,
        )
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, on the running loop; doing it twice is harmless."""
        if self._timer is None:
            self._wait(asyncio.get_running_loop())

    def stop(self) -> None:
        """End; it may begin again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + self._period
        self._timer = loop.call_at(due, self._sample, loop, due)

    def _sample(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        # A clock of the loop may be coarser than that of its timers.
        lag = max(0.0, loop.time() - due)
        for missed in range(min(int(lag / self._period) + 1, _MOST_MISSED)):
            self._lag.observe(lag - missed * self._period)
        self._wait(loop)
