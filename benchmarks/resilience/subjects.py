"""The measured libraries in a common form: a function that guards a coroutine function.

Breakers open after five failures of :class:`BackendError` in a row (or at a rate of 100 % of at
least five calls, for libraries with rates only) for ``open_for`` seconds and close after one
success, in each library's own terms. Retries make three attempts.
"""

import datetime as dt
from collections.abc import Awaitable, Callable
from typing import Any

import aiobreaker
import backoff
import circuitbreaker
import fluxgate
import fluxgate.permits
import fluxgate.retries
import fluxgate.trackers
import fluxgate.trippers
import fluxgate.windows
import hyx.circuitbreaker
import hyx.retry
import interlock
import nopanic
import purgatory
import pybreaker
import pyresilience
import redress
import stamina
import tenacity

from viralfx.resilience.breaker import CircuitBreaker
from viralfx.resilience.breaker_states import RollingWindow
from viralfx.resilience.retry import retry

Call = Callable[[], Awaitable[object]]
Guard = Callable[[Call], Call]


class BackendError(Exception):
    """Listed: counts, and is retried."""


class UnlistedError(Exception):
    """Not listed."""


def ours(open_for: float, **options: Any) -> Guard:
    """Consecutive mode, as docs/operations.md describes it."""
    lease = 2 * open_for
    return CircuitBreaker(5, open_for, probe_lease=lease, failure_on=BackendError, **options)


def ours_window(open_for: float) -> Guard:
    """Rolling-window mode."""
    return ours(open_for, window=RollingWindow(minimum_calls=5, failure_rate=1.0))


def with_circuitbreaker(open_for: float) -> Guard:
    """Use circuitbreaker."""
    return circuitbreaker.circuit(5, open_for, expected_exception=BackendError)


def with_aiobreaker(open_for: float) -> Guard:
    """Use aiobreaker."""
    period = dt.timedelta(seconds=open_for)
    return aiobreaker.CircuitBreaker(5, period, exclude=[UnlistedError])


def with_purgatory(open_for: float) -> Guard:
    """Use purgatory, holding the breaker."""
    factory = purgatory.AsyncCircuitBreakerFactory(5, open_for, exclude=[UnlistedError])

    def guard(call: Call) -> Call:
        held: Any = None

        async def guarded() -> object:
            nonlocal held
            if held is None:
                held = await factory.get_breaker("backend")
            async with held:
                return await call()

        return guarded

    return guard


def with_hyx(open_for: float) -> Guard:
    """Use hyx."""
    return hyx.circuitbreaker.consecutive_breaker(
        exceptions=BackendError,
        failure_threshold=5,
        recovery_time_secs=open_for,
        recovery_threshold=1,
    )


def with_pybreaker(open_for: float) -> Guard:
    """Use pybreaker's ``calling()``; its decorator does not guard coroutine functions."""
    breaker = pybreaker.CircuitBreaker(5, open_for, exclude=[UnlistedError])

    def guard(call: Call) -> Call:
        async def guarded() -> object:
            with breaker.calling():
                return await call()

        return guarded

    return guard


def with_pyresilience(open_for: float) -> Guard:
    """Use pyresilience."""
    config = pyresilience.CircuitBreakerConfig(
        failure_threshold=5,
        recovery_timeout=open_for,
        success_threshold=1,
        error_types=(BackendError,),
    )
    return pyresilience.resilient(circuit_breaker=config)


def with_nopanic(open_for: float) -> Guard:
    """Use nopanic."""
    return nopanic.circuit_breaker(
        failure_threshold=1.0, min_calls=5, reset_timeout=open_for, on=BackendError
    )


def with_interlock(open_for: float) -> Guard:
    """Use interlock-cb; it counts every error."""
    config = interlock.Config(
        failure_rate_threshold=1.0,
        minimum_number_of_calls=5,
        wait_duration_in_open=open_for,
        permitted_calls_in_half_open=1,
    )
    return interlock.CircuitBreaker(name="backend", config=config)


def _classify(error: BaseException) -> redress.ErrorClass:
    listed = isinstance(error, BackendError)
    return redress.ErrorClass.TRANSIENT if listed else redress.ErrorClass.PERMANENT


