"""When a webhook that did not arrive is sent again."""

from viralfx.domain.resilience.backoff import Backoff, Jitter
from viralfx.domain.resilience.failures import CallRejectedError
from viralfx.domain.resilience.quantities import require_count
from viralfx.domain.resilience.retry_policy import BackoffPolicy
from viralfx.domain.webhooks.errors import WebhookRefusedError, WebhookRejectedError
from viralfx.domain.webhooks.responses import LONGEST_RETRY_AFTER


class WebhookRetryPolicy:
    """Policy: 10 attempts within 20 hours, or when the receiver asks.

    They are 5 s, 20 s, 80 s, 5 min, 21 min, 85 min and then 6 h apart, each shortened by up to a
    half, so that those who failed together do not return together.

    An attempt that the host's breaker did not let through is not the webhook's fault: it is never
    the last, as long as there were not twice as many attempts in all.
    """

    def __init__(self, attempts: int = 10) -> None:
        """Refuse less than two attempts: raises ``ValueError``, ``TypeError`` for no number."""
        require_count("attempts - 1", attempts - 1)
        self._attempts = attempts
        self._policy = BackoffPolicy(
            attempts=attempts,
            backoff=Backoff(base=5.0, factor=4.0, cap=LONGEST_RETRY_AFTER, jitter=Jitter.EQUAL),
            retry_on=_may_pass,
        )

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """See :meth:`viralfx.domain.resilience.retry_policy.RetryPolicy.next_delay`."""
        if isinstance(error, CallRejectedError) and attempt < 2 * self._attempts:
            attempt = min(attempt, self._attempts - 1)
        return self._policy.next_delay(attempt, error)


def _may_pass(error: Exception) -> bool:
    # What nobody foresaw is tried again, too.
    return not isinstance(error, WebhookRefusedError | WebhookRejectedError)
