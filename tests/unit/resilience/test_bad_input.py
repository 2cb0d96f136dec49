"""Invalid arguments are rejected at definition, with the allowed values."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from viralfx.resilience.breaker import CircuitBreaker, circuit_breaker
from viralfx.resilience.breaker_states import RollingWindow
from viralfx.resilience.bulkhead import Bulkhead
from viralfx.resilience.deadline import Deadline
from viralfx.resilience.policy import Backoff, BackoffPolicy, RetryBudget
from viralfx.resilience.retry import retry

NUMBERS: list[tuple[Callable[[], object], str]] = [
    (lambda: retry(attempts=0), "attempts must be at least 1, got 0"),
    (lambda: retry(base_delay=-1.0), "base must be zero or more"),
    (lambda: retry(base_delay=math.nan), "base must be zero or more"),
    (lambda: retry(base_delay=1.0, backoff=Backoff()), "either base_delay or backoff"),
    (lambda: retry(attempts=3, policy=BackoffPolicy()), "a policy replaces attempts"),
    (lambda: retry(attempts=None, policy=BackoffPolicy()), "a policy replaces attempts"),
    (lambda: retry(base_delay=1.0, policy=BackoffPolicy()), "a policy replaces attempts"),
    (lambda: retry(retry_on=OSError, policy=BackoffPolicy()), "a policy replaces attempts"),
    (lambda: retry(deadline=-1.0), "deadline must be zero or more and finite"),
    (lambda: retry(deadline=math.inf), "deadline must be zero or more and finite"),
    (lambda: Deadline(-0.1), "deadline must be zero or more and finite"),
    (lambda: CircuitBreaker(0), "failure_threshold must be at least 1, got 0"),
    (lambda: CircuitBreaker(half_open_max_calls=0), "half_open_max_calls must be at least 1"),
    (lambda: CircuitBreaker(5, 0.0), "open_for must be more than zero and finite"),
    (lambda: CircuitBreaker(5, math.inf), "open_for must be more than zero and finite"),
    (lambda: CircuitBreaker(probe_lease=0), "probe_lease must be more than zero and finite"),
    (lambda: circuit_breaker(0), "failure_threshold must be at least 1"),
    (lambda: circuit_breaker(5, -1), "open_for must be more than zero"),
    (lambda: circuit_breaker(probe_lease=-1), "probe_lease must be more than zero"),
    (lambda: circuit_breaker(half_open_max_calls=0), "half_open_max_calls must be at least"),
    (lambda: RollingWindow(seconds=0), "seconds must be more than zero and finite"),
    (lambda: RollingWindow(slow_after=0), "slow_after must be more than zero and finite"),
    (lambda: RollingWindow(failure_rate=0), "failure_rate must be more than 0 and at most 1"),
    (lambda: RollingWindow(slow_rate=1.1), "slow_rate must be more than 0 and at most 1"),
    (lambda: RollingWindow(minimum_calls=0), "minimum_calls must be at least 1"),
    (lambda: RetryBudget(ratio=-0.1), "ratio must be zero or more and finite"),
    (lambda: RetryBudget(per_second=math.inf), "per_second must be zero or more and finite"),
    (lambda: RetryBudget(window=0), "window must be more than zero and finite"),
    (lambda: Bulkhead(0), "limit must be at least 1"),
    (lambda: Bulkhead(1, queue=-1), "queue must be zero or more"),
]


@pytest.mark.parametrize(("make", "message"), NUMBERS, ids=range(len(NUMBERS)))
def test_an_invalid_number_is_a_value_error(make: Callable[[], object], message: str) -> None:
    """At definition, with the name of the argument."""
    with pytest.raises(ValueError, match=message):
        make()


async def coroutine_function() -> None:
    """Do nothing."""


def plain_function() -> None:
    """Do nothing."""


# Typed as Any, because the type checker rejects these calls as well.
ANY_RETRY: Any = retry
ANY_BREAKER: Any = CircuitBreaker
ANY_DECORATOR: Any = circuit_breaker
ANY_BULKHEAD: Any = Bulkhead
ANY_POLICY: Any = BackoffPolicy

KINDS: list[tuple[Callable[[], object], str]] = [
    (lambda: ANY_DECORATOR(coroutine_function), r"use @circuit_breaker\(\) with parentheses"),
    (lambda: ANY_RETRY(coroutine_function), r"use @retry\(\) with parentheses"),
    (lambda: ANY_RETRY(attempts=2.5), r"use @retry\(\) with parentheses"),
    (lambda: retry(attempts=True), "attempts must be a whole number, got True"),
    (lambda: ANY_BREAKER(2.5), "failure_threshold must be a whole number, got 2.5"),
    (lambda: ANY_RETRY(retry_on=BaseException), "only subclasses of Exception can be listed"),
    (lambda: ANY_RETRY(retry_on=(OSError, 5)), "only subclasses of Exception can be listed"),
    (lambda: ANY_POLICY(backoff=5), r"backoff must be a Backoff, such as .*, got 5"),
    (lambda: ANY_RETRY(retry_on="OSError"), "expected an exception type, a tuple"),
    (lambda: ANY_BREAKER(failure_on=(BaseException,)), "only subclasses of Exception"),
    (lambda: ANY_DECORATOR(failure_on=BaseException), "only subclasses of Exception"),
    (lambda: retry(deadline=1.0)(plain_function), "a deadline cannot cut a plain function"),
    (lambda: ANY_BULKHEAD(1)(plain_function), "make it `async def`"),
    (lambda: aiter(retry(deadline=1.0)), r"inside `async with Deadline\(...\)` instead"),
]


@pytest.mark.parametrize(("make", "message"), KINDS, ids=range(len(KINDS)))
def test_an_argument_of_the_wrong_type_is_a_type_error(
    make: Callable[[], object], message: str
) -> None:
    """At definition, with a remedy."""
    with pytest.raises(TypeError, match=message):
        make()
