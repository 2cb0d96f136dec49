"""The shutdown sequence: budgets, order, failing stages, trigger and report."""

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

import pytest
from tests.manual_clock import ManualClock
from tests.unit.conftest import Releasable
from tests.unit.doubles import Act, ActingStage, BrokenError

from viralfx.core.correlation import current_correlation_id
from viralfx.domain.health.model import Health, HealthReport, Lifecycle, State
from viralfx.domain.shutdown import (
    CUT_MARGIN,
    Outcome,
    Phase,
    PhaseFinished,
    PhaseStarted,
    ShutdownBudgets,
    ShutdownEvent,
    ShutdownReport,
    ShutdownSequence,
    ShutdownTriggered,
    StageFinished,
    StageStarted,
)

BUDGETS = ShutdownBudgets(readiness_delay=5, drain=30, state=5, connections=12, force=60)


READY = HealthReport(
    checks={},
    health=Health.HEALTHY,
    started=True,
    failing_gates=(),
    fail_open=False,
    valid_until=float("inf"),
)


class Stop:
    """A sequence with its clock and a journal of its stages."""

    def __init__(self, clock: ManualClock, budgets: ShutdownBudgets = BUDGETS) -> None:
        self.clock = clock
        self.lifecycle = Lifecycle(clock)
        self.lifecycle.application_ready()
        self.lifecycle.follow(READY)
        self.sequence = ShutdownSequence(budgets=budgets, lifecycle=self.lifecycle, clock=clock)
        self.journal: list[str] = []
        self.began_at = clock.monotonic()

    def add(
        self,
        phase: Phase,
        name: str,
        act: Act = Act.PASS,
        *,
        seconds: float = 1.0,
        first: bool = False,
    ) -> ActingStage:
        """Register a stage with this behaviour."""
        stage = ActingStage(act, clock=self.clock, name=name, seconds=seconds, journal=self.journal)
        self.sequence.register(phase, name, stage, first=first)
        return stage

    async def finish(self) -> ShutdownReport:
        """Run to the end, however long that takes on the clock."""
        run = asyncio.create_task(self.sequence.run())
        while not run.done():
            await self.clock.advance(0.125)
        return run.result()

    @property
    def elapsed(self) -> float:
        """Seconds since the sequence was created."""
        return self.clock.monotonic() - self.began_at

    def outcomes(self) -> dict[str, Outcome]:
        """Return the outcome of each stage."""
        phases = self.sequence.report().phases
        return {stage.name: stage.outcome for phase in phases for stage in phase.stages}


@pytest.fixture
def stop(clock: ManualClock) -> Stop:
    """Return a sequence without stages."""
    return Stop(clock)


# -- budgets ---------------------------------------------------------------------------------


def test_default_budgets_are_those_of_docs_operations() -> None:
    """``docs/operations.md`` lists them."""
    budgets = ShutdownBudgets()

    assert [budgets.of(phase) for phase in Phase] == [0.0, 30.0, 5.0, 15.0]
    assert budgets.force == 60.0


def test_budgets_may_equal_the_force_timeout() -> None:
    """The phases may use all of the time."""
    ShutdownBudgets(readiness_delay=10, drain=30, state=5, connections=15, force=60)


def test_budgets_over_the_force_timeout_are_rejected() -> None:
    """The message shows all numbers of the sum."""
    expected = (
        r"the phases need 60.5 s together \(readiness delay 10.5, drain 30, state 5,"
        r" connections 15\) but everything is forced to end after 60 s"
    )

    with pytest.raises(ValueError, match=expected):
        ShutdownBudgets(readiness_delay=10.5, drain=30, state=5, connections=15, force=60)


@pytest.mark.parametrize("name", ["readiness_delay", "drain", "state", "connections", "force"])
@pytest.mark.parametrize("seconds", [-0.001, float("nan"), float("inf")])
def test_an_invalid_budget_is_rejected(name: str, seconds: float) -> None:
    """The error names negative and infinite budgets."""
    with pytest.raises(ValueError, match=f"{name} must be zero or more and finite"):
        ShutdownBudgets(**{name: seconds})


# -- order -----------------------------------------------------------------------------------


async def test_phases_run_in_order(stop: Stop) -> None:
    """The order of registration does not matter."""
    for phase in reversed(Phase):
        stop.add(phase, str(phase))
    report = await stop.finish()

    assert [str(phase) for phase in Phase] == stop.journal
    assert report.clean


