"""The memory adapter's answer to "is it worth another try?": at once, nothing to wait for."""

from dataclasses import dataclass, field

from viralfx.domain.resilience.failures import ErrorFilter, Matcher, matcher
from viralfx.domain.resilience.quantities import require_count


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRetryPolicy:
    """Up to ``attempts`` attempts of errors in ``retry_on``, without waiting.

    Raises ``ValueError`` for a number of attempts below one.
    """

    attempts: int = 3
    retry_on: ErrorFilter = Exception
    _retries: Matcher = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a number of attempts below one."""
        require_count("attempts", self.attempts)
        object.__setattr__(self, "_retries", matcher(self.retry_on))

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """See :class:`viralfx.domain.resilience.retry_policy.RetryPolicy`."""
        return 0.0 if attempt < self.attempts and self._retries(error) else None
