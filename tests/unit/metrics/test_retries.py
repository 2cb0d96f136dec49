"""Retries: what failed, what was waited, why it was given up, and what is left of budgets."""

import pytest
from prometheus_client import CollectorRegistry
from tests.manual_clock import ManualClock
from tests.unit.metrics.reading import series, value

from viralfx.bootstrap import assemble
from viralfx.domain.errors import ConfigurationError
from viralfx.domain.resilience.budget import RetryBudget
from viralfx.domain.resilience.retry import Retrier, retry
from viralfx.domain.resilience.retry_decision import AttemptFailed
from viralfx.settings import Settings
from viralfx.telemetry.metrics.retries import RetryMetrics


def of(name: str, budget: RetryBudget | None = None) -> Retrier:
    """Make a retrier that never waits."""
    return retry(attempts=3, base_delay=0.0, name=name, budget=budget)


async def fail() -> None:
    """Fail."""
    raise ConnectionError


async def test_attempts_waits_and_the_end_are_counted(clock: ManualClock) -> None:
    """By the name of the retrier."""
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


async def test_a_budget_is_what_is_left_of_it(clock: ManualClock) -> None:
    """It is read at the scrape, and spent by each retry."""
    registry, budget = CollectorRegistry(), RetryBudget(ratio=0.0, per_second=0.5, window=10.0)
    RetryMetrics(registry, clock).add(of("users", budget))
    before = value(registry, "viralfx_retry_budget_available", operation="users")
    budget.withdraw(clock.monotonic())

    assert before == 5
    assert value(registry, "viralfx_retry_budget_available", operation="users") == 4


def test_ten_thousand_names_are_bounded(clock: ManualClock) -> None:
    """Whoever makes names for retriers cannot make series of them."""
    registry = CollectorRegistry()
    metrics = RetryMetrics(registry, clock)
    for number in range(65):
        metrics(AttemptFailed(name=f"n{number}", attempt=1, delay=1.0, error=ValueError()))
    before = series(registry)
    for number in range(10_000):
        metrics(AttemptFailed(name=f"n{number}", attempt=1, delay=1.0, error=ValueError()))

    assert series(registry) == before


async def test_an_applications_retriers_are_counted() -> None:
    """Those that are given to the configuration."""
    retrier = of("users", RetryBudget())
    registry = assemble(Settings(), retriers=[retrier]).metrics.registry
    with pytest.raises(ConnectionError):
        await retrier.execute(fail)

    assert value(registry, "viralfx_retry_failed_attempts_total", operation="users") == 3
    assert value(registry, "viralfx_retry_budget_available", operation="users") == 98.2


def test_retriers_that_cannot_be_told_apart_are_refused() -> None:
    """Without a name, or with one that is taken."""
    with pytest.raises(ConfigurationError) as caught:
        assemble(Settings(), retriers=[retry(), of("users"), of("users")])

    assert caught.value.problems == (
        'OperationsConfig.retriers: one has no name; make it with retry(name="...")',
        "OperationsConfig.retriers: a retrier named 'users' is registered already",
    )