async def test_stages_of_a_phase_run_in_the_order_of_registration(stop: Stop) -> None:
    """``first`` puts a stage before the others."""
    stop.add(Phase.CLOSE, "two", Act.SLOW)
    stop.add(Phase.CLOSE, "three", Act.SLOW)
    stop.add(Phase.CLOSE, "one", Act.SLOW, first=True)
    await stop.finish()

    assert stop.journal == ["one", "two", "three"]
    assert 3.0 <= stop.elapsed < 3.2


async def test_drain_stages_run_concurrently(stop: Stop) -> None:
    """Each has the whole budget."""
    stages = [stop.add(Phase.DRAIN, name, Act.SLOW, seconds=20.0) for name in ("one", "two")]
    report = await stop.finish()

    assert [stage.budgets for stage in stages] == [[30.0], [30.0]]
    assert 20.0 <= stop.elapsed < 20.2
    assert report.clean


async def test_sequential_stages_get_equal_shares(stop: Stop) -> None:
    """Unused time goes to the next stages."""
    quick = stop.add(Phase.CLOSE, "quick")
    slow = stop.add(Phase.CLOSE, "slow", Act.SLOW, seconds=2.0)
    last = stop.add(Phase.CLOSE, "last")
    await stop.finish()

    assert quick.budgets == [4.0]
    assert slow.budgets == [6.0]
    assert last.budgets == [10.0]


async def test_a_hanging_stage_does_not_use_the_time_of_others(stop: Stop) -> None:
    """The stages after it still get their share."""
    stop.add(Phase.CLOSE, "hanging", Act.HANG)
    behind = [stop.add(Phase.CLOSE, name) for name in ("two", "three")]
    await stop.finish()

    assert all(stage.budgets[0] >= 3.8 for stage in behind)


async def test_a_stage_name_is_unique_in_its_phase(stop: Stop) -> None:
    """Two phases may have stages of the same name."""
    stop.add(Phase.DRAIN, "queues")
    stop.add(Phase.CLOSE, "queues")

    with pytest.raises(ValueError, match="has a stage named 'queues' already"):
        stop.add(Phase.DRAIN, "queues")


# -- the delay and the lifecycle -------------------------------------------------------------


async def test_listeners_close_after_the_readiness_delay(stop: Stop) -> None:
    """Until then the instance accepts connections."""
    listeners = stop.add(Phase.STOP_ACCEPTING, "listeners")
    run = asyncio.create_task(stop.sequence.run())
    await stop.clock.advance(4.999)

    assert State.LAME_DUCK is stop.lifecycle.state
    assert listeners.began_at == []

    await stop.clock.advance(0.001)

    assert [stop.began_at + 5.0] == listeners.began_at
    assert run.done()


async def test_no_readiness_delay_without_a_stage_that_stops_accepting(stop: Stop) -> None:
    """Another server has closed its listeners already."""
    stop.add(Phase.DRAIN, "queues")
    await stop.sequence.run()

    assert stop.elapsed == 0.0


async def test_states_follow_the_phases(stop: Stop) -> None:
    """Lame duck at the trigger, draining from the drain on, stopped at the end."""
    seen: list[State] = []

    async def note_state(_: float) -> None:
        seen.append(stop.lifecycle.state)

    for phase in Phase:
        stop.sequence.register(phase, "state", note_state)
    await stop.finish()

    assert seen == [State.LAME_DUCK, State.DRAINING, State.DRAINING, State.DRAINING]
    assert State.STOPPED is stop.lifecycle.state
    reasons = [event.reason for event in stop.lifecycle.history]
    assert reasons == ["checks pass", "requested", "requested", "requested"]


class Proxy:
    """Delegates every attribute, as lazy wrappers do."""

    def __init__(self, wrapped: object) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


async def test_a_proxy_of_a_stage_is_a_stage(stop: Stop) -> None:
    """Its method ``run`` is no attribute of its class."""
    stage = ActingStage(Act.PASS, clock=stop.clock, name="a", seconds=1.0, journal=stop.journal)
    proxy: Any = Proxy(stage)
    stop.sequence.register(Phase.CLOSE, "a", proxy)
    report = await stop.finish()

    assert report.clean
    assert stop.outcomes()["a"] is Outcome.OK


async def test_a_function_is_a_stage(stop: Stop) -> None:
    """The sequence calls it with the budget and reports it like any other stage."""
    budgets: list[float] = []

    async def stage(budget: float) -> None:
        budgets.append(budget)

    stop.sequence.register(Phase.SAVE_STATE, "function", stage)
    report = await stop.finish()

    assert budgets == [5.0]
    assert report.clean


