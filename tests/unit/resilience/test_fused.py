"""Retry over breaker in one wrapper: it behaves like the two wrappers that it replaces."""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.manual_clock import ManualClock
from tests.unit.resilience.scripted import BackendError, Scripted, settle

from viralfx.resilience.breaker import BreakerWrapper, CircuitBreaker
from viralfx.resilience.breaker_states import RollingWindow
from viralfx.resilience.policy import Backoff, Jitter, RetryBudget
from viralfx.resilience.retry import retry

Call = Callable[..., Awaitable[object]]


class UnlistedError(Exception):
    """Neutral for the breaker, and retried."""


class PermanentError(BackendError):
    """Counts for the breaker, and is not retried."""


class LostReplyError(BackendError):
    """Retried only if the call is declared idempotent."""

    maybe_applied = True


ENDINGS: dict[str, Callable[[], object]] = {
    "success": lambda: "done",
    "failure": BackendError,
    "unlisted": UnlistedError,
    "permanent": PermanentError,
    "lost reply": LostReplyError,
    "cancelled": asyncio.CancelledError,
}


@dataclass(frozen=True)
class Setup:
    """The arguments of both compositions."""

    threshold: int
    permits: int
    window: RollingWindow | None
    budget: bool
    deadline: float | None
    retry_open_circuit: bool
    listening: bool


setups = st.builds(
    Setup,
    threshold=st.integers(1, 3),
    permits=st.integers(1, 2),
    window=st.sampled_from(
        [
            None,
            None,
            RollingWindow(seconds=5.0, minimum_calls=3),
            RollingWindow(seconds=5.0, minimum_calls=3, slow_after=1.0, slow_rate=0.5),
        ]
    ),
    budget=st.booleans(),
    deadline=st.sampled_from([None, None, 60.0]),
    retry_open_circuit=st.booleans(),
    listening=st.booleans(),
)
calls = st.integers(0, 5)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.booleans()),
        st.tuples(st.just("whole call"), st.sampled_from(list(ENDINGS))),
        st.tuples(st.just("end"), calls, st.sampled_from(list(ENDINGS))),
        st.tuples(st.just("cancel"), calls),
        st.tuples(st.just("pass"), st.sampled_from([0.4, 1.0, 2.5, 6.0])),
        st.tuples(st.sampled_from(["open", "close"])),
    ),
    min_size=10,
    max_size=60,
)


class World:
    """One composition with its collaborators, and all that can be observed of it."""

    def __init__(self, setup: Setup, compose: Callable[[Any, CircuitBreaker, Call], Call]) -> None:
        self.clock = ManualClock()
        self.events: list[object] = []
        self.operations: list[asyncio.Future[object]] = []
        self.arguments: list[object] = []
        self.tasks: list[asyncio.Task[object]] = []
        listeners = (self.events.append,) if setup.listening else ()
        self.breaker = CircuitBreaker(
            setup.threshold,
            5.0,
            name="backend",
            probe_lease=4.0,
            half_open_max_calls=setup.permits,
            window=setup.window,
            failure_on=BackendError,
            listeners=(self.events.append,),
            clock=self.clock,
        )
        retrier = retry(
            3,
            backoff=Backoff(base=1.0, cap=8.0, jitter=Jitter.NONE),
            retry_on=lambda error: not isinstance(error, PermanentError),
            deadline=setup.deadline,
            retry_open_circuit=setup.retry_open_circuit,
            budget=RetryBudget(ratio=0.5) if setup.budget else None,
            listeners=listeners,
            clock=self.clock,
        )

        async def operation(number: int, *, keyword: str = "none") -> object:
            self.arguments.append((number, keyword))
            ended: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            self.operations.append(ended)
            return await ended

        self.call = compose(retrier, self.breaker, operation)

    async def act(self, action: tuple[Any, ...]) -> None:
        """Make one call."""
        match action:
            case ("call", keyword):
                options = {"keyword": "given"} if keyword else {}
                coroutine: Any = self.call(len(self.tasks), **options)
                self.tasks.append(asyncio.create_task(coroutine))
            case ("whole call", ending):
                before = len(self.operations)
                await self.act(("call", False))
                if len(self.operations) > before:
                    self._end(-1, ending)
            case ("end", which, ending):
                self._end(which, ending)
            case ("cancel", which):
                pending = [task for task in self.tasks if not task.done()]
                if pending:
                    pending[which % len(pending)].cancel()
            case ("pass", seconds):
                await self.clock.advance(seconds)
            case (command,):
                getattr(self.breaker, command)()
        await self.clock.settle()

    def _end(self, which: int, ending: str) -> None:
        under_way = [each for each in self.operations if not each.done()]
        if not under_way:
            return
        ended, outcome = under_way[which % len(under_way)], ENDINGS[ending]()
        if isinstance(outcome, BaseException):
            ended.set_exception(outcome)
        else:
            ended.set_result(outcome)

    def seen(self) -> dict[str, object]:
        """Return all that can be observed, in a comparable form."""
        return {
            "state": self.breaker.get_state(),
            "snapshot": self.breaker.snapshot(),
            "arguments": self.arguments,
            "under way": [each.done() for each in self.operations],
            "outcomes": [_outcome(task) for task in self.tasks],
            "events": [_shown(event) for event in self.events],
            "sleeping": self.clock.sleeping,
        }

    async def end(self) -> None:
        """End all calls."""
        for task in self.tasks:
            task.cancel()
        await settle()


