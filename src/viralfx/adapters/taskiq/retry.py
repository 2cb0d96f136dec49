"""The retry policy of taskiq's tasks: how often and when a message runs again."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from taskiq import SimpleRetryMiddleware, SmartRetryMiddleware

from viralfx.adapters.taskiq.messages import number_of, type_and_text
from viralfx.resilience.policy import BackoffPolicy

DEFAULT_ATTEMPTS = 3
"""Attempts of a task with the label ``retry_on_error`` and without ``max_retries``, as in taskiq;
also of a message that a middleware of the application fails."""
RETRY_MIDDLEWARES = (SimpleRetryMiddleware, SmartRetryMiddleware)


class MessageFailedError(Exception):
    """A task of taskiq failed: the type and the text of its error, which is the cause."""

    def __init__(self, error: BaseException, attempts: int = 1) -> None:
        """Allow ``attempts`` executions of the message in all."""
        self.attempts = attempts
        super().__init__(type_and_text(error))


class RetryRequestedError(MessageFailedError):
    """The same, and a middleware sent the message again, ``delay`` seconds later."""

    def __init__(self, error: BaseException, delay: float) -> None:
        super().__init__(error)
        self.delay = delay


def attempts_of(labels: Mapping[str, Any], middlewares: Iterable[object] = ()) -> int:
    """Return how often a task that fails runs: once, unless its labels allow more.

    ``middlewares`` are those of the broker. Beside one for retries ``max_retries`` alone allows
    none, because the middleware retries only tasks with ``retry_on_error``. Raises
    :class:`MessageError`.
    """
    bounded = labels.get("max_retries") is not None
    retries = bounded and not any(isinstance(each, RETRY_MIDDLEWARES) for each in middlewares)
    attempts = max(1, int(number_of(labels, "max_retries"))) if bounded else DEFAULT_ATTEMPTS
    return attempts if str(labels.get("retry_on_error", retries)).lower() == "true" else 1


class MessageRetries:
    """The retry policy of taskiq's tasks: the decision of a middleware, or the labels."""

    def __init__(self, attempts: Callable[[], int]) -> None:
        """Call ``attempts`` for the number of executions of a job that its timeout ends."""
        self._attempts = attempts

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """See :meth:`RetryPolicy.next_delay`."""
        if isinstance(error, RetryRequestedError):
            return error.delay
        if isinstance(error, MessageFailedError):
            attempts = error.attempts
        else:
            attempts = self._attempts() if isinstance(error, TimeoutError) else DEFAULT_ATTEMPTS
        return BackoffPolicy(attempts=attempts).next_delay(attempt, error)
