"""One check's attempts: started, timed, abandoned when late; never two at once."""

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import dataclass

from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.correlation import bind_correlation_id, new_correlation_id
from viralfx.domain.health import HealthCheck, Observation, Status
from viralfx.domain.tracking import CheckTrack


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckCompleted:
    """Event: one attempt of a check ended, in time or not. ``error`` is for the log only."""

    check: str
    observation: Observation
    response_time: float
    correlation_id: str
    error: BaseException | None = None


class CheckRunner:
    """The life of one check: attempt, record, wait.

    An attempt that is late is cancelled and left behind. Until it has ended, none other is
    started and each turn records a ``timeout`` instead.
    """

    def __init__(
        self,
        check: HealthCheck,
        track: CheckTrack,
        *,
        clock: Clock,
        completed: Callable[[CheckCompleted], None],
        gap: float,
    ) -> None:
        """``gap`` is the least number of seconds between the last attempt and a forced one."""
        self.track = track
        self._check = check
        self._clock = clock
        self._completed = completed
        self._gap = gap
        self._outstanding: asyncio.Task[Observation] | None = None
        self._outstanding_since = 0.0
        self._last_start = float("-inf")
        self._due = float("inf")
        self._requested = False
        self._woken = asyncio.Event()
        # Two lists, as an attempt that began before somebody asked is no answer to that.
        self._waiting: list[asyncio.Future[None]] = []
        self._served: list[asyncio.Future[None]] = []

    async def run(self, phase: float) -> None:
        """Check for ever; the first wait is shortened to ``phase`` of an interval."""
        policy = self.track.policy
        while True:
            await self._attempt()
            interval = policy.interval if self.track.passing else policy.interval_when_failing
            self._due = self._clock.monotonic() + phase * interval
            if self._requested:  # while the attempt was under way
                self._due = min(self._due, self._last_start + policy.interval_when_failing)
            if self._waiting:  # likewise
                self._due = min(self._due, self._last_start + self._gap)
            phase = 1.0
            await self._pause()

    async def _pause(self) -> None:
        while (remaining := self._due - self._clock.monotonic()) > 0:
            self._woken.clear()
            woken = asyncio.ensure_future(self._woken.wait())
            try:
                await finished_within(woken, remaining, self._clock)
            finally:
                woken.cancel()

    def request(self) -> None:
        """Bring the next attempt forward, as far as the interval while failing allows."""
        self._requested = True
        earliest = self._last_start + self.track.policy.interval_when_failing
        self._due = min(self._due, earliest)
        self._woken.set()

    def force(self) -> asyncio.Future[None]:
        """Attempt as soon as the last one has ended and began ``gap`` seconds ago.

        The future is done with the record of an attempt that began after the call, or of a turn
        that found the one before it still hanging; or it is cancelled by :meth:`abandon`.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._due = min(self._due, self._last_start + self._gap)
        self._woken.set()
        return done

    def abandon(self) -> None:
        """Cancel what is in flight and everyone who waits for it."""
        if self._outstanding is not None:
            self._outstanding.cancel()
        for waiter in (*self._served, *self._waiting):
            waiter.cancel()
        self._served.clear()
        self._waiting.clear()

    async def _attempt(self) -> None:
        clock, timeout = self._clock, self.track.policy.timeout
        started = clock.monotonic()
        self._serve_who_waits()
        if self._outstanding is not None and not await finished_within(
            self._outstanding, timeout, clock
        ):
            stuck_for = clock.monotonic() - self._outstanding_since
            self._record(_timed_out(self.track.name, stuck_for), started, new_correlation_id())
            return
        self._requested = False
        self._serve_who_waits()
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

    def _serve_who_waits(self) -> None:
        self._served += self._waiting
        self._waiting.clear()

    def _ended(self, task: asyncio.Task[Observation]) -> None:
        if not task.cancelled():
            # Retrieved here, so that the late error of an abandoned attempt is not taken for an
            # uncaught exception of the process.
            task.exception()
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


async def _observe(check: HealthCheck) -> Observation:
    try:
        observation: object = await check.check()
    except (SystemExit, KeyboardInterrupt) as error:
        # These would go through the event loop and end the process: a check only ever fails.
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
