"""The shutdown sequence under random stages, triggers and callers."""

import asyncio
from collections.abc import Coroutine
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
from tests.unit.doubles import Act, ActingStage

from viralfx.domain.health.model import Lifecycle, State
from viralfx.domain.shutdown import (
    CUT_MARGIN,
    Outcome,
    Phase,
    ShutdownBudgets,
    ShutdownEvent,
    ShutdownReport,
    ShutdownSequence,
    ShutdownTriggered,
)

ORDER = list(Phase)
ACTS = [Act.PASS, Act.SLOW, Act.HANG, Act.RAISE, Act.CANCEL_ITSELF, Act.SWALLOW]
TOLERANCE = 1e-6

ResultT = TypeVar("ResultT")

seconds = st.sampled_from([0.0, 1.0, 4.0])
budgets = st.builds(
    lambda delay, drain, state, connections, spare: ShutdownBudgets(
        readiness_delay=delay,
        drain=drain,
        state=state,
        connections=connections,
        force=delay + drain + state + connections + spare,
    ),
    seconds,
    seconds,
    seconds,
    seconds,
    seconds,
)


class ShutdownMachine(RuleBasedStateMachine):
    """A sequence with random stages, triggered and run at random moments."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        self.stages: dict[Phase, list[ActingStage]] = {phase: [] for phase in Phase}
        self.runs: list[asyncio.Task[ShutdownReport]] = []
        self.triggered_at: float | None = None
        self.ran_at: float | None = None
        self.triggers = 0
        self.last_reports: list[ShutdownReport] = []

    def do(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a coroutine on the machine's loop."""
        return self.runner.run(coroutine)

    @initialize(budgets=budgets)
    def wire(self, budgets: ShutdownBudgets) -> None:
        """Create the sequence."""
        self.budgets = budgets
        self.lifecycle = Lifecycle(self.clock)
        self.sequence = ShutdownSequence(
            budgets=budgets, lifecycle=self.lifecycle, clock=self.clock
        )
        self.sequence.subscribe(self._on_event)

    def _on_event(self, event: ShutdownEvent) -> None:
        self.triggers += isinstance(event, ShutdownTriggered)

    # -- what happens ------------------------------------------------------------------------

    @precondition(lambda self: self.ran_at is None)
    @rule(
        phase=st.sampled_from(ORDER),
        act=st.sampled_from(ACTS),
        takes=st.sampled_from([0.1, 1.0, 3.0, 20.0]),
        first=st.booleans(),
    )
    def register(self, phase: Phase, act: Act, takes: float, *, first: bool) -> None:
        """Add a stage."""
        name = f"{phase} {len(self.stages[phase])}"
        stage = ActingStage(act, clock=self.clock, name=name, seconds=takes)
        self.stages[phase].insert(0 if first else len(self.stages[phase]), stage)
        self.sequence.register(phase, name, stage, first=first)

    @rule(seconds=st.sampled_from([0.1, 0.25, 1.0, 5.0]))
    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.do(self.clock.advance(seconds))

    @rule()
    def trigger(self) -> None:
        """Trigger, the first time or again."""

        async def trigger() -> bool:
            began = self.sequence.trigger(f"trigger at {self.clock.monotonic()}")
            await self.clock.settle()
            return began

        assert self.do(trigger()) == (self.triggered_at is None)
        if self.triggered_at is None:
            self.triggered_at = self.clock.monotonic()

    @rule()
    def run(self) -> None:
        """Run, the first time or again."""

        async def run() -> None:
            self.runs.append(asyncio.create_task(self.sequence.run()))
            await self.clock.settle()

        now = self.clock.monotonic()
        self.do(run())
        if self.ran_at is None:
            self.ran_at = now
        if self.triggered_at is None:
            self.triggered_at = now

    @precondition(lambda self: self.ran_at is not None)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Let a hanging stage end by itself."""

        async def release(stage: ActingStage) -> None:
            stage.release()
            await self.clock.settle()

        stuck = [s for stages in self.stages.values() for s in stages if s.began_at]
        if stuck:
            self.do(release(data.draw(st.sampled_from(stuck), label="stage")))

    # -- what always holds -------------------------------------------------------------------

    @invariant()
    def one_shutdown_with_one_deadline(self) -> None:
        """Repeated triggers change neither its start nor its deadline."""
        report = self.sequence.report()
        assert self.triggers == (0 if self.triggered_at is None else 1)
        assert self.sequence.triggered == (self.triggered_at is not None)
        if self.triggered_at is None:
            assert report.reason is None
            assert self.sequence.remaining() == float("inf")
        else:
            assert report.deadline is not None
            left = self.triggered_at + self.budgets.force - self.clock.monotonic()
            assert abs((report.deadline - self.clock.now()).total_seconds() - left) < 1e-3
            assert abs(self.sequence.remaining() - max(0.0, left)) < TOLERANCE

    @invariant()
    def phases_are_in_order(self) -> None:
        """Done phases, then at most one running, then pending ones."""
        phases = self.sequence.report().phases
        states = [phase.state for phase in phases]
        assert [phase.phase for phase in phases] == ORDER
        assert states == sorted(states, key=["done", "running", "pending"].index)
        assert states.count("running") <= 1
        for phase in phases:
            stages = self.stages[phase.phase]
            assert phase.budget == self.budgets.of(phase.phase)
            if phase.state == "pending":
                assert (phase.duration, phase.outcome, phase.stages) == (None, None, ())
                assert not any(stage.began_at for stage in stages)
            elif phase.state == "running":
                assert phase.duration is not None
                assert phase.outcome is None
                assert len(phase.stages) <= len(stages)
            else:
                assert phase.duration is not None
                assert phase.outcome is not None
                assert {stage.name for stage in phase.stages} == {stage.name for stage in stages}

    @invariant()
    def stages_start_once_and_in_order(self) -> None:
        """No stage starts twice, or before those of earlier phases."""
        assert all(len(stage.began_at) <= 1 for stages in self.stages.values() for stage in stages)
        for phase, stages in self.stages.items():
            if phase is Phase.DRAIN:
                continue
            begun = [stage.began_at[0] for stage in stages if stage.began_at]
            assert begun == sorted(begun)
            assert all(bool(stage.began_at) for stage in stages[: len(begun)])

    @invariant()
    def outcomes_are_true(self) -> None:
        """Every reported outcome is the real one."""
        for phase in self.sequence.report().phases:
            by_name = {stage.name: stage for stage in self.stages[phase.phase]}
            for ended in phase.stages:
                stage = by_name[ended.name]
                cut_at = stage.began_at[0] + stage.budgets[0] + CUT_MARGIN
                assert ended.duration <= stage.budgets[0] + CUT_MARGIN + TOLERANCE
                if stage.act in {Act.RAISE, Act.CANCEL_ITSELF}:
                    assert ended.outcome is Outcome.FAILED
                elif ended.outcome is Outcome.TIMEOUT:
                    assert stage.act in {Act.SLOW, Act.HANG, Act.SWALLOW}
                    # Cut at its budget, or just before the deadline to allow a report.
                    nearly_over = self.sequence.remaining() <= self.budgets.force / 20 + 0.05
                    full = abs(ended.duration - (stage.budgets[0] + CUT_MARGIN)) < TOLERANCE
                    assert full or nearly_over or self.budgets.force == 0
                else:
                    assert ended.outcome is Outcome.OK
                    assert stage.ended_at[0] <= cut_at + TOLERANCE

    @invariant()
    def budgets_are_kept(self) -> None:
        """No stage gets more than its phase's budget or the time until the deadline."""
        for phase, stages in self.stages.items():
            for stage in stages:
                if stage.began_at and self.triggered_at is not None:
                    left = self.triggered_at + self.budgets.force - stage.began_at[0]
                    assert 0.0 <= stage.budgets[0] <= self.budgets.of(phase) + TOLERANCE
                    assert stage.budgets[0] <= max(0.0, left) + TOLERANCE

    @invariant()
    def state_of_the_process_fits(self) -> None:
        """State and phases agree with each other."""
        states = [phase.state for phase in self.sequence.report().phases]
        if self.triggered_at is None:
            expected = State.STARTING
        elif states[-1] == "done":
            expected = State.STOPPED
        elif states[1] != "pending":
            expected = State.DRAINING
        else:
            expected = State.LAME_DUCK

        assert expected is self.lifecycle.state

    @invariant()
    def ends_in_time(self) -> None:
        """No run takes longer than the time to the deadline and one margin per stage."""
        if self.ran_at is not None and self.triggered_at is not None:
            count = sum(len(stages) for stages in self.stages.values())
            left = max(0.0, self.triggered_at + self.budgets.force - self.ran_at)
            latest = self.ran_at + left + count * CUT_MARGIN
            over = all(run.done() for run in self.runs)
            assert over or self.clock.monotonic() <= latest + TOLERANCE

    def teardown(self) -> None:
        """Run to the end, then check the invariants once more."""

        async def end() -> None:
            if self.ran_at is None:
                self.runs.append(asyncio.create_task(self.sequence.run()))
            while not all(run.done() for run in self.runs):
                await self.clock.advance(0.25)

        async def release() -> None:
            for stages in self.stages.values():
                for stage in stages:
                    stage.release()
            await self.clock.advance(100.0)

        if hasattr(self, "sequence"):
            self.do(end())
            report = self.sequence.report()
            for stages in self.stages.values():
                assert all(len(stage.began_at) == 1 for stage in stages)
            assert all(run.result() == report for run in self.runs)
            assert report.clean == all(
                stage.outcome is Outcome.OK for phase in report.phases for stage in phase.stages
            )
            self.do(release())
        self.runner.close()


@pytest.mark.timeout(900)
def test_the_shutdown_keeps_its_invariants() -> None:
    """Order, budgets, outcomes and end hold for any stages, triggers and callers."""
    run_state_machine_as_test(ShutdownMachine)
