"""A circuit breaker shared by threads."""

import threading

import pytest
from tests.unit.resilience.scripted import BackendError, SkippingClock, state_of

from viralfx.resilience.breaker import CircuitBreaker, CircuitOpenError


def test_threads_share_a_breaker() -> None:
    """Of many threads that meet a half-open circuit, one probes; no failure is lost."""
    clock = SkippingClock()
    breaker = CircuitBreaker(8, 60.0, clock=clock)
    start, entered, leave = threading.Barrier(8), list[int](), threading.Event()

    def fail() -> None:
        start.wait()
        with pytest.raises(BackendError), breaker.guard():
            raise BackendError

    def probe(number: int) -> None:
        start.wait()
        try:
            with breaker.guard():
                entered.append(number)
                leave.wait(5)
        except CircuitOpenError:
            rejected.release()

    rejected = threading.Semaphore(0)
    for target in ([fail] * 8, [lambda n=n: probe(n) for n in range(8)]):
        threads = [threading.Thread(target=run) for run in target]
        for thread in threads:
            thread.start()
        if target[0] is not fail:
            for _ in range(7):
                assert rejected.acquire(timeout=5)
            assert len(entered) == 1
            leave.set()
        for thread in threads:
            thread.join()
        if target[0] is fail:
            assert breaker.get_state() == {"state": "OPEN", "failureCount": 8}
            clock.block(60.0)
    assert state_of(breaker) == "CLOSED"
