"""Whether the ledger answers: told once when it is lost and once when it is back."""

import logging
import math
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from viralfx.domain.clock import Clock
from viralfx.domain.jobs.job import LedgerUnavailableError
from viralfx.domain.resilience.backoff import Backoff, Jitter

_logger = logging.getLogger("viralfx.jobs")

T = TypeVar("T")

LONGEST_PAUSE = 2.0
"""Seconds between two tries of one step, at most."""

_BACKOFF = Backoff(base=0.1, factor=2.0, cap=LONGEST_PAUSE, jitter=Jitter.EQUAL)


class LedgerReach:
    """What the steps of one worker know together about the ledger."""

    def __init__(
        self, clock: Clock, *, absence: float = math.inf, rng: random.Random | None = None
    ) -> None:
        """``absence`` is how many seconds without any answer are worth remembering."""
        self._clock = clock
        self._absence = absence
        self._rng = rng or random.Random()  # noqa: S311 - it spreads load only
        self._failing: dict[str, int] = {}
        """How often each step has failed in a row."""
        self._lost_at: float | None = None
        """Since when an outage lasts that was told of."""
        self._answered_at: float | None = None
        self._steady_since = -math.inf

    @property
    def steady_for(self) -> float:
        """Seconds since the end of the last absence, infinite without any; zero while it lasts."""
        now = self._clock.monotonic()
        if self._answered_at is None or now - self._answered_at >= self._absence:
            return 0.0
        return now - self._steady_since

    def failed(self, step: str, error: Exception) -> float:
        """Note that a step failed; return the seconds after which to try it again."""
        times = self._failing.get(step, 0) + 1
        if not isinstance(error, LedgerUnavailableError):
            if times == 1:
                _logger.error("Job ledger refused a step", exc_info=error, extra={"step": step})
        elif self._lost_at is None:
            self._lost_at = self._clock.monotonic()
            reason = str(error)
            _logger.error("Job ledger unavailable", extra={"step": step, "reason": reason})
        self._failing[step] = times
        return _BACKOFF.delay(times, self._rng)

    def succeeded(self, step: str) -> None:
        """Note that a step was done; the ledger is back once every step is."""
        now = self._clock.monotonic()
        if self._answered_at is not None and now - self._answered_at >= self._absence:
            self._steady_since = now
        self._answered_at = now
        self.excuse(step)

    def excuse(self, step: str) -> None:
        """Note that a step is not tried for now, although it might be done."""
        if self._failing.pop(step, 0) and not self._failing and self._lost_at is not None:
            seconds = round(self._clock.monotonic() - self._lost_at, 3)
            self._lost_at = None
            _logger.info("Job ledger available again", extra={"seconds": seconds})

    def forget(self, step: str) -> None:
        """Note that a step is not tried any more."""
        if self._failing.pop(step, 0) and not self._failing:
            # Nobody is left to see the end of it; who meets it next tells of it anew.
            self._lost_at = None

    async def until_done(self, step: str, call: Callable[[], Awaitable[T]]) -> T:
        """Return what ``call`` returns, however often it takes; only outages are tried again."""
        try:
            while True:
                try:
                    result = await call()
                except LedgerUnavailableError as error:
                    await self._clock.sleep(self.failed(step, error))
                else:
                    self.succeeded(step)
                    return result
        finally:
            self.forget(step)
