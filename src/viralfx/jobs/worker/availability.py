"""The availability of the ledger, and steps that are tried until it answers."""

import logging
import math
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from viralfx.core.clock import Clock, default_rng
from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.ledger import PartlyDoneError
from viralfx.resilience.policy import Backoff, Jitter

_logger = logging.getLogger("viralfx.jobs")
T = TypeVar("T")
MAX_RETRY_SECONDS = 2.0
"""The longest pause before a failed step is tried again."""
RETRY_BACKOFF = Backoff(base=0.1, factor=2.0, cap=MAX_RETRY_SECONDS, jitter=Jitter.EQUAL)
"""The pauses after consecutive failures of a step."""


class LedgerAvailability:
    """The availability of the ledger, as all steps of one worker see it."""

    def __init__(
        self, clock: Clock, *, min_outage: float = math.inf, rng: random.Random | None = None
    ) -> None:
        """``min_outage``: shorter outages, in seconds, do not reset :attr:`steady_for`."""
        self._clock = clock
        self._min_outage = min_outage
        self._rng = rng or default_rng()
        self._failing: dict[str, int] = {}
        """Consecutive failures of each step."""
        self._lost_at: float | None = None
        """Start of the outage that was logged last, while it lasts."""
        self._answered_at: float | None = None
        self._steady_since = -math.inf

    @property
    def steady_for(self) -> float:
        """Seconds since the last outage ended; infinite without one, zero during one."""
        now = self._clock.monotonic()
        if self._answered_at is None or now - self._answered_at >= self._min_outage:
            return 0.0
        return now - self._steady_since

    def answered_since(self, moment: float) -> bool:
        """Return True if any step has succeeded since a monotonic time."""
        return self._answered_at is not None and self._answered_at > moment

    def failed(self, step: str, error: Exception) -> float:
        """Record a failed step; return the seconds after which to try it again."""
        times = self._failing.get(step, 0) + 1
        if not isinstance(error, LedgerUnavailableError):
            if times == 1:
                _logger.error("Job ledger refused a step", exc_info=error, extra={"step": step})
        elif self._lost_at is None:
            self._lost_at = self._clock.monotonic()
            reason = str(error)
            _logger.error("Job ledger unavailable", extra={"step": step, "reason": reason})
        self._failing[step] = times
        return RETRY_BACKOFF.delay(times, self._rng)

    def succeeded(self, step: str) -> None:
        """Record a successful step; the outage ends when no step fails any more."""
        now = self._clock.monotonic()
        if self._answered_at is not None and now - self._answered_at >= self._min_outage:
            self._steady_since = now
        self._answered_at = now
        self.skip(step)

    def skip(self, step: str) -> None:
        """Record that a step is not tried for now, so that it does not count as failing."""
        if self._failing.pop(step, 0) and not self._failing and self._lost_at is not None:
            seconds = round(self._clock.monotonic() - self._lost_at, 3)
            self._lost_at = None
            _logger.info("Job ledger available again", extra={"seconds": seconds})

    def remove(self, step: str) -> None:
        """Record that a step is not tried any more."""
        if self._failing.pop(step, 0) and not self._failing:
            # No step is left that could see the end of the outage; the next failure is logged.
            self._lost_at = None

    async def retry_until_done(self, step: str, call: Callable[[], Awaitable[T]]) -> T:
        """Call ``call`` until it is done; errors other than an outage are raised.

        It is not done while the ledger leaves a part of it: that is an answer, and no outage.
        """
        partly_done = 0
        try:
            while True:
                try:
                    result = await call()
                except PartlyDoneError as error:
                    self.succeeded(step)
                    partly_done += 1
                    if partly_done == 1:
                        _logger.warning(
                            "Job ledger did a part of a step: %s", error, extra={"step": step}
                        )
                    await self._clock.sleep(RETRY_BACKOFF.delay(partly_done, self._rng))
                except LedgerUnavailableError as error:
                    await self._clock.sleep(self.failed(step, error))
                else:
                    self.succeeded(step)
                    return result
        finally:
            self.remove(step)
