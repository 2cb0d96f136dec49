"""Retry policy: the port, back-off with jitter, and the retry budget."""

import math
import random
import threading
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from viralfx.core.clock import default_rng
from viralfx.core.errors import require_count, require_not_negative
from viralfx.resilience._callables import ErrorFilter, Matcher, matcher, retry_after
from viralfx.resilience.breaker_states import RollingCounts

_MAX_STEPS = 1000
"""Steps of the random walk of decorrelated jitter. The distribution hardly changes after so many,
and a retry without limit must not take longer with each attempt."""


class Jitter(StrEnum):
    """The random part of a delay, which spreads callers that failed at the same moment."""

    NONE = "none"
    """The delay of the schedule."""
    FULL = "full"
    """Between zero and the delay of the schedule."""
    EQUAL = "equal"
    """Between half the delay of the schedule and the whole."""
    DECORRELATED = "decorrelated"
    """Between ``base`` and three times the previous delay; ``factor`` is not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """An exponential schedule: ``base``, ``base * factor``, ..., at most ``cap``.

    Durations are seconds. The cap limits the range of the jitter, so no delay exceeds it, and
    delays that have reached it still differ.
    """

    base: float = 1.0
    factor: float = 2.0
    cap: float = 30.0
    jitter: Jitter = Jitter.NONE

    def __post_init__(self) -> None:
        """Validate the schedule.

        Raises ``ValueError`` for a negative or non-finite duration, a factor below one, a cap
        below the base or an unknown jitter.
        """
        require_not_negative("base", self.base)
        require_not_negative("cap", self.cap)
        if self.cap < self.base:
            raise ValueError(f"cap must be at least base ({self.base!r}), got {self.cap!r}")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor must be one or more and finite, got {self.factor!r}")
        object.__setattr__(self, "jitter", Jitter(self.jitter))

    def longest(self, attempt: int) -> float:
        """Return the maximum of :meth:`delay` after the ``attempt``-th attempt."""
        decorrelated = self.jitter is Jitter.DECORRELATED
        growth, steps = (3.0, attempt) if decorrelated else (self.factor, attempt - 1)
        try:
            return min(self.cap, self.base * growth**steps)
        except OverflowError:
            return self.cap if self.base else 0.0

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Draw the delay in seconds after the ``attempt``-th attempt has failed."""
        longest = self.longest(attempt)
        match self.jitter:
            case Jitter.NONE:
                return longest
            case Jitter.FULL:
                return rng.uniform(0.0, longest)
            case Jitter.EQUAL:
                return rng.uniform(longest / 2, longest)
            case Jitter.DECORRELATED:
                return self._decorrelated(attempt, rng)

    def _decorrelated(self, attempt: int, rng: random.Random) -> float:
        # Each delay repeats the random walk from its start instead of continuing the last one: the
        # distribution is the same, and no state is kept between attempts or callers.
        delay = self.base
        for _ in range(min(attempt, _MAX_STEPS)):
            delay = rng.uniform(self.base, min(self.cap, 3 * delay))
        return delay

    def delays(self, attempts: int) -> tuple[float, ...]:
        """Return the maximum delay before each attempt after the first: 3 give ``(1.0, 2.0)``."""
        return tuple(self.longest(attempt) for attempt in range(1, attempts))


_CALL, _RETRY = 0, 1


class RetryBudget:
    """Limits retries to ``ratio`` per call plus ``per_second``, over the last ``window`` seconds.

    Share one budget between all callers of a dependency: without it, three attempts for each call
    triple the load during an outage. Callers pass monotonic times.

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
        """Record a call. Do not record its retries."""
        with self._lock:
            self._counts.add(now, _CALL)

    def withdraw(self, now: float) -> bool:
        """Charge one retry if the budget allows it; return whether it does."""
        with self._lock:
            if self._available(now) < 1:
                return False
            self._counts.add(now, _RETRY)
            return True

    def available(self, now: float) -> float:
        """Return the number of retries that are allowed now."""
        with self._lock:
            return self._available(now)

    def _available(self, now: float) -> float:
        self._counts.forget(now)
        calls, retries = self._counts.totals
        return max(0.0, self._ratio * calls + self._reserve - retries)


class RetryPolicy(Protocol):
    """Port: decides whether, and after which delay, a failed attempt is retried.

    A policy keeps no state of a call, so any number of callers can share it. The same policy
    serves calls and jobs.
    """

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """Return the delay in seconds after the ``attempt``-th attempt failed; None gives up.

        The first attempt is 1. It must not raise.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BackoffPolicy:
    """Policy: up to ``attempts`` attempts (None: no limit) for errors in ``retry_on``.

    Without a limit the delays stay at the cap of ``backoff``; deadline and budget of the caller
    still end them.

    If an error has a ``retry_after`` longer than the back-off, that is the delay. If it is longer
    than the cap, the policy gives up: an earlier retry would be rejected, and a server must not
    be able to block the caller for long.
    """

    attempts: int | None = 3
    backoff: Backoff = field(default_factory=Backoff)
    retry_on: ErrorFilter = Exception
    rng: random.Random = field(default_factory=default_rng, repr=False, compare=False)
    _retries: Matcher = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate the fields: ``ValueError`` below one attempt, ``TypeError`` for a wrong type."""
        if self.attempts is not None:
            require_count("attempts", self.attempts)
        backoff: object = self.backoff
        if not isinstance(backoff, Backoff):
            raise TypeError(
                f"backoff must be a Backoff, such as Backoff(base=2.0), got {backoff!r}"
            )
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