def with_redress(open_for: float) -> Guard:
    """Use redress, with a retry of one attempt to carry the classifier."""
    policy = redress.AsyncPolicy(
        retry=redress.AsyncRetry(
            classifier=_classify, strategy=redress.decorrelated_jitter(), max_attempts=1
        ),
        circuit_breaker=redress.CircuitBreaker(
            failure_threshold=5,
            recovery_timeout_s=open_for,
            trip_on={redress.ErrorClass.TRANSIENT},
        ),
    )

    def guard(call: Call) -> Call:
        async def guarded() -> object:
            return await policy.call(call)

        return guarded

    return guard


def with_fluxgate(open_for: float) -> Guard:
    """Use fluxgate."""
    return fluxgate.AsyncCircuitBreaker(
        window=fluxgate.windows.CountWindow(100),
        tracker=fluxgate.trackers.TypeOf(BackendError),
        tripper=(fluxgate.trippers.Closed() & fluxgate.trippers.FailureStreak(5))
        | (fluxgate.trippers.HalfOpened() & fluxgate.trippers.FailureStreak(1)),
        retry=fluxgate.retries.Cooldown(open_for),
        # Not the default, which admits random probes.
        permit=fluxgate.permits.All(),
        max_half_open_calls=1,
    )


BREAKERS: dict[str, Callable[[float], Guard]] = {
    "viralfx": ours,
    "viralfx, window": ours_window,
    "aiobreaker": with_aiobreaker,
    "circuitbreaker": with_circuitbreaker,
    "fluxgate": with_fluxgate,
    "hyx": with_hyx,
    "interlock-cb": with_interlock,
    "nopanic": with_nopanic,
    "purgatory": with_purgatory,
    "pybreaker": with_pybreaker,
    "pyresilience": with_pyresilience,
    "redress": with_redress,
}


def redress_retry(delay: float, limit: float | None) -> Guard:
    """Use redress."""
    policy = redress.AsyncRetryPolicy(
        classifier=_classify,
        strategy=lambda _context: delay,
        max_attempts=3,
        deadline_s=limit or 60.0,
    )

    def guard(call: Call) -> Call:
        async def guarded() -> object:
            return await policy.call(call)

        return guarded

    return guard


def tenacity_retry(delay: float, limit: float | None) -> Guard:
    """Use tenacity."""
    stop: Any = tenacity.stop_after_attempt(3)
    if limit is not None:
        stop = stop | tenacity.stop_after_delay(limit)
    return tenacity.retry(
        stop=stop,
        wait=tenacity.wait_fixed(delay),
        retry=tenacity.retry_if_exception_type(BackendError),
        reraise=True,
    )


def pyresilience_retry(delay: float, limit: float | None) -> Guard:
    """Use pyresilience."""
    timeout = pyresilience.TimeoutConfig(seconds=limit) if limit else None
    return pyresilience.resilient(
        retry=pyresilience.RetryConfig(max_attempts=3, delay=delay, jitter=False), timeout=timeout
    )


RETRIES: dict[str, Callable[[float, float | None], Guard]] = {
    "viralfx": lambda delay, limit: retry(3, delay, retry_on=BackendError, deadline=limit),
    "backoff": lambda delay, limit: backoff.on_exception(
        backoff.constant, BackendError, max_tries=3, max_time=limit, interval=delay, jitter=None
    ),
    "hyx": lambda delay, _limit: hyx.retry.retry(on=BackendError, attempts=3, backoff=delay),
    "nopanic": lambda delay, limit: nopanic.retry(
        3, BackendError, nopanic.backoff.fixed(delay), max_time=limit
    ),
    "pyresilience": pyresilience_retry,
    "redress": redress_retry,
    "stamina": lambda delay, limit: stamina.retry(
        on=BackendError,
        attempts=3,
        timeout=limit,
        wait_initial=delay,
        wait_max=delay,
        wait_jitter=0.0,
    ),
    "tenacity": tenacity_retry,
}
UNLIMITED = {"hyx"}
"""Retries without an overall time limit."""
