"""The retry policy of Redis, and its use for every request."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from viralfx.adapters.redis.errors import NOT_THE_PRIMARY, IdleConnectionError, is_transient
from viralfx.resilience.policy import Backoff, BackoffPolicy, RetryPolicy

T = TypeVar("T")


def retry_policy(attempts: int = 4, base: float = 0.5, cap: float = 3.0) -> BackoffPolicy:
    """Return the policy for Redis: up to ``attempts`` attempts of transient errors.

    ``base`` and ``cap`` are the first and the longest wait in seconds; by default the waits are
    0.5, 1 and 2 s. Raises ``ValueError`` for a number of attempts below one.
    """
    return BackoffPolicy(
        attempts=attempts,
        backoff=Backoff(base=min(base, cap), cap=cap),
        retry_on=is_transient,
    )


class RequestRetry(Retry):
    """Runs a retry policy inside redis-py, around every request of a client.

    redis-py by itself would send a wrong password four times, because its authentication error is
    a connection error.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        errors = (exceptions.ConnectionError, exceptions.TimeoutError, *NOT_THE_PRIMARY)
        super().__init__(NoBackoff(), 0, errors)
        self._policy = policy

    def __deepcopy__(self, memo: dict[int, Any]) -> "RequestRetry":
        """Return itself: redis-py copies it for each connection, and it holds no state."""
        return self

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[T]],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,  # noqa: FBT001, FBT002 - redis-py's signature
    ) -> T:
        """Call ``do`` until it succeeds or the policy gives up; await ``fail`` after a failure."""
        attempt = 0
        while True:
            try:
                return await do()
            except self._supported_errors as error:
                if not (is_retryable or is_transient)(error):
                    raise
                attempt += 1
                await (fail(error, attempt) if with_failure_count else fail(error))
                delay = self._policy.next_delay(attempt, error)
                if delay is None:
                    raise
                if attempt == 1 and isinstance(error, IdleConnectionError):
                    continue  # the server may be well, and the wait for the reply was long
            await asyncio.sleep(delay)
