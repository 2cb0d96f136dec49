"""How long to wait before each further attempt: a schedule as data, nothing that waits."""

import math
import random
from dataclasses import dataclass
from enum import StrEnum

from viralfx.domain.resilience.quantities import require_not_negative


class Jitter(StrEnum):
    """How a delay is spread, so that callers who failed together do not return together."""

    NONE = "none"
    """Exactly the schedule."""
    FULL = "full"
    """Anything between nothing and the schedule."""
    EQUAL = "equal"
    """The second half of the schedule."""
    DECORRELATED = "decorrelated"
    """Between ``base`` and three times the delay before; ``factor`` plays no part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """An exponential schedule: ``base``, ``base * factor``, ... and never more than ``cap``.

    Durations are seconds. The cap bounds the range that jitter draws from: no delay exceeds it,
    and those that have reached it stay spread.
    """

    base: float = 1.0
    factor: float = 2.0
    cap: float = 30.0
    jitter: Jitter = Jitter.NONE

    def __post_init__(self) -> None:
        """Refuse a schedule that cannot be waited for.

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
        """Return the most that :meth:`delay` can return after the ``attempt``-th attempt."""
        decorrelated = self.jitter is Jitter.DECORRELATED
        growth, steps = (3.0, attempt) if decorrelated else (self.factor, attempt - 1)
        try:
            return min(self.cap, self.base * growth**steps)
        except OverflowError:
            return self.cap if self.base else 0.0

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Draw the wait between the ``attempt``-th attempt, which failed, and the next."""
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
        # The walk is drawn anew for each delay instead of continued from the last one: the same
        # distribution, and nothing to remember between attempts or to share between callers.
        delay = self.base
        for _ in range(attempt):
            delay = rng.uniform(self.base, min(self.cap, 3 * delay))
        return delay

    def delays(self, attempts: int) -> tuple[float, ...]:
        """List the longest wait before each further one of ``attempts``: 3 give ``(1.0, 2.0)``."""
        return tuple(self.longest(attempt) for attempt in range(1, attempts))
