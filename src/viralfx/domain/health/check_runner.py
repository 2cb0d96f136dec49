"""Checks in each form, and the runner of their attempts: schedule, timeout, one at a time."""

import asyncio
import contextvars
import inspect
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TypeAlias, cast

from viralfx.core.clock import Clock, finished_within, ignore_error, resolved_within
from viralfx.core.correlation import bind_correlation_id, new_correlation_id
from viralfx.core.errors import require_count, require_positive
from viralfx.domain.health.check_state import CheckTracker
from viralfx.domain.health.model import AnyHealthCheck, Observation, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckCompleted:
    """Event: an attempt of a check ended or timed out. ``error`` appears in the log only."""

    check: str
    observation: Observation
    response_time: float
    correlation_id: str
    error: BaseException | None = None


_SHORTEST_WAIT = 0.9
"""Shortest wait between two attempts as a share of the interval."""


class CheckRunner:
    """Repeats for one check: attempt, record, wait.

    An attempt that exceeds its timeout is cancelled and abandoned. Until it has ended, no other
    attempt starts; each turn records a ``timeout`` instead.
    """

    def __init__(
        self,
        check: AnyHealthCheck,
        track: CheckTracker,
        *,
        clock: Clock,
        completed: Callable[[CheckCompleted], None],
        gap: float,
    ) -> None:
        """``gap`` is the minimum number of seconds between an attempt and a forced one."""
        self.track = track
        plain = not inspect.iscoroutinefunction(check.check)
        self._check: Callable[[], object] = (
            InThread(f"health-check-{track.name}", check.check) if plain else check.check
        )
        self._clock = clock
        self._completed = completed
        self._gap = gap
        self._outstanding: asyncio.Task[Observation] | None = None
        self._outstanding_since = 0.0
        self._last_start = float("-inf")
        self._due = float("inf")
        self._requested = False
        self._alarm: asyncio.Future[None] | None = None
        """Ends the pause between two attempts early."""
        # Two lists: an attempt that began before a call to force() does not resolve that call.
        self._waiting: list[asyncio.Future[None]] = []
        self._served: list[asyncio.Future[None]] = []

    async def run(self, rng: random.Random) -> None:
        """Run attempts until cancelled, at most an interval apart; ``rng`` draws the waits.

        The second attempt is at a random moment of the interval, so that instances that start
        together spread over all of it. Each later wait is a little shorter than the interval by a
        random part, so that instances that an event has synchronized drift apart again.
        """
        policy = self.track.policy
        shortest = 0.0
        while True:
            await self._attempt()
            interval = policy.interval if self.track.passing else policy.interval_when_failing
            self._due = self._clock.monotonic() + rng.uniform(shortest, 1.0) * interval
            if self._requested:  # during the attempt
                self._due = min(self._due, self._last_start + policy.interval_when_failing)
            if self._waiting:  # during the attempt
                self._due = min(self._due, self._last_start + self._gap)
            shortest = _SHORTEST_WAIT
            await self._pause()

    async def _pause(self) -> None:
        while (remaining := self._due - self._clock.monotonic()) > 0:
            self._alarm = asyncio.get_running_loop().create_future()
            await resolved_within(self._alarm, remaining, self._clock)

    def _wake(self) -> None:
        if self._alarm is not None and not self._alarm.done():
            self._alarm.set_result(None)

    def request(self) -> None:
        """Run the next attempt as early as ``interval_when_failing`` allows."""
        self._requested = True
        earliest = self._last_start + self.track.policy.interval_when_failing
        self._due = min(self._due, earliest)
        self._wake()

    def force(self) -> asyncio.Future[None]:
        """Run an attempt once the last one has ended and at least ``gap`` seconds after its start.

        The returned future is resolved when an attempt that began after this call is recorded, or
        a turn whose previous attempt still hangs. :meth:`abandon` cancels it.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._due = min(self._due, self._last_start + self._gap)
        self._wake()
        return done

    def abandon(self) -> None:
        """Cancel the attempt in flight and the futures returned by :meth:`force`."""
        if self._outstanding is not None:
            self._outstanding.cancel()
        for waiter in (*self._served, *self._waiting):
            waiter.cancel()
        self._served.clear()
        self._waiting.clear()

    async def _attempt(self) -> None:
        clock, timeout = self._clock, self.track.policy.timeout
        started = clock.monotonic()
        self._assign_waiters()
        if self._outstanding is not None and not await finished_within(
            self._outstanding, timeout, clock
        ):
            stuck_for = clock.monotonic() - self._outstanding_since
            self._record(_timed_out(self.track.name, stuck_for), started, new_correlation_id())
            return
        self._requested = False
        self._assign_waiters()
        started = self._last_start = self._outstanding_since = clock.monotonic()
        correlation_id = new_correlation_id()
        context = contextvars.copy_context()
        context.run(bind_correlation_id, correlation_id)
        task = asyncio.get_running_loop().create_task(
            _observe(self._check), name=f"health-attempt-{self.track.name}", context=context
        )
        task.add_done_callback(self._ended)
        self._outstanding = task
        if await finished_within(task, timeout, clock):
            observation, error = _outcome(self.track.name, task)
            self._record(observation, started, correlation_id, error)
        else:
            task.cancel()
            self._record(_timed_out(self.track.name, timeout), started, correlation_id)

    def _assign_waiters(self) -> None:
        self._served += self._waiting
        self._waiting.clear()

    def _ended(self, task: asyncio.Task[Observation]) -> None:
        # An abandoned attempt may still fail; that is not an uncaught exception of the process.
        ignore_error(task)
        if self._outstanding is task:
            self._outstanding = None

    def _record(
        self,
        observation: Observation,
        started: float,
        correlation_id: str,
        error: BaseException | None = None,
    ) -> None:
        now = self._clock.monotonic()
        self.track.record(
            observation,
            response_time=now - started,
            correlation_id=correlation_id,
            monotonic=now,
            at=self._clock.now(),
        )
        self._completed(
            CheckCompleted(
                check=self.track.name,
                observation=observation,
                response_time=now - started,
                correlation_id=correlation_id,
                error=error,
            )
        )
        served, self._served = self._served, []
        for waiter in served:
            if not waiter.done():
                waiter.set_result(None)


class InThread:
    """Calls a plain function in a thread of its own, and again after the last call has ended.

    Cancelling a call does not end its thread, which the next call waits for. The threads are
    daemons, so a function that never returns does not keep the process from its end.
    """

    def __init__(self, name: str, function: Callable[[], object]) -> None:
        self._name = name
        self._function = function
        self._thread: threading.Thread | None = None
        self._outcome: asyncio.Future[tuple[object, BaseException | None]] | None = None

    async def __call__(self) -> object:
        """Return the function's result; raises its error."""
        loop = asyncio.get_running_loop()
        if self._outcome is not None and self._thread is not None and self._thread.is_alive():
            if self._outcome.get_loop() is not loop:
                raise RuntimeError("the check still runs, since an event loop that has ended")
            await asyncio.shield(self._outcome)
        outcome = self._outcome = loop.create_future()
        context = contextvars.copy_context()

        def run() -> None:
            result, failure = None, None
            try:
                result = context.run(self._function)
            except BaseException as error:  # noqa: BLE001 - any is the outcome of the check
                failure = error
            try:
                loop.call_soon_threadsafe(outcome.set_result, (result, failure))
            except RuntimeError:  # the loop is closed
                return

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()
        result, failure = await asyncio.shield(outcome)
        if failure is None:
            # A plain function may return a coroutine; that belongs to the loop.
            return await result if inspect.isawaitable(result) else result
        if isinstance(failure, Exception):
            raise failure
        raise RuntimeError(f"a check raised {type(failure).__name__}") from failure


