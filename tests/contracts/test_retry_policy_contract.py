"""What every retry policy must hold to, whatever technology it speaks for.

A technology adds its policy to ``POLICIES``: the policy, an error it retries and, if there is
one, an error it does not.
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

from viralfx.adapters import postgres
from viralfx.adapters.memory.retry import MemoryRetryPolicy
from viralfx.adapters.redis import RedisRetryPolicy
from viralfx.domain.resilience.backoff import Backoff, Jitter
from viralfx.domain.resilience.retry import Retrier, retry
from viralfx.domain.resilience.retry_policy import BackoffPolicy, RetryPolicy


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
    "decorator": Case(
        policy=retry(attempts=4, retry_on=OSError), transient=OSError(), permanent=KeyError("k")
    ),
    "postgres": Case(policy=postgres.retry_policy(), transient=OSError(), permanent=KeyError("k")),
    "memory": Case(
        policy=MemoryRetryPolicy(retry_on=OSError), transient=OSError(), permanent=KeyError("k")
    ),
    "redis": Case(
        policy=RedisRetryPolicy(),
        transient=redis_errors.ConnectionError(),
        permanent=redis_errors.AuthenticationError(),
    ),
}


@pytest.fixture(params=list(POLICIES.values()), ids=list(POLICIES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each policy in turn."""
    found: Case = request.param
    return found


def test_it_decides_without_waiting(case: Case) -> None:
    """The port is a plain function; what it returns need not be awaited."""
    assert not inspect.isawaitable(case.policy.next_delay(1, case.transient))


@pytest.mark.parametrize("attempt", [1, 2, 3, 10, 100, 10_000])
def test_it_answers_with_a_finite_delay_or_none(case: Case, attempt: int) -> None:
    """However many attempts there were; and it never raises."""
    delay = case.policy.next_delay(attempt, case.transient)
    assert delay is None or 0 <= delay < math.inf


def test_a_transient_error_is_worth_a_second_attempt(case: Case) -> None:
    """A policy that never retries is none."""
    assert case.policy.next_delay(1, case.transient) is not None


def test_a_permanent_error_is_not(case: Case) -> None:
    """Nor does the number of the attempt matter."""
    if case.permanent is None:
        pytest.skip("retries every error")
    assert [case.policy.next_delay(n, case.permanent) for n in (1, 2)] == [None, None]


def test_once_it_gives_up_it_has_given_up(case: Case) -> None:
    """No later attempt is answered with a delay again."""
    gives_up = [case.policy.next_delay(n, case.transient) is None for n in range(1, 50)]
    assert gives_up == sorted(gives_up)


def test_it_remembers_nothing_of_a_call(case: Case) -> None:
    """Asked about another caller in between, it says the same about this one."""
    alone = [case.policy.next_delay(n, case.transient) is None for n in range(1, 6)]
    mixed = []
    for attempt in range(1, 6):
        mixed.append(case.policy.next_delay(attempt, case.transient) is None)
        case.policy.next_delay(6 - attempt, OSError())
    assert mixed == alone


async def test_a_runner_gives_each_concurrent_caller_its_attempts(case: Case) -> None:
    """As many as the policy says; nothing is shared between callers."""
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


def test_the_memory_policy_never_waits() -> None:
    """The embedded default and the tests lose no time."""
    policy = MemoryRetryPolicy(attempts=3)
    assert [policy.next_delay(n, OSError()) for n in (1, 2, 3)] == [0.0, 0.0, None]


def test_the_memory_policy_refuses_what_cannot_be_meant() -> None:
    """One attempt is the least there can be."""
    with pytest.raises(ValueError, match="attempts must be at least 1"):
        MemoryRetryPolicy(attempts=0)


def test_a_random_source_of_ones_own_makes_delays_repeatable() -> None:
    """Randomness is an argument."""
    backoff = Backoff(jitter=Jitter.FULL)
    first, second = (
        BackoffPolicy(backoff=backoff, rng=random.Random(5)).next_delay(1, OSError())  # noqa: S311 - spreads load
        for _ in range(2)
    )
    assert first == second
