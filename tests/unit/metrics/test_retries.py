"""Tests of the metrics of retries and retry budgets."""

import pytest
from prometheus_client import CollectorRegistry
from tests.manual_clock import ManualClock
from tests.unit.metrics.reading import series, value

from viralfx.bootstrap import assemble
from viralfx.core.errors import ConfigurationError
from viralfx.resilience.policy import RetryBudget
from viralfx.resilience.retry import Retrier, retry
from viralfx.resilience.retry_decision import AttemptFailed
from viralfx.settings import Settings
from viralfx.telemetry.metrics.health import RetryMetrics


def of(name: str, budget: RetryBudget | None = None) -> Retrier:
    """Return a retrier that never waits."""
    return retry(attempts=3, base_delay=0.0, name=name, budget=budget)


async def fail() -> None:
    """Fail."""
    raise ConnectionError


async def test_attempts_waits_and_final_failures_are_counted(clock: ManualClock) -> None:
    """The label is the name of the retrier."""
    registry = CollectorRegistry()
    metrics, retrier = RetryMetrics(registry, clock), of("users")
    metrics.add(retrier)
    with pytest.raises(ConnectionError):
        await retrier.execute(fail)
    await retrier.execute(lambda: None)
    reason = {"operation": "users", "reason": "attempts"}

    assert value(registry, "viralfx_retry_failed_attempts_total", operation="users") == 3
    assert value(registry, "viralfx_retry_delay_seconds_count", operation="users") == 2
    assert value(registry, "viralfx_retry_gave_up_total", **reason) == 1


async def test_the_remaining_budget_is_read_at_the_scrape(clock: ManualClock) -> None:
    """Each retry reduces it."""
    registry, budget = CollectorRegistry(), RetryBudget(ratio=0.0, per_second=0.5, window=10.0)
    RetryMetrics(registry, clock).add(of("users", budget))
    before = value(registry, "viralfx_retry_budget_available", operation="users")
    budget.withdraw(clock.monotonic())

    assert before == 5
    assert value(registry, "viralfx_retry_budget_available", operation="users") == 4


def test_names_of_retriers_are_limited(clock: ManualClock) -> None:
    """Code that generates names cannot create an unlimited number of series."""
    registry = CollectorRegistry()
    metrics = RetryMetrics(registry, clock)
    for number in range(65):
        metrics(AttemptFailed(name=f"n{number}", attempt=1, delay=1.0, error=ValueError()))
    before = series(registry)
    for number in range(10_000):
        metrics(AttemptFailed(name=f"n{number}", attempt=1, delay=1.0, error=ValueError()))

    assert series(registry) == before


async def test_an_applications_retriers_are_counted() -> None:
    """The configuration's ``retriers`` are counted."""
    retrier = of("users", RetryBudget())
    registry = assemble(Settings(), retriers=[retrier]).metrics.registry
    with pytest.raises(ConnectionError):
        await retrier.execute(fail)

    assert value(registry, "viralfx_retry_failed_attempts_total", operation="users") == 3
    assert value(registry, "viralfx_retry_budget_available", operation="users") == 98.2


def test_unnamed_and_duplicate_retriers_are_rejected() -> None:
    """Each retrier needs a unique name."""
    with pytest.raises(ConfigurationError) as caught:
        assemble(Settings(), retriers=[retry(), of("users"), of("users")])

    assert caught.value.problems == (
        'OperationsConfig.retriers: one has no name; make it with retry(name="...")',
        "OperationsConfig.retriers: a retrier named 'users' is registered already",
    )