async def _observe(check: Callable[[], object]) -> Observation:
    try:
        observation = check()
        if inspect.isawaitable(observation):
            observation = await observation
    except (SystemExit, KeyboardInterrupt) as error:
        # The event loop would let these end the process; a check can only fail.
        raise RuntimeError(f"a check raised {type(error).__name__}") from error
    if not isinstance(observation, Observation):
        raise TypeError(f"a check must return an Observation, got {type(observation).__name__}")
    return observation


def _outcome(
    name: str, task: asyncio.Task[Observation]
) -> tuple[Observation, BaseException | None]:
    if task.cancelled():
        message = f"{name} check was cancelled from inside"
        return Observation(status=Status.FAIL, message=message, code="cancelled"), None
    if (error := task.exception()) is not None:
        message = f"{name} check failed"
        return Observation(status=Status.FAIL, message=message, code="error"), error
    observation = task.result()
    return observation, observation.error


def _timed_out(name: str, seconds: float) -> Observation:
    message = f"{name} check has not answered for {seconds:.1f} s"
    return Observation(status=Status.FAIL, message=message, code="timeout")


# -- the checks of an application ----------------------------------------------------------------


CheckFunction: TypeAlias = Callable[
    [], Observation | bool | Awaitable[Observation | bool | None] | None
]
"""A check without a class. It returns an :class:`Observation`, or None or True for ``pass`` and
False for ``fail``; an exception is a ``fail``, too. A plain function runs in a thread."""


