"""The types that every guard must preserve; checked by mypy, never run."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, assert_type

from viralfx import Bulkhead
from viralfx.resilience.breaker import CircuitBreaker, circuit_breaker
from viralfx.resilience.fallback import with_fallback
from viralfx.resilience.policy import RetryPolicy
from viralfx.resilience.retry import Retrier, retry


@retry(attempts=3, base_delay=1.0)
async def retried(user: str, *, active: bool = True) -> int:
    """Keep a signature with a keyword argument."""
    return len(user) + active


@circuit_breaker(5, 60.0)
async def broken(user: str, *, active: bool = True) -> int:
    """Keep it behind a breaker."""
    return len(user) + active


@CircuitBreaker(5, 60.0)
async def shared(user: str, *, active: bool = True) -> int:
    """Keep it behind a shared breaker."""
    return len(user) + active


@Bulkhead(10)
async def bounded(user: str, *, active: bool = True) -> int:
    """Keep it behind a bulkhead."""
    return len(user) + active


@retry()
@CircuitBreaker()
def plain(user: str, *, active: bool = True) -> int:
    """Keep a plain function plain."""
    return len(user) + active


class Service:
    """Has guarded methods."""

    @retry()
    async def method(self, user: str) -> int:
        """Keep a method."""
        return len(user)


async def fetch() -> int:
    """Return a number."""
    return 1


def fetch_now() -> str:
    """Return a text."""
    return ""


async def check(service: Service, retrier: Retrier, breaker: CircuitBreaker) -> None:
    """Assert the types."""
    await assert_type(retried("a", active=False), Coroutine[Any, Any, int])
    assert_type(await retried("a"), int)
    assert_type(await broken("a"), int)
    assert_type(await shared("a"), int)
    assert_type(await bounded("a"), int)
    assert_type(plain("a"), int)
    assert_type(await service.method("a"), int)
    assert_type(await retrier.execute(fetch), int)
    assert_type(await retrier.execute(fetch_now), str)
    assert_type(await breaker.execute(fetch, "name"), int)
    assert_type(await breaker.execute(fetch_now, "name"), str)
    assert_type(await Bulkhead(1).execute(fetch), int)
    assert_type(await with_fallback(fetch, None), int | None)
    assert_type(await with_fallback(fetch, fallback_factory=str), int | str)

    await retried(1)  # type: ignore[arg-type]  # arguments are checked
    await broken("a", activ=True)  # type: ignore[call-arg]  # keywords too
    plain()  # type: ignore[call-arg]  # and what is missing
    Bulkhead(1)(fetch_now)  # type: ignore[type-var]  # a bulkhead is for `async def`

    function: Callable[[str], Awaitable[int]] = retried
    policy: RetryPolicy = retrier
    assert_type(policy.next_delay(1, OSError()), float | None)
    await function("a")
