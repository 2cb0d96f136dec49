"""The contract of ``RetryPolicy``, run against every policy.

A technology adds a row to ``POLICIES``: the policy, an error it retries and, if any, an error it
does not.
"""

import asyncio
import functools
import inspect
import math
import random
from dataclasses import dataclass

import pytest
from redis import exceptions as redis_errors
from tests.unit.resilience.scripted import SkippingClock

from viralfx import postgres
from viralfx.adapters import redis
from viralfx.resilience.policy import Backoff, BackoffPolicy, Jitter, RetryPolicy
from viralfx.resilience.retry import Retrier, retry


@dataclass(frozen=True, kw_only=True)
class Case:
    """A policy under test."""

    policy: RetryPolicy
    transient: Exception
    permanent: Exception | None = None


POLICIES = {
    "backoff": Case(
        policy=BackoffPolicy(retry_on=OSError), transient=OSError(), permanent=KeyError("k")
    ),
    "jittered": Case(
        policy=BackoffPolicy(backoff=Backoff(jitter=Jitter.FULL)), transient=OSError()
    ),
    "unbounded": Case(policy=BackoffPolicy(attempts=None), transient=OSError()),
    "unbounded decorator": Case(policy=retry(attempts=None), transient=OSError()),
    "unbounded postgres": Case(policy=postgres.retry_policy(None), transient=OSError()),
    "decorator": Case(
        policy=retry(attempts=4, retry_on=OSError), transient=OSError(), permanent=KeyError("k")
    ),
    "postgres": Case(policy=postgres.retry_policy(), transient=OSError(), permanent=KeyError("k")),
    "redis": Case(
        policy=redis.retry_policy(),
        transient=redis_errors.ConnectionError(),
        permanent=redis_errors.AuthenticationError(),
    ),
}


@pytest.fixture(params=list(POLICIES.values()), ids=list(POLICIES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each policy in turn."""
    found: Case = request.param
    return found


def test_decision_does_not_wait(case: Case) -> None:
    """The port is a plain function; its result is not awaited."""
    assert not inspect.isawaitable(case.policy.next_delay(1, case.transient))


@pytest.mark.parametrize("attempt", [1, 2, 3, 10, 100, 10_000])
def test_delay_is_finite_or_none(case: Case, attempt: int) -> None:
    """For any number of attempts, without raising."""
    delay = case.policy.next_delay(attempt, case.transient)
    assert delay is None or 0 <= delay < math.inf


def test_transient_error_gets_a_second_attempt(case: Case) -> None:
    """A policy retries at least once."""
    assert case.policy.next_delay(1, case.transient) is not None


def test_permanent_error_is_not_retried(case: Case) -> None:
    """For any attempt."""
    if case.permanent is None:
        pytest.skip("retries every error")
    assert [case.policy.next_delay(n, case.permanent) for n in (1, 2)] == [None, None]


def test_giving_up_is_final(case: Case) -> None:
    """No later attempt gets a delay."""
    gives_up = [case.policy.next_delay(n, case.transient) is None for n in range(1, 50)]
    assert gives_up == sorted(gives_up)


def test_policy_has_no_state(case: Case) -> None:
    """Decisions for other callers do not change the result."""
    alone = [case.policy.next_delay(n, case.transient) is None for n in range(1, 6)]
    mixed = []
    for attempt in range(1, 6):
        mixed.append(case.policy.next_delay(attempt, case.transient) is None)
        case.policy.next_delay(6 - attempt, OSError())
    assert mixed == alone


async def test_concurrent_callers_have_their_own_attempts(case: Case) -> None:
    """As many as the policy allows."""
    allowed = 1
    while case.policy.next_delay(allowed, case.transient) is not None and allowed < 5:
        allowed += 1
    calls = [0] * 10
    retrier = Retrier(case.policy, clock=SkippingClock())

    async def call(number: int) -> None:
        calls[number] += 1
        if calls[number] < allowed:
            raise case.transient

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(retrier.execute(functools.partial(call, number)))
    assert calls == [allowed] * 10


def test_seeded_generator_makes_delays_repeatable() -> None:
    """Randomness is an argument."""
    backoff = Backoff(jitter=Jitter.FULL)
    first, second = (
        BackoffPolicy(backoff=backoff, rng=random.Random(5)).next_delay(1, OSError())  # noqa: S311 - spreads load
        for _ in range(2)
    )
    assert first == second
