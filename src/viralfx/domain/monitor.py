"""The health monitor: runs the checks in the background and keeps one immutable report of them."""

import asyncio
import random
from collections import deque
from collections.abc import Mapping

from viralfx.domain.attempts import CheckCompleted, CheckRunner
from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.events import Listener, notify
from viralfx.domain.health import (
    CheckPolicy,
    HealthCheck,
    HealthReport,
    Status,
    Transition,
    overall_health,
)
from viralfx.domain.tracking import CheckTrack

MonitorEvent = Transition | CheckCompleted | HealthReport


class HealthMonitor:
    """Schedules the checks; its report is read without waiting for any of them.

    Each check has its own task: attempt, record, wait. An attempt that outlives its timeout is
    cancelled and left behind, and while it has not ended no other is started: the check fails
    with code ``timeout`` until then. Reading :meth:`report` applies thresholds, ages and the
    readiness policy; it never starts a check, so probes cannot cause load.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        rng: random.Random | None = None,
        fail_open_after: float = 0.0,
        history_size: int = 100,
        refresh_gap: float = 1.0,
    ) -> None:
        """``fail_open_after`` seconds on failing shared gates alone reopen readiness (0: never).

        ``refresh_gap`` is the least number of seconds between two forced rounds.
        """
        self._clock = clock
        # Spreads load only; nothing depends on it being unpredictable.
        self._rng = rng or random.Random()  # noqa: S311
        self._fail_open_after = fail_open_after
        self._refresh_gap = refresh_gap
        self._runners: dict[str, CheckRunner] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._listeners: tuple[Listener[MonitorEvent], ...] = ()
        self._history: deque[Transition] = deque(maxlen=history_size)
        self._transition_counts: dict[str, int] = {}
        self._gates_failing_since: float | None = None
        self._started = False
        self._report: HealthReport | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = float("-inf")

    # -- wiring ------------------------------------------------------------------------------

    def register(self, name: str, check: HealthCheck, policy: CheckPolicy) -> None:
        """Add a check before :meth:`start`, and after the one that it follows.

        Raises ``ValueError`` for a name taken already, and for following a check that is not there.
        """
        if name in self._runners:
            raise ValueError(f"a health check named {name!r} is registered already")
        if self._tasks:
            raise ValueError(f"health check {name!r} comes too late: the monitor is running")
        if policy.follows is not None and policy.follows not in self._runners:
            raise ValueError(f"health check {name!r} follows {policy.follows!r}: there is none")
        track = CheckTrack(name, policy, self._clock.now())
        self._started = False
        self._runners[name] = CheckRunner(
            check, track, clock=self._clock, completed=self._completed, gap=self._refresh_gap
        )
        self._report = None

    def subscribe(self, listener: Listener[MonitorEvent]) -> None:
        """Call ``listener`` with each attempt, then each transition, then the new report."""
        self._listeners = (*self._listeners, listener)

    def restore_transition_counts(self, counts: Mapping[str, int]) -> None:
        """Continue counting where the previous process stopped."""
        for name, count in counts.items():
            self._transition_counts[name] = self._transition_counts.get(name, 0) + count

    # -- reading -----------------------------------------------------------------------------

    @property
    def checks(self) -> tuple[str, ...]:
        """The names of the registered checks, in order."""
        return tuple(self._runners)

    def policy(self, name: str) -> CheckPolicy:
        """Return how a check is treated. Raises ``KeyError`` for an unknown name."""
        return self._runners[name].track.policy

    @property
    def history(self) -> tuple[Transition, ...]:
        """The last transitions, oldest first; bounded."""
        return tuple(self._history)

    @property
    def transition_counts(self) -> Mapping[str, int]:
        """Transitions per check since the first start that was saved."""
        return dict(self._transition_counts)

    def report(self) -> HealthReport:
        """Return the current report: the same object until a result or an age changes it."""
        report = self._report
        if report is None or self._clock.monotonic() >= report.valid_until:
            report = self._evaluate()
        return report

    # -- running -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start checking, every check at once. Needs a running loop; doing it twice is harmless."""
        if self._tasks:
            return
        for runner in self._runners.values():
            # The second attempt comes early by a random part of the interval, so that instances
            # started together do not check together for ever.
            phase = self._rng.uniform(0.5, 1.0)
            task = asyncio.create_task(runner.run(phase), name=f"health-check-{runner.track.name}")
            task.add_done_callback(_report_crash)
            self._tasks.append(task)

    async def stop(self) -> None:
        """Stop checking and cancel what is in flight, without waiting for attempts that hang."""
        tasks, self._tasks = self._tasks, []
        if self._refreshing is not None:
            tasks.append(self._refreshing)
        for task in tasks:
            task.cancel()
        for runner in self._runners.values():
            runner.abandon()
        if tasks:
            await asyncio.wait(tasks)

    def request_check(self, name: str) -> None:
        """Ask for an attempt ahead of schedule, because there is reason to doubt the last result.

        At most one attempt per ``retry_interval`` comes of it. Raises ``KeyError`` for an unknown
        name.
        """
        self._runners[name].request()

    async def refresh(self) -> HealthReport:
        """Run one new round of all checks and return the report that includes it.

        Callers share the round that is under way. Within ``refresh_gap`` of the last round there
        is no new one, and a check that began an attempt within as much is waited for until it may
        begin another. Each check is looked at after the round began, and one that follows another
        after that one. Bounded, for each check, by the gap and twice its timeout, beside the bound
        of the one that it follows.
        """
        if not self._tasks:
            return self.report()
        if self._refreshing is None or self._refreshing.done():
            if self._clock.monotonic() - self._refreshed_at < self._refresh_gap:
                return self.report()
            self._refreshing = asyncio.create_task(self._run_round(), name="health-refresh")
        # Not awaited directly: a caller that goes away must not cancel the round of the others.
        await asyncio.wait({self._refreshing})
        return self.report()

    async def _run_round(self) -> None:
        looks: dict[str | None, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as round_:
            for name, runner in self._runners.items():
                followed = looks.get(runner.track.policy.follows)
                looks[name] = round_.create_task(self._look_anew(runner, followed))
        self._refreshed_at = self._clock.monotonic()

    async def _look_anew(self, runner: CheckRunner, followed: asyncio.Task[None] | None) -> None:
        if followed is not None:
            await asyncio.wait({followed})
        # Twice: an attempt may be in flight already, or one may first have to end.
        limit = self._refresh_gap + 2 * runner.track.policy.timeout
        await finished_within(runner.force(), limit, self._clock)

    # -- evaluating --------------------------------------------------------------------------

    def _completed(self, event: CheckCompleted) -> None:
        notify(self._listeners, event)
        self._evaluate()

    def _evaluate(self) -> HealthReport:
        now, at = self._clock.monotonic(), self._clock.now()
        reports, transitions = {}, []
        for name, runner in self._runners.items():
            reports[name], transition = runner.track.evaluate(now, at)
            if transition is not None:
                transitions.append(transition)
        gates = [r for r in reports.values() if r.policy.gates_readiness]
        failing = [r for r in gates if r.status is Status.FAIL]
        all_reported = all(runner.track.reported for runner in self._runners.values())
        self._started = self._started or (all_reported and not failing)
        fail_open, opens_at = False, float("inf")
        if failing and self._fail_open_after > 0 and all(r.policy.shared for r in failing):
            if self._gates_failing_since is None:
                self._gates_failing_since = now
            opens_at = self._gates_failing_since + self._fail_open_after
            fail_open = now >= opens_at
        else:
            self._gates_failing_since = None
        stale_times = (
            runner.track.stale_at
            for name, runner in self._runners.items()
            if reports[name].status is not Status.FAIL
        )
        self._report = report = HealthReport(
            checks=reports,
            health=overall_health(reports.values()),
            started=self._started,
            failing_gates=tuple(r.name for r in failing),
            fail_open=fail_open,
            valid_until=min([float("inf") if fail_open else opens_at, *stale_times]),
        )
        for transition in transitions:
            self._history.append(transition)
            count = self._transition_counts.get(transition.check, 0)
            self._transition_counts[transition.check] = count + 1
            notify(self._listeners, transition)
        notify(self._listeners, report)
        return report


class StopChecking:
    """Shutdown stage: ends the checks, before what they look at is closed."""

    def __init__(self, monitor: HealthMonitor) -> None:
        self._monitor = monitor

    async def run(self, budget: float) -> None:  # noqa: ARG002 - attempts are not waited for
        """Stop the monitor."""
        await self._monitor.stop()


def _report_crash(task: asyncio.Task[None]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    task.get_loop().call_exception_handler(
        {"message": "Health monitor task failed", "exception": error, "future": task}
    )
