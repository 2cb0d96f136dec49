"""The retry policy of webhooks: schedule, ``Retry-After``, and rejections by the circuit."""

import pytest

from viralfx.domain.webhooks.delivery import WebhookRetryPolicy
from viralfx.domain.webhooks.url import (
    WebhookRefusedError,
    WebhookRejectedError,
    WebhookUnavailableError,
)
from viralfx.resilience.breaker import CircuitOpenError
from viralfx.resilience.policy import RetryPolicy

UNAVAILABLE = WebhookUnavailableError("hooks.example.com did not answer")
OPEN = CircuitOpenError("hooks.example.com", "webhook", 42.0)
SCHEDULE = [5.0, 20.0, 80.0, 320.0, 1280.0, 5120.0, 20480.0, 21600.0, 21600.0]


def test_the_schedule() -> None:
    """Ten attempts in twenty hours."""
    policy: RetryPolicy = WebhookRetryPolicy()
    assert sum(SCHEDULE) < 20 * 3600
    for attempt, most in enumerate(SCHEDULE, start=1):
        delay = policy.next_delay(attempt, UNAVAILABLE)
        assert delay is not None
        assert most / 2 <= delay <= most
    assert policy.next_delay(10, UNAVAILABLE) is None
    assert policy.next_delay(11, UNAVAILABLE) is None


def test_retry_after_prolongs_the_delay() -> None:
    """Up to the maximum."""
    policy = WebhookRetryPolicy()
    assert policy.next_delay(1, WebhookUnavailableError("busy", 42.0)) == 42.0
    assert policy.next_delay(1, WebhookUnavailableError("busy", 21600.0)) == 21600.0
    delay = policy.next_delay(3, WebhookUnavailableError("busy", 1.0))
    assert delay is not None
    assert delay >= 40.0


@pytest.mark.parametrize("final", [WebhookRefusedError("no"), WebhookRejectedError("no", 410)])
def test_permanent_errors_are_not_retried(final: Exception) -> None:
    """Another attempt would fail as well."""
    assert WebhookRetryPolicy().next_delay(1, final) is None


@pytest.mark.parametrize("error", [TimeoutError(), RuntimeError("unexpected"), OSError()])
def test_unexpected_errors_are_retried(error: Exception) -> None:
    """They may be temporary."""
    assert WebhookRetryPolicy().next_delay(1, error) is not None


def test_a_rejection_by_the_circuit_is_not_the_last_attempt() -> None:
    """The delay is at least that of the circuit; the number of attempts is limited."""
    policy = WebhookRetryPolicy()
    assert policy.next_delay(1, OPEN) == 42.0
    for attempt in range(9, 20):
        delay = policy.next_delay(attempt, OPEN)
        assert delay is not None
        assert 10800.0 <= delay <= 21600.0
    assert policy.next_delay(20, OPEN) is None
    held_by_hand = policy.next_delay(1, CircuitOpenError("a", "", float("inf")))
    assert held_by_hand is not None
    assert held_by_hand <= 5.0


@pytest.mark.parametrize("attempts", [1, 0, -1])
def test_fewer_than_two_attempts_are_rejected(attempts: int) -> None:
    """One attempt is not a retry."""
    with pytest.raises(ValueError, match="attempts"):
        WebhookRetryPolicy(attempts)
