"""The staged shutdown: its port, phases, budgets and report, and the sequence of its stages."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Protocol, TypeAlias, TypeVar

from viralfx.core.clock import Clock, finished_within, ignore_error
from viralfx.core.correlation import bind_correlation_id, new_correlation_id
from viralfx.core.errors import require_not_negative
from viralfx.core.events import Listener, notify
from viralfx.domain.health.model import Lifecycle, State

T = TypeVar("T")


class ShutdownStage(Protocol):
    """Port: how one part of the process stops.

    Running a stage twice, or before start-up has finished, is safe. A stage returns within
    ``budget`` seconds; shortly after that it is cancelled and abandoned. A stage that raises is
    reported as failed, and the next stage runs anyway.
    """

    async def run(self, budget: float) -> None:
        """Stop within ``budget`` seconds."""
        ...


StageFunction: TypeAlias = Callable[[float], Coroutine[Any, Any, None]]
"""A stage without an object: called with the budget, under the contract of the port."""

AnyStage: TypeAlias = ShutdownStage | StageFunction
"""A stage in either form."""


class Phase(StrEnum):
    """The phases of a shutdown, in order. Every stage belongs to one phase."""

    STOP_ACCEPTING = "stop accepting"
    DRAIN = "drain"
    SAVE_STATE = "save state"
    CLOSE = "close connections"


class Outcome(StrEnum):
    """Result of a stage or phase."""

    OK = "ok"
    FAILED = "failed"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownBudgets:
    """Time budgets in seconds: one for each phase, and ``force`` from the trigger to the end."""

    readiness_delay: float = 0.0
    drain: float = 30.0
    state: float = 5.0
    connections: float = 15.0
    force: float = 60.0

    def __post_init__(self) -> None:
        """Validate the budgets.

        Raises ``ValueError`` if one is negative or not finite, or their sum exceeds ``force``.
        """
        for name in ("readiness_delay", "drain", "state", "connections", "force"):
            require_not_negative(name, getattr(self, name))
        total = self.readiness_delay + self.drain + self.state + self.connections
        # To the microsecond, because a sum of fractions is rarely exact.
        if round(total - self.force, 6) > 0:
            raise ValueError(
                f"the phases need {total:g} s together (readiness delay {self.readiness_delay:g},"
                f" drain {self.drain:g}, state {self.state:g}, connections {self.connections:g})"
                f" but everything is forced to end after {self.force:g} s"
            )

    def of(self, phase: Phase) -> float:
        """Return the budget of a phase in seconds."""
        return {
            Phase.STOP_ACCEPTING: self.readiness_delay,
            Phase.DRAIN: self.drain,
            Phase.SAVE_STATE: self.state,
            Phase.CLOSE: self.connections,
        }[phase]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """Result of one stage. ``duration`` is in seconds."""

    name: str
    outcome: Outcome
    duration: float
    error: BaseException | None = None
    """Used in the log only; responses do not show it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseReport:
    """Progress of one phase. Durations are seconds; ``outcome`` is None until the phase ends."""

    phase: Phase
    budget: float
    state: str
    duration: float | None
    outcome: Outcome | None
    stages: tuple[StageReport, ...]
    """The stages that have ended, in the order of their ends."""
    planned: tuple[str, ...] = ()
    """The names of all stages of the phase, in order; those of other servers may come later."""
    running: Mapping[str, datetime] = field(default_factory=dict)
    """The stages that run now, with the times of their starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownReport:
    """Reason, deadline and progress of the shutdown of this process."""

    reason: str | None
    """None before the shutdown begins."""
    deadline: datetime | None
    phases: tuple[PhaseReport, ...]

    @property
    def clean(self) -> bool:
        """True if every phase has ended and no stage failed or overran its budget."""
        return all(phase.outcome is Outcome.OK for phase in self.phases)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownTriggered:
    """Event: the shutdown began. The process is forced to end after ``force_timeout`` seconds."""

    reason: str
    deadline: datetime
    force_timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStarted:
    """Event: a phase began. ``budget`` is the rest of its time, in seconds."""

    phase: Phase
    budget: float
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted:
    """Event: a stage began. ``budget`` is in seconds."""

    phase: Phase
    name: str
    budget: float
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFinished:
    """Event: a stage ended, successfully or not."""

    phase: Phase
    report: StageReport
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseFinished:
    """Event: a phase ended; its report has the outcome."""

    phase: Phase
    at: datetime


ShutdownEvent = ShutdownTriggered | PhaseStarted | StageStarted | StageFinished | PhaseFinished


CUT_MARGIN = 0.25
"""Seconds after its budget at which a stage is cancelled; a punctual stage ends by itself."""

_MARGIN_STEPS = 4
MIN_STAGE_SECONDS = 0.05
"""Seconds that every stage gets, even if the deadline has passed."""


class ShutdownSequence:
    """Runs the phases in order, once, even if stages fail or hang.

    The first trigger fixes the deadline; later triggers change nothing. Stages of ``DRAIN`` run
    concurrently and share its budget. In the other phases, stages run one after another in the
    order of registration. Each gets an equal share of the remaining time, so that a hanging stage
    cannot use up the time of the stages after it; unused time goes to the next stages.
    """

    def __init__(self, *, budgets: ShutdownBudgets, lifecycle: Lifecycle, clock: Clock) -> None:
        self.budgets = budgets
        self._lifecycle = lifecycle
        self._clock = clock
        self._stages: dict[Phase, dict[str, AnyStage]] = {phase: {} for phase in Phase}
        self._last: dict[Phase, dict[str, AnyStage]] = {phase: {} for phase in Phase}
        self._progress = {phase: _Progress(phase, budgets.of(phase)) for phase in Phase}
        self._listeners: tuple[Listener[ShutdownEvent], ...] = ()
        self._reason: str | None = None
        self._deadline: datetime | None = None
        self._ends_at = float("inf")
        # Reserved, so that the report and the exit code come before the forced end.
        self._reserve = min(0.5, budgets.force / 20)
        self._triggered = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._task: Callable[..., asyncio.Task[None]] = asyncio.create_task

    def register(
        self,
        phase: Phase,
        name: str,
        stage: AnyStage,
        *,
        first: bool = False,
        last: bool = False,
    ) -> None:
        """Add a stage to a phase.

        It runs after the stages registered so far; with ``first`` before them; with ``last``
        after all others, including those registered later. Raises ``ValueError`` if the phase
        already has a stage of that name.
        """
        stages = self._last[phase] if last else self._stages[phase]
        if name in self._all_of(phase):
            raise ValueError(f"phase {phase!r} has a stage named {name!r} already")
        if first:
            self._stages[phase] = {name: stage, **stages}
        else:
            stages[name] = stage

    def _all_of(self, phase: Phase) -> dict[str, AnyStage]:
        return {**self._stages[phase], **self._last[phase]}

    def subscribe(self, listener: Listener[ShutdownEvent]) -> None:
        """Call ``listener`` with each :class:`ShutdownEvent`."""
        self._listeners = (*self._listeners, listener)

    @property
    def triggered(self) -> bool:
        """Whether the shutdown has begun."""
        return self._reason is not None

    def remaining(self) -> float:
        """Seconds until the forced end; infinite before the trigger."""
        return max(0.0, self._ends_at - self._clock.monotonic())

    def trigger(self, reason: str) -> bool:
        """Begin the shutdown; return False if it had begun. Call it on the loop's thread."""
        if self._reason is not None:
            return False
        deadline = self._clock.now() + timedelta(seconds=self.budgets.force)
        self._reason, self._deadline = reason, deadline
        self._ends_at = self._clock.monotonic() + self.budgets.force
        self._lifecycle.advance(State.LAME_DUCK, reason)
        self._triggered.set()
        event = ShutdownTriggered(
            reason=reason, deadline=deadline, force_timeout=self.budgets.force
        )
        notify(self._listeners, event)
        return True

    async def wait(self) -> None:
        """Wait until the shutdown is triggered."""
        await self._triggered.wait()

    async def run(self, *, uncancelled: bool = False) -> ShutdownReport:
        """Run the phases and return the report. Concurrent callers share one run.

        Triggers the shutdown if that has not happened yet. A cancelled call does not end the run.
        ``uncancelled``: code that cancels all tasks of the loop does not end it, either. A stage
        that such code cancels has failed, and the next one runs.
        """
        if self._running is None:
            self.trigger("requested")
            if uncancelled:
                self._task = UncancelledTask
            self._running = self._task(self._run(), name="shutdown")
        if not self._running.done():
            await asyncio.wait({self._running})
        return self.report()

    def report(self) -> ShutdownReport:
        """Return the current progress."""
        return ShutdownReport(
            reason=self._reason,
            deadline=self._deadline,
            phases=tuple(
                replace(
                    progress.report(self._clock.monotonic()), planned=tuple(self._all_of(phase))
                )
                for phase, progress in self._progress.items()
            ),
        )

    async def _run(self) -> None:
        bind_correlation_id(new_correlation_id())
        for phase in Phase:
            progress = self._progress[phase]
            progress.began_at = self._clock.monotonic()
            budget = max(0.0, min(progress.budget, self.remaining() - self._reserve))
            now = self._clock.now()
            notify(self._listeners, PhaseStarted(phase=phase, budget=budget, at=now))
            serving = self._all_of(phase) and self._lifecycle.was_ready
            if phase is Phase.STOP_ACCEPTING and serving:
                # Readiness delay: the service still answers while load balancers learn that it is
                # not ready. It is not needed if no stage here stops accepting, because another
                # server did that, or if the service was never ready.
                await self._clock.sleep(budget)
                budget = 0.0  # the delay was the whole budget
            if phase is Phase.DRAIN:
                self._lifecycle.advance(State.DRAINING, self._reason or "")
                await self._run_together(progress, budget)
            else:
                await self._run_in_order(progress, budget)
            progress.ended_at = self._clock.monotonic()
            notify(self._listeners, PhaseFinished(phase=phase, at=self._clock.now()))
        self._lifecycle.advance(State.STOPPED, self._reason or "")

    async def _run_together(self, progress: "_Progress", budget: float) -> None:
        stages = self._all_of(progress.phase)
        if stages:
            runs = [self._run_stage(progress, name, stages[name], budget) for name in stages]
            await asyncio.wait([self._task(run) for run in runs])

    async def _run_in_order(self, progress: "_Progress", budget: float) -> None:
        stages = self._all_of(progress.phase)
        ends_at = self._clock.monotonic() + budget
        for position, (name, stage) in enumerate(stages.items()):
            left = max(0.0, ends_at - self._clock.monotonic())
            await self._run_stage(progress, name, stage, left / (len(stages) - position))

    async def _run_stage(
        self, progress: "_Progress", name: str, stage: AnyStage, budget: float
    ) -> None:
        began_at, phase, now = self._clock.monotonic(), progress.phase, self._clock.now()
        progress.running[name] = now
        notify(self._listeners, StageStarted(phase=phase, name=name, budget=budget, at=now))
        task = asyncio.create_task(_call(stage, budget), name=f"shutdown-{name}")
        error: BaseException | None = None
        if await self._finished(task, budget):
            outcome = Outcome.OK
            if task.cancelled() or (error := task.exception()) is not None:
                outcome = Outcome.FAILED
        else:
            outcome = Outcome.TIMEOUT
            # Abandoned: a stage that suppresses its cancellation must not delay the next one.
            task.cancel()
            task.add_done_callback(ignore_error)
        report = StageReport(
            name=name,
            outcome=outcome,
            duration=self._clock.monotonic() - began_at,
            error=error,
        )
        del progress.running[name]
        progress.stages.append(report)
        notify(
            self._listeners,
            StageFinished(phase=phase, report=report, at=self._clock.now()),
        )

    async def _finished(self, task: asyncio.Task[None], budget: float) -> bool:
        """Wait for a stage until its budget and the margin are over, or the deadline is.

        The margin has steps. If the process is suspended or has no processor for a moment, that
        takes one step, however long it is, so that the stage still has time to end by itself.
        """
        for seconds in (budget, *[CUT_MARGIN / _MARGIN_STEPS] * _MARGIN_STEPS):
            left = self.remaining() - self._reserve
            if left < MIN_STAGE_SECONDS:
                return await finished_within(task, MIN_STAGE_SECONDS, self._clock)
            if await finished_within(task, min(seconds, left), self._clock):
                return True
        return False


