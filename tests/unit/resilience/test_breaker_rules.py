"""The rules of docs/resilience-rules.md for the circuit breaker, with at least one test each."""

import asyncio

import pytest
from tests.manual_clock import ManualClock
from tests.unit.resilience.scripted import BackendError, Gate, Scripted, settle, state_of

from viralfx.resilience.breaker import (
    CallRejected,
    CircuitBreaker,
    CircuitEvent,
    CircuitOpenError,
    StateChanged,
)
from viralfx.resilience.breaker_states import CircuitState


class UnlistedError(Exception):
    """An error outside ``failure_on``."""


@pytest.fixture
def clock() -> ManualClock:
    """Return a clock that stands still."""
    return ManualClock(monotonic=7.0)


@pytest.fixture
def breaker(clock: ManualClock) -> CircuitBreaker:
    """Return a breaker that counts backend errors only, with the numbers of docs/operations.md."""
    return CircuitBreaker(5, 60.0, name="backend", failure_on=BackendError, clock=clock)


async def fail(breaker: CircuitBreaker, times: int) -> None:
    """Make this many calls fail."""
    for _ in range(times):
        with pytest.raises(BackendError):
            await breaker.execute(Scripted(BackendError("down")))


async def half_opened(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """Bring the breaker to the state in which the next call is a probe."""
    await fail(breaker, 5)
    await clock.advance(60.0)


async def cancelled(task: "asyncio.Task[object]") -> None:
    """Cancel a task and check that it ends as cancelled."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_rule_01_a_cancelled_call_does_not_change_the_count(
    breaker: CircuitBreaker,
) -> None:
    """B1: three failures and a cancellation are three failures."""
    await fail(breaker, 3)
    task = asyncio.create_task(breaker.execute(Gate()))
    await settle()
    await cancelled(task)
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 3}


async def test_rule_01_a_cancelled_probe_is_neutral(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """B2: it neither closes nor opens, and the next call may probe."""
    await half_opened(breaker, clock)
    task = asyncio.create_task(breaker.execute(Gate()))
    await settle()
    await cancelled(task)
    assert state_of(breaker) == "HALF_OPEN"
    assert await breaker.execute(Scripted("fine")) == "fine"
    assert state_of(breaker) == "CLOSED"


async def test_rule_01_a_base_exception_is_neutral_too(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """KeyboardInterrupt in a plain function says nothing about the dependency."""
    await half_opened(breaker, clock)
    with pytest.raises(KeyboardInterrupt), breaker.guard():
        raise KeyboardInterrupt
    with breaker.guard():
        pass
    assert state_of(breaker) == "CLOSED"


async def test_rule_02_one_of_fifty_concurrent_calls_is_the_probe(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """B3: after the open period one call reaches the backend, the others are rejected."""
    await half_opened(breaker, clock)
    gate = Gate()
    tasks = [asyncio.create_task(breaker.execute(gate)) for _ in range(50)]
    await settle()
    assert len(gate.calls) == 1
    gate.calls[0].set_result("fine")
    done, _ = await asyncio.wait(tasks)
    rejected = [task for task in done if isinstance(task.exception(), CircuitOpenError)]
    assert len(rejected) == 49
    assert state_of(breaker) == "CLOSED"


async def test_rule_02_as_many_probes_as_configured_and_as_many_successes(
    clock: ManualClock,
) -> None:
    """With three permits, three calls probe and the third success closes."""
    breaker = CircuitBreaker(1, 60.0, half_open_max_calls=3, clock=clock)
    await fail(breaker, 1)
    await clock.advance(60.0)
    gate = Gate()
    tasks = [asyncio.create_task(breaker.execute(gate)) for _ in range(5)]
    await settle()
    assert len(gate.calls) == 3
    for probe, state in zip(gate.calls, ("HALF_OPEN", "HALF_OPEN", "CLOSED"), strict=True):
        probe.set_result(None)
        await settle()
        assert state_of(breaker) == state
    await asyncio.wait(tasks)
    assert sum(isinstance(task.exception(), CircuitOpenError) for task in tasks) == 2


async def test_rule_02_a_success_uses_up_its_permit(clock: ManualClock) -> None:
    """With two permits, one success and one running probe leave none."""
    breaker = CircuitBreaker(1, 60.0, half_open_max_calls=2, clock=clock)
    await fail(breaker, 1)
    await clock.advance(60.0)
    await breaker.execute(Scripted(None))
    gate = Gate()
    task = asyncio.create_task(breaker.execute(gate))
    await settle()
    with pytest.raises(CircuitOpenError):
        await breaker.execute(Scripted(None))
    gate.calls[0].set_result(None)
    await task
    assert state_of(breaker) == "CLOSED"


async def test_rule_02_a_released_permit_is_free_in_the_same_turn(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """A neutral probe releases its permit before another task runs."""
    await half_opened(breaker, clock)
    with pytest.raises(UnlistedError):
        await breaker.execute(Scripted(UnlistedError()))
    assert state_of(breaker) == "HALF_OPEN"
    await breaker.execute(Scripted(None))
    assert state_of(breaker) == "CLOSED"


async def test_rule_03_a_success_from_before_the_trip_does_not_close(
    breaker: CircuitBreaker,
) -> None:
    """B5: an outcome of an older state changes nothing."""
    gate = Gate()
    early = asyncio.create_task(breaker.execute(gate))
    await settle()
    await fail(breaker, 5)
    gate.calls[0].set_result("late")
    assert await early == "late"
    assert breaker.get_state() == {"state": "OPEN", "failureCount": 5}


async def test_rule_03_late_failures_do_not_extend_the_open_period(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """B7: the period counts from the trip."""
    gate = Gate()
    early = [asyncio.create_task(breaker.execute(gate)) for _ in range(10)]
    await settle()
    await fail(breaker, 5)
    await clock.advance(59.0)
    for call in gate.calls:
        call.set_exception(BackendError("late"))
    await asyncio.wait(early)
    assert all(isinstance(task.exception(), BackendError) for task in early)
    assert breaker.get_state() == {"state": "OPEN", "failureCount": 5}
    await clock.advance(1.0)
    await breaker.execute(Scripted(None))
    assert state_of(breaker) == "CLOSED"


async def test_rule_03_a_failure_from_an_earlier_closed_period_is_not_counted(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """Each closed period is a generation of its own."""
    gate = Gate()
    early = asyncio.create_task(breaker.execute(gate))
    await settle()
    await half_opened(breaker, clock)
    await breaker.execute(Scripted(None))
    gate.calls[0].set_exception(BackendError("late"))
    with pytest.raises(BackendError):
        await early
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}


async def test_rule_03_a_success_from_an_earlier_closed_period_resets_nothing(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """Counts belong to the current period."""
    gate = Gate()
    early = asyncio.create_task(breaker.execute(gate))
    await settle()
    await half_opened(breaker, clock)
    await breaker.execute(Scripted(None))
    await fail(breaker, 2)
    gate.calls[0].set_result("late")
    await early
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 2}


async def test_rule_04_a_hanging_probe_loses_its_permit_after_the_lease(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """B8: the next call probes, and the outcome of the hanging one does not count."""
    await half_opened(breaker, clock)
    gate = Gate()
    hung = asyncio.create_task(breaker.execute(gate))
    await settle()
    await clock.advance(9.999)
    with pytest.raises(CircuitOpenError):
        await breaker.execute(Scripted(None))
    await clock.advance(0.001)
    second = asyncio.create_task(breaker.execute(gate))
    await settle()
    assert len(gate.calls) == 2
    gate.calls[0].set_exception(BackendError("at last"))
    with pytest.raises(BackendError):
        await hung
    assert state_of(breaker) == "HALF_OPEN"
    gate.calls[1].set_result(None)
    await second
    assert state_of(breaker) == "CLOSED"


async def test_rule_04_a_stale_probe_does_not_return_the_permit_of_another(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """Cancelling the hanging probe does not free the permit of the next one."""
    await half_opened(breaker, clock)
    gate = Gate()
    hung = asyncio.create_task(breaker.execute(gate))
    await settle()
    await clock.advance(10.0)
    second = asyncio.create_task(breaker.execute(gate))
    await settle()
    await cancelled(hung)
    with pytest.raises(CircuitOpenError):
        await breaker.execute(Scripted(None))
    gate.calls[1].set_result(None)
    await second


async def test_rule_04_a_slow_probe_counts_until_its_permit_is_reissued(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """A dependency slower than the lease can still close its circuit."""
    await half_opened(breaker, clock)
    gate = Gate()
    slow = asyncio.create_task(breaker.execute(gate))
    await settle()
    await clock.advance(11.0)
    gate.calls[0].set_result(None)
    await slow
    assert state_of(breaker) == "CLOSED"


async def test_rule_04_retry_after_is_the_rest_of_the_lease(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """While a probe is running."""
    await half_opened(breaker, clock)
    hung = asyncio.create_task(breaker.execute(Gate()))
    await settle()
    await clock.advance(4.0)
    with pytest.raises(CircuitOpenError) as rejected:
        await breaker.execute(Scripted(None))
    assert rejected.value.retry_after == pytest.approx(6.0)
    await cancelled(hung)


async def test_rule_05_the_tripping_caller_sees_the_original_error(
    breaker: CircuitBreaker,
) -> None:
    """B4: the same object, without a wrapper or a context."""
    await fail(breaker, 4)
    original = BackendError("the fifth")
    with pytest.raises(BackendError) as caught:
        await breaker.execute(Scripted(original))
    assert caught.value is original
    assert caught.value.__context__ is None
    assert state_of(breaker) == "OPEN"


async def test_rule_05_only_a_rejected_caller_sees_circuit_open_error(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """It has the operation, the circuit and the remaining time."""
    await fail(breaker, 5)
    await clock.advance(18.0)
    operation = Scripted(None)
    with pytest.raises(CircuitOpenError) as rejected:
        await breaker.execute(operation, "ExternalService.getData")
    assert operation.calls == 0
    assert rejected.value.retry_after == pytest.approx(42.0)
    assert str(rejected.value) == (
        "ExternalService.getData rejected: circuit backend is open, next try in 42.0 s"
    )


async def test_rule_06_an_unlisted_error_is_neutral(breaker: CircuitBreaker) -> None:
    """B6: it neither counts nor resets the count."""
    await fail(breaker, 4)
    with pytest.raises(UnlistedError):
        await breaker.execute(Scripted(UnlistedError()))
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 4}
    await fail(breaker, 1)
    assert state_of(breaker) == "OPEN"


async def test_rule_06_a_success_resets_the_count(breaker: CircuitBreaker) -> None:
    """Only consecutive failures count."""
    await fail(breaker, 4)
    await breaker.execute(Scripted(None))
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}


async def test_rule_06_the_rejection_of_another_guard_is_neutral(clock: ManualClock) -> None:
    """By default every error counts except rejections."""
    inner = CircuitBreaker(1, clock=clock)
    outer = CircuitBreaker(1, clock=clock)
    inner.open()
    with pytest.raises(CircuitOpenError):
        await outer.execute(lambda: inner.execute(Scripted(None)))
    assert outer.get_state() == {"state": "CLOSED", "failureCount": 0}


async def test_rule_07_the_open_period_is_measured_by_the_given_clock(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """OPEN until it ends, then a probe; reading the state does not start it."""
    await fail(breaker, 5)
    await clock.advance(59.999)
    assert state_of(breaker) == "OPEN"
    with pytest.raises(CircuitOpenError):
        await breaker.execute(Scripted(None))
    await clock.advance(0.001)
    assert state_of(breaker) == "HALF_OPEN"
    assert breaker.get_state() == {"state": "HALF_OPEN", "failureCount": 5}
    with pytest.raises(BackendError):
        await breaker.execute(Scripted(BackendError()))
    assert state_of(breaker) == "OPEN"
    await clock.advance(59.999)
    assert state_of(breaker) == "OPEN"


async def test_rule_08_overlapping_blocks_keep_their_own_tokens(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """Each guard has the outcome of its own block."""
    early, failing = breaker.guard(), BackendError()
    with early:
        await fail(breaker, 5)
        await clock.advance(60.0)
        with pytest.raises(BackendError), breaker.guard():
            raise failing
    assert state_of(breaker) == "OPEN"


async def test_rule_14_execute_rejects_a_coroutine_object(breaker: CircuitBreaker) -> None:
    """The coroutine is closed, so there is no 'never awaited' warning."""
    with pytest.raises(TypeError, match="pass the function that makes it"):
        await breaker.execute(Scripted(None)())  # type: ignore[call-overload]  # the point
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}


async def test_rule_14_execute_accepts_plain_functions(breaker: CircuitBreaker) -> None:
    """A result that is not awaitable is returned."""
    assert await breaker.execute(lambda: 42) == 42


def test_rule_14_a_decorated_plain_function_is_guarded(clock: ManualClock) -> None:
    """``def`` like ``async def``: counted, opened, rejected."""
    breaker = CircuitBreaker(2, clock=clock)
    operation = Scripted(1, BackendError(), BackendError(), 1)
    guarded = breaker(operation.sync)
    assert guarded() == 1
    for _ in range(2):
        with pytest.raises(BackendError):
            guarded()
    with pytest.raises(CircuitOpenError, match=r"Scripted\.sync rejected"):
        guarded()
    assert operation.calls == 3


async def test_rule_14_a_decorated_coroutine_function_is_guarded(clock: ManualClock) -> None:
    """Arguments, results and every state pass through the decorator."""
    breaker = CircuitBreaker(1, 60.0, name="backend", clock=clock)
    gate = Gate()

    @breaker
    async def call(outcome: object) -> object:
        if isinstance(outcome, Exception):
            raise outcome
        return await gate() if outcome is gate else outcome

    assert await call("fine") == "fine"
    with pytest.raises(BackendError):
        await call(BackendError())
    with pytest.raises(CircuitOpenError, match="call rejected"):
        await call("fine")
    await clock.advance(60.0)
    probe = asyncio.create_task(call(gate))
    await settle()
    await cancelled(probe)
    assert state_of(breaker) == "HALF_OPEN"
    assert await call("fine") == "fine"
    assert state_of(breaker) == "CLOSED"


async def test_rule_15_listeners_get_every_change_and_rejection(clock: ManualClock) -> None:
    """Frozen events, in order; none for successful calls."""
    events: list[CircuitEvent] = []
    breaker = CircuitBreaker(1, 60.0, name="backend", listeners=(events.append,), clock=clock)
    await breaker.execute(Scripted(None))
    assert events == []
    await fail(breaker, 1)
    with pytest.raises(CircuitOpenError):
        await breaker.execute(Scripted(None), "op")
    await clock.advance(60.0)
    await breaker.execute(Scripted(None))
    closed, opened, half = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
    assert events == [
        StateChanged(name="backend", old=closed, new=opened, failure_count=1),
        CallRejected(name="backend", operation="op", retry_after=60.0),
        StateChanged(name="backend", old=opened, new=half, failure_count=1),
        StateChanged(name="backend", old=half, new=closed, failure_count=0),
    ]


async def test_rule_15_a_listener_may_fail_or_call_the_breaker(
    breaker: CircuitBreaker, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error is logged; no lock is held while it runs."""

    def careless(_: CircuitEvent) -> None:
        breaker.reset()
        raise ValueError("careless listener")

    breaker.subscribe(careless)
    await fail(breaker, 5)
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}
    assert "Event listener failed" in caplog.text
