"""The rules of the field notes that bind the circuit breaker, one test or more for each."""

import asyncio

import pytest
from tests.manual_clock import ManualClock
from tests.unit.resilience.scripted import BackendError, Gate, Scripted, settle, state_of

from viralfx.domain.resilience.breaker import CircuitBreaker
from viralfx.domain.resilience.circuit import (
    CallRejected,
    CircuitEvent,
    CircuitOpenError,
    StateChanged,
)
from viralfx.domain.resilience.circuit_states import CircuitState


class UnlistedError(Exception):
    """Not among the errors that count."""


@pytest.fixture
def clock() -> ManualClock:
    """Time that stands still."""
    return ManualClock(monotonic=7.0)


@pytest.fixture
def breaker(clock: ManualClock) -> CircuitBreaker:
    """Count backend errors only, with the guide's numbers."""
    return CircuitBreaker(5, 60.0, name="backend", failure_on=BackendError, clock=clock)


async def fail(breaker: CircuitBreaker, times: int) -> None:
    """Let that many calls fail."""
    for _ in range(times):
        with pytest.raises(BackendError):
            await breaker.execute(Scripted(BackendError("down")))


async def half_opened(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """Bring the breaker to where the next call is a probe."""
    await fail(breaker, 5)
    await clock.advance(60.0)


async def cancelled(task: "asyncio.Task[object]") -> None:
    """Cancel a task and see it end so."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_rule_01_a_cancelled_call_leaves_the_streak_as_it_was(
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
    """KeyboardInterrupt in a plain function is no evidence about the dependency."""
    await half_opened(breaker, clock)
    with pytest.raises(KeyboardInterrupt), breaker.guard():
        raise KeyboardInterrupt
    with breaker.guard():
        pass
    assert state_of(breaker) == "CLOSED"


async def test_rule_02_one_of_fifty_concurrent_calls_is_the_probe(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """B3: after the open period one call reaches the backend, the rest are rejected."""
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
    """One success and one probe under way are all that two permits allow."""
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


async def test_rule_02_a_permit_returned_in_the_same_turn_is_free(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """A probe that ends neutrally gives its permit back before anybody else runs."""
    await half_opened(breaker, clock)
    with pytest.raises(UnlistedError):
        await breaker.execute(Scripted(UnlistedError()))
    assert state_of(breaker) == "HALF_OPEN"
    await breaker.execute(Scripted(None))
    assert state_of(breaker) == "CLOSED"


async def test_rule_03_a_success_from_before_the_trip_does_not_close(
    breaker: CircuitBreaker,
) -> None:
    """B5: what began in an older state changes nothing."""
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
    """Closed again is another generation than closed before."""
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
    """The streak of the present is not that of the past."""
    gate = Gate()
    early = asyncio.create_task(breaker.execute(gate))
    await settle()
    await half_opened(breaker, clock)
    await breaker.execute(Scripted(None))
    await fail(breaker, 2)
    gate.calls[0].set_result("late")
    await early
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 2}


async def test_rule_04_a_hung_probe_loses_its_permit_after_the_lease(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """B8: the next call probes, and the hung one's outcome is stale."""
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
    """Cancelling the hung probe frees nothing: its permit is somebody else's now."""
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


async def test_rule_04_a_slow_probe_counts_while_nobody_took_its_permit(
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


async def test_rule_04_a_rejected_caller_is_told_when_the_lease_ends(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """While a probe is under way, ``retry_after`` is what is left of its lease."""
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
    """B4: the very object, without a wrapper or a context."""
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
    """It says what was rejected, by which circuit and for how long."""
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
    """Consecutive is not cumulative."""
    await fail(breaker, 4)
    await breaker.execute(Scripted(None))
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}


async def test_rule_06_the_rejection_of_another_guard_is_neutral(clock: ManualClock) -> None:
    """By default everything counts but calls that were never made."""
    inner = CircuitBreaker(1, clock=clock)
    outer = CircuitBreaker(1, clock=clock)
    inner.open()
    with pytest.raises(CircuitOpenError):
        await outer.execute(lambda: inner.execute(Scripted(None)))
    assert outer.get_state() == {"state": "CLOSED", "failureCount": 0}


async def test_rule_07_the_open_period_is_measured_by_the_given_clock(
    breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """OPEN up to the last moment, a probe from then on; reading does not begin it."""
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
    """One guard per block: the outcome of one is not taken for that of another."""
    early, failing = breaker.guard(), BackendError()
    with early:
        await fail(breaker, 5)
        await clock.advance(60.0)
        with pytest.raises(BackendError), breaker.guard():
            raise failing
    assert state_of(breaker) == "OPEN"


async def test_rule_14_execute_refuses_a_coroutine_object(breaker: CircuitBreaker) -> None:
    """It would be made before the rejection; the refusal leaves no 'never awaited' behind."""
    with pytest.raises(TypeError, match="pass the function that makes it"):
        await breaker.execute(Scripted(None)())  # type: ignore[call-overload]  # the point
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}


async def test_rule_14_execute_serves_plain_functions(breaker: CircuitBreaker) -> None:
    """What is not awaitable is the result."""
    assert await breaker.execute(lambda: 42) == 42


def test_rule_14_a_decorated_plain_function_is_guarded(clock: ManualClock) -> None:
    """``def`` as ``async def``: counted, tripped, rejected."""
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
    """Frozen events, in order, and none on the happy path."""
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


async def test_rule_15_a_listener_that_fails_or_calls_back_harms_nobody(
    breaker: CircuitBreaker, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error is logged; and no lock is held while it runs."""

    def careless(_: CircuitEvent) -> None:
        breaker.reset()
        raise ValueError("careless listener")

    breaker.subscribe(careless)
    await fail(breaker, 5)
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}
    assert "Event listener failed" in caplog.text
