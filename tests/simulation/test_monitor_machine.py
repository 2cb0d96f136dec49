"""The health monitor against a simple model, under random checks and callers."""

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.manual_clock import ManualClock
from tests.unit.doubles import LATE, Act, ActingCheck

from viralfx.domain.health.check_runner import CheckCompleted
from viralfx.domain.health.model import CheckPolicy, Health, HealthReport, Status, Transition
from viralfx.domain.health.monitor import HealthMonitor, MonitorEvent

NAMES = ("a", "b", "c")
FAIL_OPEN_AFTER = 20.0
HISTORY = 8
REFRESH_GAP = 1.0

ResultT = TypeVar("ResultT")

policies = st.builds(
    CheckPolicy,
    interval=st.sampled_from([1.0, 5.0]),
    retry_interval=st.sampled_from([None, 0.5, 1.0]),
    timeout=st.sampled_from([0.5, 2.0]),
    failure_threshold=st.integers(1, 3),
    recovery_threshold=st.integers(1, 3),
    max_age=st.sampled_from([None, 3.0]),
    critical=st.booleans(),
    required_for_readiness=st.booleans(),
    shared=st.booleans(),
)


@dataclass
class Model:
    """Computes the expected state of a check from the list of all its observations."""

    policy: CheckPolicy
    seen: list[Status] = field(default_factory=list)
    code: str | None = None
    recorded_at: float = 0.0
    received: list[Transition] = field(default_factory=list)

    def published(self) -> Status:
        """Apply the thresholds from the first observation on."""
        published = self.seen[0]
        for end in range(1, len(self.seen) + 1):
            worse = self.seen[max(0, end - self.policy.failure_threshold) : end]
            better = self.seen[max(0, end - self.policy.recovery_threshold) : end]
            if len(worse) == self.policy.failure_threshold and all(
                status.severity > published.severity for status in worse
            ):
                published = min(worse, key=lambda status: status.severity)
            elif len(better) == self.policy.recovery_threshold and all(
                status.severity < published.severity for status in better
            ):
                published = max(better, key=lambda status: status.severity)
        return published

    def verdict(self, now: float) -> tuple[Status, str | None]:
        """Return the status and, if only one is possible, the code."""
        if not self.seen:
            return Status.FAIL, "pending"
        published = self.published()
        if published is not Status.FAIL and now >= self.recorded_at + self.policy.oldest_allowed:
            return Status.FAIL, "stale"
        return published, None