# -- stages that misbehave -------------------------------------------------------------------


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize(
    ("act", "outcome"),
    [
        (Act.RAISE, Outcome.FAILED),
        (Act.CANCEL_ITSELF, Outcome.FAILED),
        (Act.HANG, Outcome.TIMEOUT),
        (Act.SWALLOW, Outcome.TIMEOUT),
    ],
)
async def test_the_next_stage_runs_after_a_failed_one(
    stop: Stop, held: list[Releasable], phase: Phase, act: Act, outcome: Outcome
) -> None:
    """A stage that fails or overruns ends neither its phase nor the shutdown."""
    held.append(stop.add(phase, "bad", act))
    stop.add(phase, "next")
    stop.add(Phase.CLOSE, "last")
    report = await stop.finish()

    assert {"bad": outcome, "next": Outcome.OK, "last": Outcome.OK} == stop.outcomes()
    assert outcome is report.phases[list(Phase).index(phase)].outcome
    assert not report.clean


def _raises_at_once() -> Coroutine[Any, Any, None]:
    raise BrokenError("before the first await")


def _is_not_async() -> Coroutine[Any, Any, None]:
    return None  # type: ignore[return-value]


@pytest.mark.parametrize("phase", list(Phase))
async def test_a_cancellation_of_all_tasks_does_not_end_an_uncancelled_run(
    stop: Stop, phase: Phase
) -> None:
    """The stage that is cancelled has failed, and the others run."""

    async def cancel_all(_: float) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task(), this}:
            task.cancel()
        await asyncio.sleep(0)

    this = asyncio.current_task()
    stop.sequence.register(phase, "cancelling", cancel_all)
    stop.add(Phase.CLOSE, "connections")
    running = asyncio.create_task(stop.sequence.run(uncancelled=True))
    while stop.lifecycle.state is not State.STOPPED and stop.elapsed < BUDGETS.force:
        await stop.clock.advance(0.125)

    outcomes = {each.phase: each.outcome for each in stop.sequence.report().phases}
    assert outcomes == dict.fromkeys(Phase, Outcome.OK)
    assert running.cancelled()


@pytest.mark.parametrize("function", [_raises_at_once, _is_not_async])
@pytest.mark.parametrize("phase", [Phase.DRAIN, Phase.CLOSE])
async def test_a_synchronous_run_fails_as_a_stage(stop: Stop, phase: Phase, function: Any) -> None:
    """It does not end the sequence."""

    class Wrong:
        def run(self, budget: float) -> Coroutine[Any, Any, None]:  # noqa: ARG002
            result: Coroutine[Any, Any, None] = function()
            return result

    stop.sequence.register(phase, "wrong", Wrong())
    stop.add(phase, "next")
    await stop.finish()

    assert stop.outcomes() == {"wrong": Outcome.FAILED, "next": Outcome.OK}


@pytest.mark.parametrize("act", [Act.HANG, Act.SWALLOW])
async def test_a_hanging_stage_is_cut_after_its_budget(
    stop: Stop, held: list[Releasable], act: Act
) -> None:
    """The margin is small, even if the stage suppresses its cancellation."""
    held.append(stop.add(Phase.DRAIN, "hanging", act))
    after = stop.add(Phase.SAVE_STATE, "after")
    await stop.finish()

    assert [stop.began_at + 30.0 + CUT_MARGIN] == after.began_at


async def test_a_stage_that_uses_its_whole_budget_is_not_cut(stop: Stop) -> None:
    """It ends on time."""
    stop.add(Phase.DRAIN, "exact", Act.SLOW, seconds=30.0)

    assert (await stop.finish()).clean


async def test_a_suspended_process_does_not_cut_a_stage(stop: Stop) -> None:
    """The stage has its margin afterwards; one that hangs is cut."""

    async def two_steps(_: float) -> None:
        await stop.clock.sleep(29.5)
        await stop.clock.sleep(CUT_MARGIN / 2)

    stop.sequence.register(Phase.DRAIN, "punctual", two_steps)
    stop.add(Phase.DRAIN, "hanging", Act.HANG)
    run = asyncio.create_task(stop.sequence.run())
    await stop.clock.advance(29.0)
    stop.clock.jump(3.0)
    await stop.clock.advance(CUT_MARGIN)
    await run

    assert stop.outcomes() == {"punctual": Outcome.OK, "hanging": Outcome.TIMEOUT}
    assert stop.elapsed == 29.0 + 3.0 + CUT_MARGIN


async def test_the_worst_stage_decides_the_outcome_of_a_phase(stop: Stop) -> None:
    """A timeout is worse than a failure."""
    stop.add(Phase.DRAIN, "fine")
    stop.add(Phase.DRAIN, "raising", Act.RAISE)
    stop.add(Phase.DRAIN, "hanging", Act.HANG)
    stop.add(Phase.CLOSE, "fine")
    stop.add(Phase.CLOSE, "raising", Act.RAISE)
    report = await stop.finish()

    assert [phase.outcome for phase in report.phases] == [
        Outcome.OK,
        Outcome.TIMEOUT,
        Outcome.OK,
        Outcome.FAILED,
    ]


