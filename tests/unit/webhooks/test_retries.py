"""When a webhook is sent again: the schedule, the receiver's wish, and breakers' rejections."""

import pytest

from viralfx.domain.resilience.circuit import CircuitOpenError
from viralfx.domain.resilience.retry_policy import RetryPolicy
from viralfx.domain.webhooks.errors import (
    WebhookRefusedError,
    WebhookRejectedError,
    WebhookUnavailableError,
)
from viralfx.domain.webhooks.retries import WebhookRetryPolicy

UNAVAILABLE = WebhookUnavailableError("hooks.example.com did not answer")
OPEN = CircuitOpenError("hooks.example.com", "webhook", 42.0)
SCHEDULE = [5.0, 20.0, 80.0, 320.0, 1280.0, 5120.0, 20480.0, 21600.0, 21600.0]


def test_the_schedule() -> None:
    """Ten attempts within twenty hours."""
    policy: RetryPolicy = WebhookRetryPolicy()
    assert sum(SCHEDULE) < 20 * 3600
    for attempt, most in enumerate(SCHEDULE, start=1):
        delay = policy.next_delay(attempt, UNAVAILABLE)
        assert delay is not None
        assert most / 2 <= delay <= most
    assert policy.next_delay(10, UNAVAILABLE) is None
    assert policy.next_delay(11, UNAVAILABLE) is None


def test_a_receiver_is_asked_again_when_it_asked_for_it() -> None:
    """Also as late as a receiver may ask for."""
    policy = WebhookRetryPolicy()
    assert policy.next_delay(1, WebhookUnavailableError("busy", 42.0)) == 42.0
    assert policy.next_delay(1, WebhookUnavailableError("busy", 21600.0)) == 21600.0
    delay = policy.next_delay(3, WebhookUnavailableError("busy", 1.0))
    assert delay is not None
    assert delay >= 40.0


@pytest.mark.parametrize("final", [WebhookRefusedError("no"), WebhookRejectedError("no", 410)])
def test_some_are_not_sent_again(final: Exception) -> None:
    """Where it changes nothing."""
    assert WebhookRetryPolicy().next_delay(1, final) is None


@pytest.mark.parametrize("error", [TimeoutError(), RuntimeError("who knows"), OSError()])
def test_what_nobody_foresaw_is_tried_again(error: Exception) -> None:
    """A job is not given up for an error that may pass."""
    assert WebhookRetryPolicy().next_delay(1, error) is not None


def test_a_rejection_by_the_breaker_is_not_the_end() -> None:
    """It waits for the breaker at least, by the schedule else, and not for ever."""
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
def test_numbers_that_make_no_schedule(attempts: int) -> None:
    """One attempt is no retry."""
    with pytest.raises(ValueError, match="attempts"):
        WebhookRetryPolicy(attempts)