class MonitorMachine(RuleBasedStateMachine):
    """Three checks under random policies, moved through time."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        self.running = False
        self.events: list[MonitorEvent] = []
        self.rounds: list[tuple[float, asyncio.Task[None]]] = []
        self.round_ended_at = float("-inf")
        self.old_news: list[str] = []
        self.stops = 0
        self.resumed_at = self.clock.monotonic()
        self.not_failing_at = self.clock.monotonic()
        self.was_started = False

    def do(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a coroutine on the machine's loop."""
        return self.runner.run(coroutine)

    @initialize(
        policies=st.tuples(policies, policies, policies),
        follows=st.sampled_from([None, NAMES[0]]),
        seed=st.integers(0, 9),
    )
    def wire(
        self,
        policies: tuple[CheckPolicy, CheckPolicy, CheckPolicy],
        follows: str | None,
        seed: int,
    ) -> None:
        """Create the monitor and start it; the second check may follow the first."""
        policies = (policies[0], replace(policies[1], follows=follows), policies[2])
        self.monitor = HealthMonitor(
            clock=self.clock,
            rng=random.Random(seed),  # noqa: S311 - repeatable
            fail_open_after=FAIL_OPEN_AFTER,
            history_size=HISTORY,
            refresh_gap=REFRESH_GAP,
        )
        self.checks, self.models = {}, {}
        for name, policy in zip(NAMES, policies, strict=True):
            self.checks[name] = ActingCheck(clock=self.clock)
            self.models[name] = Model(policy)
            self.monitor.register(name, self.checks[name], policy)
        bounds = [REFRESH_GAP + 2 * policy.timeout for policy in policies]
        self.bound = max(bounds[0] + (bounds[1] if follows else 0.0), *bounds)
        self.monitor.subscribe(self._on_event)
        self.start()

    def _on_event(self, event: MonitorEvent) -> None:
        if isinstance(event, HealthReport):
            return
        self.events.append(event)
        model = self.models[event.check]
        if isinstance(event, CheckCompleted):
            assert event.observation.message != LATE
            model.seen.append(event.observation.status)
            model.code = event.observation.code
            model.recorded_at = self.clock.monotonic()
        else:
            model.received.append(event)

    # -- what happens ------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), act=st.sampled_from(Act), seconds=st.sampled_from([0.4, 3]))
    def behave(self, name: str, act: Act, seconds: float) -> None:
        """Set the behaviour of the next attempts of a check."""
        self.checks[name].act = act
        self.checks[name].seconds = seconds

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.5, 12.0]))
    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.do(self.clock.advance(seconds))

    @rule(name=st.sampled_from(NAMES))
    def release(self, name: str) -> None:
        """Let hanging attempts of a check return."""

        async def release() -> None:
            self.checks[name].release()
            await self.clock.settle()

        self.do(release())

    @precondition(lambda self: self.running)
    @rule()
    def refresh(self) -> None:
        """Start a forced round."""

        async def refresh() -> None:
            caller = asyncio.create_task(self._ask_for_a_round())
            self.rounds.append((self.clock.monotonic(), caller))
            await self.clock.settle()

        self.do(refresh())

    async def _ask_for_a_round(self) -> None:
        asked_at, stops = self.clock.monotonic(), self.stops
        shares = asked_at < self.round_ended_at + REFRESH_GAP or not all(
            caller.done() for _, caller in self.rounds[:-1]
        )
        await self.monitor.refresh()
        self.round_ended_at = self.clock.monotonic()
        if not shares and stops == self.stops:
            self.old_news += [
                name
                for name, model in self.models.items()
                if model.code != "timeout" and self.checks[name].begun_at[-1] < asked_at
            ]

    @rule(name=st.sampled_from(NAMES))
    def request(self, name: str) -> None:
        """Request an attempt of a check."""

        async def request() -> None:
            self.monitor.request_check(name)
            await self.clock.settle()

        self.do(request())

    @precondition(lambda self: self.running)
    @rule()
    def stop(self) -> None:
        """Stop the monitor; it must take no time."""
        self.stops += 1

        async def stop() -> None:
            stopping = asyncio.create_task(self.monitor.stop())
            await self.clock.settle()
            assert stopping.done()
            stopping.result()

        self.do(stop())
        self.running = False
        assert all(caller.done() for _, caller in self.rounds)

    @precondition(lambda self: not self.running)
    @rule()
    def start(self) -> None:
        """Start the monitor, again or for the first time."""

        async def start() -> None:
            self.monitor.start()
            await self.clock.settle()

        self.do(start())
        self.running = True
        self.resumed_at = self.clock.monotonic()

    # -- what always holds -------------------------------------------------------------------

    @invariant()
    def one_attempt_at_a_time(self) -> None:
        """No check ever has two attempts at once."""
        for check in self.checks.values():
            assert check.most_outstanding <= 1

    @invariant()
    def reading_is_cheap_and_steady(self) -> None:
        """No read starts a check, and each returns one object that is valid now."""
        before = {name: check.attempts for name, check in self.checks.items()}
        report = self.monitor.report()
        self.do(self.clock.settle())

        assert self.monitor.report() is report
        assert self.clock.monotonic() < report.valid_until
        assert before == {name: check.attempts for name, check in self.checks.items()}

    @invariant()
    def statuses_follow_the_thresholds_and_ages(self) -> None:
        """Each status is the model's; checks without result, hanging or stale, do not pass."""
        report = self.monitor.report()
        for name, model in self.models.items():
            status, code = model.verdict(self.clock.monotonic())
            shown = report.checks[name]

            assert status is shown.status
            if code is not None:
                assert code == shown.code
            if shown.status is not Status.FAIL:
                stale_at = model.recorded_at + model.policy.oldest_allowed
                assert report.valid_until <= stale_at

    @invariant()
    def schedule_is_alive(self) -> None:
        """While the monitor runs, each check is recorded in every interval and two timeouts."""
        if self.running:
            for model in self.models.values():
                last = max(model.recorded_at, self.resumed_at)
                longest = max(model.policy.interval, model.policy.interval_when_failing)
                age = self.clock.monotonic() - last
                assert age <= longest + 2 * model.policy.timeout + 1e-6

    @invariant()
    def rounds_are_bounded(self) -> None:
        """Every caller of a round has a report after the gap and two timeouts of each turn."""
        for asked_at, caller in self.rounds:
            if self.clock.monotonic() - asked_at > self.bound + 1e-6:
                assert caller.done()

    @invariant()
    def rounds_bring_news(self) -> None:
        """Every caller of a new round gets attempts that started later, if any could."""
        assert self.old_news == []

    @invariant()
    def readiness_follows_the_gates(self) -> None:
        """Each of required checks, start-up and failing open agrees with the statuses."""
        report, now = self.monitor.report(), self.clock.monotonic()
        failing = tuple(
            name
            for name, model in self.models.items()
            if model.policy.required_for_readiness and report.checks[name].status is Status.FAIL
        )
        shared = bool(failing) and all(self.models[name].policy.shared for name in failing)
        if not shared:
            self.not_failing_at = now

        assert failing == report.failing_gates
        if report.fail_open:
            assert shared
            assert now - self.not_failing_at >= FAIL_OPEN_AFTER - 1e-6
        assert report.ready == (report.started and (not failing or report.fail_open))

        all_reported = all(model.seen for model in self.models.values())
        assert report.started or not (all_reported and not failing)
        assert not report.started or all_reported
        assert not self.was_started or report.started
        self.was_started = report.started

    @invariant()
    def overall_health_is_the_worst_that_matters(self) -> None:
        """Only a failing critical check is unhealthy; others that do not pass degrade."""
        reports = self.monitor.report().checks.values()
        if any(r.status is Status.FAIL and r.policy.critical for r in reports):
            expected = Health.UNHEALTHY
        elif any(r.status is not Status.PASS for r in reports):
            expected = Health.DEGRADED
        else:
            expected = Health.HEALTHY

        assert expected is self.monitor.report().health

    @invariant()
    def transitions_are_a_chain(self) -> None:
        """Each transition starts at the status of the previous one, and none is missing."""
        report = self.monitor.report()
        for name, model in self.models.items():
            old: Status | None = None
            for event in model.received:
                assert old is event.old
                assert event.new is not event.old
                old = event.new
            assert old is (report.checks[name].status if model.seen else None)
            assert len(model.received) == self.monitor.transition_counts.get(name, 0)
        received = [event for event in self.events if isinstance(event, Transition)]
        assert tuple(received[-HISTORY:]) == self.monitor.history

    def teardown(self) -> None:
        """Let everything end."""

        async def end() -> None:
            if self.running:
                await self.monitor.stop()
            for _ in range(3):
                for check in self.checks.values():
                    check.release()
                await self.clock.settle()

        if hasattr(self, "monitor"):
            self.do(end())
        self.runner.close()


@pytest.mark.timeout(900)
def test_the_monitor_agrees_with_its_model() -> None:
    """Statuses, readiness and schedule hold for any order of events."""
    run_state_machine_as_test(MonitorMachine)
