"""The health monitor: runs the checks in the background and keeps one immutable report of them."""

import asyncio
import random
from collections import deque
from collections.abc import Collection, Mapping

from viralfx.core.clock import Clock, default_rng, finished_within, supervised
from viralfx.core.events import Listener, notify
from viralfx.domain.health.check_runner import CheckCompleted, CheckRunner
from viralfx.domain.health.check_state import CheckTracker, HealthTotals
from viralfx.domain.health.model import AnyHealthCheck, CheckPolicy, HealthReport, Transition

MonitorEvent = Transition | CheckCompleted | HealthReport


class HealthMonitor:
    """Runs the checks in the background; reading the report never waits for a check.

    Each check has its own task: attempt, record, wait. An attempt that exceeds its timeout is
    cancelled and abandoned. Until it has ended, the check fails with code ``timeout`` and no other
    attempt starts. Reading :meth:`report` applies thresholds, ages and the readiness policy. It
    never starts a check, so probes cannot cause load.

    A completed attempt updates its own check and the totals. The report of all checks is built
    once for all changes in a turn of the event loop, or earlier if it is read.
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
        """Create a monitor without checks.

        ``fail_open_after``: if only shared dependencies keep the service from being ready, it
        becomes ready again after so many seconds; 0: never. ``refresh_gap`` is the minimum number
        of seconds between two forced rounds.
        """
        self._clock = clock
        self._rng = rng or default_rng()
        self._totals = HealthTotals(fail_open_after)
        self._refresh_gap = refresh_gap
        self._runners: dict[str, CheckRunner] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._listeners: tuple[Listener[MonitorEvent], ...] = ()
        self._history: deque[Transition] = deque(maxlen=history_size)
        self._transition_counts: dict[str, int] = {}
        self._report: HealthReport | None = None
        """The current report; None if a check has changed since the last report."""
        self._report_unpublished = False
        """True if the listeners have not received the current report yet."""
        self._publishing_transitions = False
        """True while listeners receive transitions, which precede the report."""
        self._publish_scheduled = False
        """True if the event loop will call :meth:`_publish` in this turn or the next."""
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = float("-inf")

    # -- wiring ------------------------------------------------------------------------------

    def register(self, name: str, check: AnyHealthCheck, policy: CheckPolicy) -> None:
        """Add a check. Call it before :meth:`start`, and after adding the check that it follows.

        Raises ``ValueError`` if the name is taken, the followed check is unknown, or the monitor
        is running.
        """
        if name in self._runners:
            raise ValueError(f"a health check named {name!r} is registered already")
        if self._tasks:
            raise ValueError(f"health check {name!r} is registered too late: the monitor runs")
        if policy.follows is not None and policy.follows not in self._runners:
            raise ValueError(f"health check {name!r} follows {policy.follows!r}, which is unknown")
        track = CheckTracker(name, policy, self._clock.now())
        self._runners[name] = CheckRunner(
            check, track, clock=self._clock, completed=self._completed, gap=self._refresh_gap
        )
        self._totals.add(track.evaluate(self._clock.monotonic(), self._clock.now())[0])
        self._report = None

    def subscribe(self, listener: Listener[MonitorEvent]) -> None:
        """Call ``listener`` with each attempt, then its transitions, then the new report.

        Attempts that end in the same turn of the event loop may share one report.
        """
        self._listeners = (*self._listeners, listener)

    def restore_transition_counts(self, counts: Mapping[str, int]) -> None:
        """Add the counts of the previous processes."""
        for name, count in counts.items():
            self._transition_counts[name] = self._transition_counts.get(name, 0) + count

    # -- reading -----------------------------------------------------------------------------

    @property
    def checks(self) -> tuple[str, ...]:
        """The names of the checks in the order of registration."""
        return tuple(self._runners)

    def policy(self, name: str) -> CheckPolicy:
        """Return the policy of a check. Raises ``KeyError`` for an unknown name."""
        return self._runners[name].track.policy

    @property
    def history(self) -> tuple[Transition, ...]:
        """The last transitions, oldest first; at most ``history_size``."""
        return tuple(self._history)

    @property
    def transition_counts(self) -> Mapping[str, int]:
        """Number of transitions of each check, including those of previous processes."""
        return dict(self._transition_counts)

    def report(self) -> HealthReport:
        """Return the current report: the same object until a new or stale result changes it."""
        report = self._report
        if report is None or self._clock.monotonic() >= report.valid_until:
            report = self._renew()
        return report

    # -- running -----------------------------------------------------------------------------

    def start(self, *, postponed: Collection[str] = ()) -> None:
        """Start the checks on the running event loop, except those that run already.

        ``postponed`` names checks that stay pending until the next call.
        """
        for name, runner in self._runners.items():
            if name not in self._tasks and name not in postponed:
                run = runner.run(self._rng)
                self._tasks[name] = supervised(run, f"health-check-{name}")

    async def stop(self) -> None:
        """Stop the checks and cancel attempts in flight, without waiting for attempts that hang."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        if self._refreshing is not None:
            tasks.append(self._refreshing)
        for task in tasks:
            task.cancel()
        for runner in self._runners.values():
            runner.abandon()
        if tasks:
            await asyncio.wait(tasks)

    def request_check(self, name: str) -> None:
        """Run a check ahead of schedule, for example after an error of its dependency.

        Such attempts are at least ``retry_interval`` apart. Raises ``KeyError`` for an unknown
        name.
        """
        self._runners[name].request()

    async def refresh(self) -> HealthReport:
        """Run all started checks once and return the report that includes the results.

        Concurrent callers share one round. Within ``refresh_gap`` seconds of the last round, the
        current report is returned without a new round. In a round each check makes one attempt
        that begins after the start of the round, at least ``refresh_gap`` seconds after its last
        attempt, and after the check that it follows. The wait for a check is at most the gap plus
        twice its timeout, in addition to the wait for the check that it follows.
        """
        if not self._tasks:
            return self.report()
        if self._refreshing is None or self._refreshing.done():
            if self._clock.monotonic() - self._refreshed_at < self._refresh_gap:
                return self.report()
            self._refreshing = asyncio.create_task(self._run_round(), name="health-refresh")
        # Not awaited directly: cancelling one caller must not cancel the round of the others.
        await asyncio.wait({self._refreshing})
        return self.report()

    async def _run_round(self) -> None:
        forced: dict[str | None, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as round_:
            for name in self._tasks:
                runner = self._runners[name]
                followed = forced.get(runner.track.policy.follows)
                forced[name] = round_.create_task(self._force(runner, followed))
        self._refreshed_at = self._clock.monotonic()

    async def _force(self, runner: CheckRunner, followed: asyncio.Task[None] | None) -> None:
        if followed is not None:
            await asyncio.wait({followed})
        # Twice the timeout: an attempt in flight may have to end first.
        limit = self._refresh_gap + 2 * runner.track.policy.timeout
        await finished_within(runner.force(), limit, self._clock)

    # -- evaluating --------------------------------------------------------------------------

    def _completed(self, event: CheckCompleted) -> None:
        notify(self._listeners, event)
        self._apply(event.check)
        if self._listeners and not self._publish_scheduled:
            self._publish_scheduled = True
            asyncio.get_running_loop().call_soon(self._publish)

    def _apply(self, completed: str | None = None) -> None:
        """Evaluate the check that completed an attempt, and those whose results became stale."""
        # Released first: the checks are copied only if a caller still holds the report.
        self._report, self._report_unpublished = None, True
        now, at = self._clock.monotonic(), self._clock.now()
        changed = self._totals.take_expired(now)
        if completed is not None and completed not in changed:
            changed.append(completed)
        transitions = []
        for name in self._totals.in_order(changed):
            track = self._runners[name].track
            report, transition = track.evaluate(now, at)
            self._totals.update(report, track.stale_at)
            if transition is not None:
                transitions.append(transition)
        self._totals.settle(now)
        if transitions:
            self._publish_transitions(transitions)

    def _publish_transitions(self, transitions: list[Transition]) -> None:
        # A listener may read the report and so build it; it is published after the transitions.
        outer, self._publishing_transitions = self._publishing_transitions, True
        try:
            for transition in transitions:
                self._history.append(transition)
                count = self._transition_counts.get(transition.check, 0)
                self._transition_counts[transition.check] = count + 1
                notify(self._listeners, transition)
        finally:
            self._publishing_transitions = outer

    def _renew(self) -> HealthReport:
        self._apply()
        # A listener that received a transition may have built the report already.
        report = self._report
        if report is None:
            report = self._report = self._totals.report(self._clock.monotonic())
        self._publish_report(report)
        return report

    def _publish_report(self, report: HealthReport) -> None:
        if self._report_unpublished and not self._publishing_transitions:
            self._report_unpublished = False
            notify(self._listeners, report)

    def _publish(self) -> None:
        self._publish_scheduled = False
        self._publish_report(self.report())