async def test_a_late_error_of_a_cut_stage_is_ignored(stop: Stop) -> None:
    """It is not reported as an uncaught exception."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    class RaisesWhenCut:
        async def run(self, budget: float) -> None:
            try:
                await stop.clock.sleep(budget + 100.0)
            except asyncio.CancelledError:
                raise BrokenError("on the way out") from None

    stop.sequence.register(Phase.CLOSE, "late", RaisesWhenCut())
    await stop.finish()
    await stop.clock.settle()

    assert stop.outcomes() == {"late": Outcome.TIMEOUT}
    assert reported == []


# -- the trigger -----------------------------------------------------------------------------


async def test_trigger_is_idempotent_with_one_deadline(stop: Stop) -> None:
    """Later triggers change neither the reason nor the deadline."""
    first = stop.sequence.trigger("SIGTERM")
    deadline = stop.sequence.report().deadline
    await stop.clock.advance(10.0)
    second = stop.sequence.trigger("POST /health/shutdown")
    report = stop.sequence.report()

    assert (first, second) == (True, False)
    assert ("SIGTERM", deadline) == (report.reason, report.deadline)
    assert stop.clock.now() + timedelta(seconds=50) == deadline
    assert stop.sequence.remaining() == 50.0


async def test_there_is_no_deadline_before_the_trigger(stop: Stop) -> None:
    """There is no reason either."""
    report = stop.sequence.report()

    assert float("inf") == stop.sequence.remaining()
    assert (report.reason, report.deadline, report.clean) == (None, None, False)
    assert {"pending"} == {phase.state for phase in report.phases}
    assert not stop.sequence.triggered


async def test_wait_returns_with_the_trigger(stop: Stop) -> None:
    """Later calls return at once."""
    waiter = asyncio.create_task(stop.sequence.wait())
    await stop.clock.advance(1000.0)

    assert not waiter.done()

    stop.sequence.trigger("SIGTERM")
    await stop.clock.settle()

    assert waiter.done()

    await stop.sequence.wait()


async def test_concurrent_runs_share_one_run(stop: Stop) -> None:
    """A later call gets the same report."""
    stage = stop.add(Phase.DRAIN, "slow", Act.SLOW)
    callers = [asyncio.create_task(stop.sequence.run()) for _ in range(2)]
    await stop.clock.advance(1.0)
    first, second = [await caller for caller in callers]
    third = await stop.sequence.run()

    assert len(stage.began_at) == 1
    assert first == second == third
    assert first.clean


async def test_cancelling_a_caller_does_not_cancel_the_run(stop: Stop) -> None:
    """The shutdown goes on."""
    stage = stop.add(Phase.CLOSE, "last")
    stop.add(Phase.DRAIN, "slow", Act.SLOW)
    caller = asyncio.create_task(stop.sequence.run())
    await stop.clock.settle()
    caller.cancel()
    await stop.clock.advance(2.0)

    assert caller.cancelled()
    assert len(stage.began_at) == 1


async def test_run_triggers_the_shutdown(stop: Stop) -> None:
    """This works in a process that was never ready, too."""
    report = await stop.sequence.run()

    assert (report.reason, report.clean) == ("requested", True)


async def test_all_stages_run_after_the_deadline(stop: Stop) -> None:
    """Each gets at least the margin."""
    stages = [stop.add(phase, str(phase)) for phase in Phase]
    stages.append(stop.add(Phase.CLOSE, "hanging", Act.HANG))
    stop.sequence.trigger("SIGTERM")
    await stop.clock.advance(100.0)
    await stop.finish()

    assert [stage.budgets for stage in stages] == [[0.0]] * 5
    assert Outcome.TIMEOUT is stop.outcomes()["hanging"]
    assert stop.elapsed < 100.0 + 2 * CUT_MARGIN


async def test_late_run_shortens_the_budgets(stop: Stop) -> None:
    """The deadline is absolute, so a late run has less time."""
    drain = stop.add(Phase.DRAIN, "drain")
    stop.sequence.trigger("SIGTERM")
    await stop.clock.advance(45.0)
    await stop.finish()

    assert drain.budgets == [14.5]


async def test_zero_budgets_run_every_stage(clock: ManualClock, held: list[Releasable]) -> None:
    """Each stage starts, and is cut at the margin if it hangs."""
    stop = Stop(clock, ShutdownBudgets(readiness_delay=0, drain=0, state=0, connections=0, force=1))
    for phase in Phase:
        held.append(stop.add(phase, f"bad {phase}", Act.SWALLOW))
        stop.add(phase, f"good {phase}")
    await stop.finish()

    assert len(stop.journal) == 8
    assert {Outcome.OK} == {
        outcome for name, outcome in stop.outcomes().items() if name.startswith("good")
    }
    assert 4 * CUT_MARGIN <= stop.elapsed <= 4 * CUT_MARGIN + 0.2


# -- events ----------------------------------------------------------------------------------


async def test_the_report_shows_the_progress(stop: Stop) -> None:
    """Pending, running and done, with durations of the clock."""
    stop.add(Phase.STOP_ACCEPTING, "listeners")
    stop.add(Phase.DRAIN, "requests", Act.SLOW, seconds=10.0)
    stop.add(Phase.CLOSE, "server")
    run = asyncio.create_task(stop.sequence.run())

    await stop.clock.advance(2.0)

    delay, *rest = stop.sequence.report().phases
    assert (
        delay.state,
        delay.duration,
        delay.outcome,
        delay.stages,
    ) == ("running", 2.0, None, ())
    assert {("pending", None, None)} == {(p.state, p.duration, p.outcome) for p in rest}

    await stop.clock.advance(5.0)

    delay, drain, *rest = stop.sequence.report().phases
    assert (delay.state, delay.duration, delay.outcome) == ("done", 5.0, Outcome.OK)
    assert (drain.state, drain.duration) == ("running", 2.0)

    await stop.clock.advance(8.0)

    report = stop.sequence.report()
    assert [phase.duration for phase in report.phases] == [5.0, 10.0, 0.0, 0.0]
    assert [phase.budget for phase in report.phases] == [5.0, 30.0, 5.0, 12.0]
    assert {"done"} == {phase.state for phase in report.phases}
    assert run.result() == report


async def test_listeners_get_the_trigger_and_each_stage(stop: Stop) -> None:
    """The event of a failed stage has its error."""
    events: list[ShutdownEvent] = []
    stop.sequence.subscribe(events.append)
    stop.add(Phase.DRAIN, "requests")
    stop.add(Phase.CLOSE, "server", Act.RAISE)
    await stop.finish()
    triggered, *others = events

    assert isinstance(triggered, ShutdownTriggered)
    assert (triggered.reason, triggered.force_timeout) == ("requested", 60.0)
    assert [(Phase.DRAIN, "requests", None), (Phase.CLOSE, "server", BrokenError)] == [
        (e.phase, e.report.name, type(e.report.error) if e.report.error else None)
        for e in others
        if isinstance(e, StageFinished)
    ]
    began = [e for e in others if isinstance(e, PhaseStarted | StageStarted)]
    names = [getattr(e, "name", None) or str(e.phase) for e in began]
    assert names == [
        "stop accepting",
        "drain",
        "requests",
        "save state",
        "close connections",
        "server",
    ]
    ended = [str(e.phase) for e in others if isinstance(e, PhaseFinished)]
    assert ended == ["stop accepting", "drain", "save state", "close connections"]


async def test_a_listener_error_does_not_stop_the_shutdown(
    stop: Stop, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged, and every stage runs."""

    def broken(_: ShutdownEvent) -> None:
        raise BrokenError("a listener")

    stop.sequence.subscribe(broken)
    stop.add(Phase.DRAIN, "requests")
    report = await stop.finish()

    assert report.clean
    assert {"Event listener failed"} == {record.message for record in caplog.records}


async def test_all_stages_share_one_correlation_id(stop: Stop) -> None:
    """So the log lines of a shutdown can be found together."""
    seen: set[str | None] = set()

    class RecordingStage:
        async def run(self, budget: float) -> None:  # noqa: ARG002 - the port's signature
            seen.add(current_correlation_id())

    for phase in Phase:
        stop.sequence.register(phase, "look", RecordingStage())
    await stop.finish()

    assert len(seen) == 1
    assert None not in seen


async def test_no_readiness_delay_if_it_was_never_ready(clock: ManualClock) -> None:
    """Such an instance gets no traffic."""
    stop = Stop(clock, ShutdownBudgets(readiness_delay=5.0))
    stop.lifecycle = Lifecycle(clock)
    stop.sequence = ShutdownSequence(
        budgets=ShutdownBudgets(readiness_delay=5.0), lifecycle=stop.lifecycle, clock=clock
    )
    stop.add(Phase.STOP_ACCEPTING, "listeners")
    await stop.finish()

    assert stop.elapsed < 1.0