class UncancelledTask(asyncio.Task[T]):
    """An asyncio task that ignores cancellations."""

    def cancel(self, msg: Any = None) -> bool:  # noqa: ARG002 - the signature of asyncio
        """Do nothing; return False."""
        return False


class _Progress:
    """Progress of one phase while it runs."""

    def __init__(self, phase: Phase, budget: float) -> None:
        self.phase = phase
        self.budget = budget
        self.began_at: float | None = None
        self.ended_at: float | None = None
        self.stages: list[StageReport] = []
        self.running: dict[str, datetime] = {}

    def report(self, now: float) -> PhaseReport:
        if self.began_at is None:
            state, duration, outcome = "pending", None, None
        elif self.ended_at is None:
            state, duration, outcome = "running", now - self.began_at, None
        else:
            outcomes = {stage.outcome for stage in self.stages}
            worst = Outcome.FAILED if Outcome.FAILED in outcomes else Outcome.OK
            outcome = Outcome.TIMEOUT if Outcome.TIMEOUT in outcomes else worst
            state, duration = "done", self.ended_at - self.began_at
        return PhaseReport(
            phase=self.phase,
            budget=self.budget,
            state=state,
            duration=duration,
            outcome=outcome,
            stages=tuple(self.stages),
            running=dict(self.running),
        )


async def _call(stage: AnyStage, budget: float) -> None:
    # Everything runs inside the stage's own task, so that a stage that is not a coroutine function
    # fails as a stage instead of ending the sequence.
    # Not isinstance: since Python 3.12 it ignores a method that ``__getattr__`` provides.
    run: Any = getattr(stage, "run", stage)
    await run(budget)