@dataclass(frozen=True, slots=True)
class CheckConfig:
    """A check with limits of its own, in place of those of the settings. Durations are seconds."""

    check: AnyHealthCheck | CheckFunction
    _: KW_ONLY
    interval: float | None = None
    """From the end of one attempt to the start of the next; None: HEALTH_CHECK_INTERVAL. While the
    check does not pass, HEALTH_CHECK_INTERVAL shortens a longer one."""
    timeout: float | None = None
    """Limit of one attempt; None: HEALTH_CHECK_TIMEOUT."""
    failure_threshold: int | None = None
    """Number of consecutive worse results that make the status worse; None:
    HEALTH_FAILURE_THRESHOLD."""
    recovery_threshold: int | None = None
    """Number of consecutive better results that make it better; None:
    HEALTH_RECOVERY_THRESHOLD."""
    shared: bool = False
    """True if all instances lose the dependency together: READINESS_FAIL_OPEN_AFTER then applies
    to it."""
    required: bool = False
    """True if the instance is not ready while the check fails, as with its name in
    READINESS_REQUIRES. A warning does not count."""

    def problems(self) -> Iterator[str]:
        """Yield the limits that no check can have."""
        for name in ("interval", "timeout", "failure_threshold", "recovery_threshold"):
            value: object = getattr(self, name)
            require = require_positive if name in {"interval", "timeout"} else require_count
            try:
                if value is not None:
                    require(name, value)
            except (TypeError, ValueError) as error:
                yield str(error)


AnyCheck: TypeAlias = AnyHealthCheck | CheckFunction | CheckConfig
"""A check in each form that ``OperationsConfig(checks=...)`` takes."""


class FunctionCheck:
    """The check that a function is."""

    def __init__(self, name: str, function: CheckFunction) -> None:
        self._name = name
        self._call: Callable[[], object] = (
            function
            if inspect.iscoroutinefunction(function)
            else InThread(f"health-check-{name}", function)
        )

    async def check(self) -> Observation:
        """Call the function; a ``TypeError`` if it returns anything else than a result."""
        result = self._call()
        if inspect.isawaitable(result):
            result = await result
        if isinstance(result, Observation):
            return result
        if result is None or result is True:
            return Observation(status=Status.PASS, message=f"{self._name} works")
        if result is False:
            message = f"{self._name} does not work"
            return Observation(status=Status.FAIL, message=message, code="failed")
        kind = type(result).__name__
        raise TypeError(f"a check must return an Observation, a bool or None, got {kind}")


def prepare_checks(
    given: Mapping[str, AnyCheck],
) -> tuple[dict[str, tuple[AnyHealthCheck, CheckConfig]], list[str]]:
    """Return each check with its limits, and the problems of those that cannot be checks."""
    ready: dict[str, tuple[AnyHealthCheck, CheckConfig]] = {}
    problems: list[str] = []
    for name, value in given.items():
        config = value if isinstance(value, CheckConfig) else CheckConfig(value)
        found = [*_faults(config.check), *config.problems()]
        problems += [f"OperationsConfig.checks: {name!r}: {fault}" for fault in found]
        if found:
            continue
        if hasattr(config.check, "check"):
            ready[name] = (cast("AnyHealthCheck", config.check), config)
        else:
            ready[name] = (FunctionCheck(name, config.check), config)
    return ready, problems


def _faults(check: object) -> Iterator[str]:
    """Yield the reasons why a value is no check; all of them would fail each attempt."""
    if isinstance(check, type):
        yield f"{check.__name__} is a class; pass an instance, such as {check.__name__}()"
        return
    if getattr(check, "__name__", "") == "<lambda>":
        yield "a lambda has no name for log lines; pass a function made with def"
        return
    method = getattr(check, "check", check)
    if isinstance(check, CheckConfig) or not callable(method):
        kind = type(check).__name__
        yield f"{kind} has no method check; pass an object that has one, or a function"
        return
    if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
        yield "it yields; return the result instead"
        return
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # a builtin does not describe its arguments
        return
    try:
        signature.bind()
    except TypeError as error:
        yield f"it is called without arguments, and has a {error}"