def _outcome(task: asyncio.Task[object]) -> object:
    if not task.done() or task.cancelled():
        return "under way" if not task.done() else "cancelled"
    error = task.exception()
    return task.result() if error is None else _error(error)


def _error(error: BaseException) -> object:
    chained = error.__context__ is not None, error.__cause__ is not None
    return type(error), error.args, getattr(error, "__notes__", []), chained


def _shown(event: Any) -> object:
    fields = {name: getattr(event, name) for name in event.__dataclass_fields__}
    if "error" in fields:
        fields["error"] = _error(fields["error"])
    return type(event), fields


def fused(retrier: Any, breaker: CircuitBreaker, operation: Call) -> Call:
    """Decorate as an application does."""
    return retrier(breaker(operation))  # type: ignore[no-any-return]  # as it was


def apart(retrier: Any, breaker: CircuitBreaker, operation: Call) -> Call:
    """Decorate with a function in between, which keeps the two wrappers separate."""
    guarded = breaker(operation)

    @functools.wraps(guarded)
    async def between(*args: object, **kwargs: object) -> object:
        return await guarded(*args, **kwargs)

    return retrier(between)  # type: ignore[no-any-return]


@given(setups, actions)
def test_both_compositions_do_the_same(setup: Setup, actions: list[tuple[Any, ...]]) -> None:
    """Results, errors, notes, events, counts and states, with overlapping calls."""

    async def compare() -> None:
        one, two = World(setup, fused), World(setup, apart)
        for action in actions:
            await one.act(action)
            await two.act(action)

            assert one.seen() == two.seen()
        await one.end()
        await two.end()

        assert one.seen() == two.seen()

    asyncio.run(compare())


async def test_a_success_clears_the_failures_before_it() -> None:
    """The fused wrapper itself counts a first attempt."""
    breaker, operation = CircuitBreaker(3), Scripted(PermanentError(), "done")

    @retry(retry_on=UnlistedError)
    @breaker
    async def call() -> object:
        return await operation()

    with pytest.raises(PermanentError):
        await call()
    assert breaker.get_state()["failureCount"] == 1
    assert await call() == "done"
    assert breaker.get_state()["failureCount"] == 0


async def test_a_cancelled_probe_releases_its_permit() -> None:
    """The next call is the probe, without waiting for the lease."""
    clock = ManualClock()
    breaker = CircuitBreaker(1, 5.0, probe_lease=60.0, clock=clock)
    operation = Scripted(PermanentError(), asyncio.CancelledError(), "done")

    @retry(retry_on=UnlistedError, clock=clock)
    @breaker
    async def call() -> object:
        return await operation()

    with pytest.raises(PermanentError):
        await call()
    await clock.advance(5.0)
    with pytest.raises(asyncio.CancelledError):
        await call()

    assert await call() == "done"


def frames(error: BaseException) -> list[str]:
    """Return the functions that an error passed through, the operation's last."""
    names, traceback = [], error.__traceback__
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return names


async def test_the_compared_wrappers_are_different() -> None:
    """Otherwise the comparison would prove nothing."""
    error = BackendError()
    depths = []
    for compose in (fused, apart):
        operation = Scripted(error)

        async def call(operation: Scripted = operation) -> object:
            return await operation()

        error.__traceback__ = None
        with pytest.raises(BackendError) as caught:
            await compose(retry(attempts=1), CircuitBreaker(), call)()
        depths.append(frames(caught.value).count("guarded"))

    # One entry for each failure, and one for the retrier that raises the error again.
    assert depths == [2, 3]


async def test_the_wrapper_looks_like_the_function() -> None:
    """It keeps name, documentation, signature and kind, and the chain of wrapped functions."""

    async def fetch(user: str, *, active: bool = True) -> str:
        """Fetch a user."""
        return f"{user} {active}"

    broken: Any = CircuitBreaker()(fetch)
    guarded: Any = retry()(broken)

    assert (guarded.__name__, guarded.__doc__) == ("fetch", "Fetch a user.")
    assert inspect.signature(guarded) == inspect.signature(fetch)
    assert inspect.iscoroutinefunction(guarded)
    assert guarded.__wrapped__ is broken
    assert guarded.__wrapped__.__wrapped__ is fetch
    assert await guarded("ada", active=False) == "ada False"


async def test_methods_are_guarded_together() -> None:
    """Each instance is the first argument; the breaker belongs to the class."""
    breaker = CircuitBreaker(2)

    class Service:
        def __init__(self, *outcomes: object) -> None:
            self.script = Scripted(*outcomes)

        @retry(attempts=2, base_delay=0.0)
        @breaker
        async def fetch(self, key: str) -> object:
            return key, await self.script()

    assert await Service("one").fetch("a") == ("a", "one")
    with pytest.raises(BackendError):
        await Service(BackendError()).fetch("b")
    assert breaker.get_state() == {"state": "OPEN", "failureCount": 2}


def test_only_the_breaker_wrapper_itself_is_fused() -> None:
    """A function around it, and any other function, is called unchanged."""

    async def call() -> None:
        """Do nothing."""

    def plain() -> None:
        """Do nothing either."""

    breaker = CircuitBreaker()
    guarded = breaker(call)

    @functools.wraps(guarded)
    async def outer() -> None:
        await guarded()

    parts = BreakerWrapper.of(guarded)

    assert parts is not None
    assert (parts.wrapper, parts.breaker, parts.function) == (guarded, breaker, call)
    assert [
        BreakerWrapper.of(each) for each in (outer, call, breaker(plain), retry()(guarded))
    ] == [None] * 4
