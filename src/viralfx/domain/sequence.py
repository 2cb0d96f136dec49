"""The ordered stop itself: phases under one absolute deadline, each stage run come what may."""

import asyncio
from datetime import datetime, timedelta

from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.correlation import bind_correlation_id, new_correlation_id
from viralfx.domain.events import Listener, notify
from viralfx.domain.lifecycle import Lifecycle, State
from viralfx.domain.shutdown import (
    Outcome,
    Phase,
    PhaseReport,
    ShutdownBudgets,
    ShutdownEvent,
    ShutdownReport,
    ShutdownStage,
    ShutdownTriggered,
    StageFinished,
    StageReport,
)

CUT_MARGIN = 0.25
"""Seconds past its budget at which a stage is cut, so that one that keeps to it ends by itself."""

_LEAST = 0.05
"""Seconds that every stage gets, however late it is."""


class ShutdownSequence:
    """Runs the phases in order, once, whatever the stages do.

    The deadline is fixed at the first trigger; later triggers join and change nothing. Stages of
    ``DRAIN`` run together and share its budget. In the other phases they run one after another in
    the order of registration, each within an equal share of what is left, so that one that hangs
    cannot take the time of those behind it; time not used passes on.
    """

    def __init__(self, *, budgets: ShutdownBudgets, lifecycle: Lifecycle, clock: Clock) -> None:
        self.budgets = budgets
        self._lifecycle = lifecycle
        self._clock = clock
        self._stages: dict[Phase, dict[str, ShutdownStage]] = {phase: {} for phase in Phase}
        self._last: dict[Phase, dict[str, ShutdownStage]] = {phase: {} for phase in Phase}
        self._progress = {phase: _Progress(phase, budgets.of(phase)) for phase in Phase}
        self._listeners: tuple[Listener[ShutdownEvent], ...] = ()
        self._reason: str | None = None
        self._deadline: datetime | None = None
        self._ends_at = float("inf")
        # Kept back from the budgets, so that a report and an exit code come before the force.
        self._reserve = min(0.5, budgets.force / 20)
        self._triggered = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def register(
        self,
        phase: Phase,
        name: str,
        stage: ShutdownStage,
        *,
        first: bool = False,
        last: bool = False,
    ) -> None:
        """Add a stage at the end of a phase, at its beginning, or behind all to come.

        Raises ``ValueError`` when the phase has a stage of that name.
        """
        stages = self._last[phase] if last else self._stages[phase]
        if name in self._all_of(phase):
            raise ValueError(f"phase {phase!r} has a stage named {name!r} already")
        if first:
            self._stages[phase] = {name: stage, **stages}
        else:
            stages[name] = stage

    def _all_of(self, phase: Phase) -> dict[str, ShutdownStage]:
        return {**self._stages[phase], **self._last[phase]}

    def subscribe(self, listener: Listener[ShutdownEvent]) -> None:
        """Call ``listener`` with :class:`ShutdownTriggered` and each :class:`StageFinished`."""
        self._listeners = (*self._listeners, listener)

    @property
    def triggered(self) -> bool:
        """Whether the shutdown has begun."""
        return self._reason is not None

    def remaining(self) -> float:
        """Seconds until the forced end; infinite before the trigger."""
        return max(0.0, self._ends_at - self._clock.monotonic())

    def trigger(self, reason: str) -> bool:
        """Begin the shutdown; False when it had begun already. Call it on the loop's thread."""
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
        """Return once the shutdown was triggered."""
        await self._triggered.wait()

    async def run(self) -> ShutdownReport:
        """Run the phases and report; a second caller shares the first one's run.

        Without a trigger before it, the run itself is one.
        """
        if self._running is None:
            self.trigger("requested")
            self._running = asyncio.create_task(self._run(), name="shutdown")
        if not self._running.done():
            await asyncio.wait({self._running})
        return self.report()

    def report(self) -> ShutdownReport:
        """Say how far it is."""
        return ShutdownReport(
            reason=self._reason,
            deadline=self._deadline,
            phases=tuple(p.report(self._clock.monotonic()) for p in self._progress.values()),
        )

    async def _run(self) -> None:
        bind_correlation_id(new_correlation_id())
        for phase in Phase:
            progress = self._progress[phase]
            progress.began_at = self._clock.monotonic()
            budget = max(0.0, min(progress.budget, self.remaining() - self._reserve))
            serving = self._all_of(phase) and self._lifecycle.was_ready
            if phase is Phase.STOP_ACCEPTING and serving:
                # Still serving: the time others need to learn that this instance is leaving.
                # Where nothing here stops accepting, somebody else already did, and who was never
                # ready has nobody to tell.
                await self._clock.sleep(budget)
                budget = 0.0  # and then at once
            if phase is Phase.DRAIN:
                self._lifecycle.advance(State.DRAINING, self._reason or "")
                await self._run_together(progress, budget)
            else:
                await self._run_in_order(progress, budget)
            progress.ended_at = self._clock.monotonic()
        self._lifecycle.advance(State.STOPPED, self._reason or "")

    async def _run_together(self, progress: "_Progress", budget: float) -> None:
        stages = self._all_of(progress.phase)
        if stages:
            runs = [self._run_stage(progress, name, stages[name], budget) for name in stages]
            await asyncio.wait([asyncio.create_task(run) for run in runs])

    async def _run_in_order(self, progress: "_Progress", budget: float) -> None:
        stages = self._all_of(progress.phase)
        ends_at = self._clock.monotonic() + budget
        for position, (name, stage) in enumerate(stages.items()):
            left = max(0.0, ends_at - self._clock.monotonic())
            await self._run_stage(progress, name, stage, left / (len(stages) - position))

    async def _run_stage(
        self, progress: "_Progress", name: str, stage: ShutdownStage, budget: float
    ) -> None:
        began_at = self._clock.monotonic()
        task = asyncio.create_task(_call(stage, budget), name=f"shutdown-{name}")
        error: BaseException | None = None
        left = max(_LEAST, self.remaining() - self._reserve)
        if await finished_within(task, min(budget + CUT_MARGIN, left), self._clock):
            outcome = Outcome.OK
            if task.cancelled() or (error := task.exception()) is not None:
                outcome = Outcome.FAILED
        else:
            outcome = Outcome.TIMEOUT
            # Left behind: a stage that swallows cancellation must not hold up the next one.
            task.cancel()
            task.add_done_callback(_retrieve)
        report = StageReport(
            name=name,
            outcome=outcome,
            duration=self._clock.monotonic() - began_at,
            error=error,
        )
        progress.stages.append(report)
        notify(self._listeners, StageFinished(phase=progress.phase, report=report))


class _Progress:
    """Where a phase is."""

    def __init__(self, phase: Phase, budget: float) -> None:
        self.phase = phase
        self.budget = budget
        self.began_at: float | None = None
        self.ended_at: float | None = None
        self.stages: list[StageReport] = []

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
        )


def _retrieve(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()


async def _call(stage: ShutdownStage, budget: float) -> None:
    # In a task of its own from the first line on, so that a ``run`` that is no coroutine function
    # fails as a stage instead of stopping the sequence.
    await stage.run(budget)
