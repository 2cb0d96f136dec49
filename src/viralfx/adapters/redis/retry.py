"""Another attempt: for requests inside the client, and as a policy for calls outside of it."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from viralfx.adapters.redis.errors import NOT_THE_PRIMARY, is_transient
from viralfx.domain.resilience.backoff import Backoff
from viralfx.domain.resilience.retry_policy import BackoffPolicy

T = TypeVar("T")


class RequestRetry(Retry):
    """The retry inside redis-py: what cannot get better is not tried again.

    redis-py itself would send a wrong password four times, because its authentication error is a
    connection error.
    """

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[T]],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,  # noqa: FBT001, FBT002 - redis-py's signature
    ) -> T:
        """Call ``do`` until it succeeds, fails for good, or has had all its attempts."""
        return await super().call_with_retry(
            do, fail, is_retryable or is_transient, with_failure_count
        )


def request_retry(retries: int, base: float, cap: float) -> RequestRetry:
    """Make the retry of each request: ``retries`` more attempts, ``base * 2`` seconds and on."""
    return RequestRetry(
        ExponentialBackoff(cap=cap, base=base),
        retries,
        (exceptions.ConnectionError, exceptions.TimeoutError, *NOT_THE_PRIMARY),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisRetryPolicy:
    """Policy for calls that no :class:`RedisClient` makes: 3 retries, 0.5, 1 and 2 s apart.

    Only for those: inside the client the same is done already, and a retry of retries multiplies.
    """

    attempts: int = 4
    backoff: Backoff = field(default_factory=lambda: Backoff(base=0.5, cap=3.0))
    # Spreads load only; nothing depends on it being unpredictable.
    rng: random.Random = field(default_factory=random.Random, repr=False, compare=False)
    _policy: BackoffPolicy = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a number of attempts below one (``ValueError``) or not whole (``TypeError``)."""
        policy = BackoffPolicy(
            attempts=self.attempts, backoff=self.backoff, retry_on=is_transient, rng=self.rng
        )
        object.__setattr__(self, "_policy", policy)

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """See :class:`viralfx.domain.resilience.retry_policy.RetryPolicy`."""
        return self._policy.next_delay(attempt, error)
