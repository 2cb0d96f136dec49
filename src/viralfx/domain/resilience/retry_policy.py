"""The retry port: whether a failed attempt is worth another, and when. It decides, never waits."""

import random
from dataclasses import dataclass, field
from typing import Protocol

from viralfx.domain.resilience.backoff import Backoff
from viralfx.domain.resilience.failures import ErrorFilter, Matcher, matcher, retry_after
from viralfx.domain.resilience.quantities import require_count


class RetryPolicy(Protocol):
    """Port: answers "is it worth another try, and when?" for one technology.

    A policy keeps no state of a call: the same one serves any number of callers at once, and the
    re-run time of a job as well as the pause inside a call.
    """

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """Return the seconds to wait after the ``attempt``-th attempt failed; None gives up.

        The first attempt is 1. It never raises.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BackoffPolicy:
    """Policy: up to ``attempts`` attempts (None: without end) of errors in ``retry_on``.

    An error's ``retry_after`` is honoured where it asks for more than the back-off. One that asks
    for more than the cap is given up at once: coming back early would be refused, and waiting
    would let a server park the caller.
    """

    attempts: int | None = 3
    backoff: Backoff = field(default_factory=Backoff)
    retry_on: ErrorFilter = Exception
    # Spreads load only; nothing depends on it being unpredictable.
    rng: random.Random = field(default_factory=random.Random, repr=False, compare=False)
    _retries: Matcher = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a number of attempts below one (``ValueError``) or not whole (``TypeError``)."""
        if self.attempts is not None:
            require_count("attempts", self.attempts)
        object.__setattr__(self, "_retries", matcher(self.retry_on))

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """See :meth:`RetryPolicy.next_delay`."""
        if self.attempts is not None and attempt >= self.attempts:
            return None
        if not self._retries(error):
            return None
        delay = self.backoff.delay(attempt, self.rng)
        hint = retry_after(error)
        if hint is None or hint <= delay:
            return delay
        return hint if hint <= self.backoff.cap else None
