"""The executions of one queue: so many at once, each until the ledger has its outcome."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from viralfx.domain.jobs.execution import Execution, Executor
from viralfx.domain.jobs.job import Claim, JobState, Settlement, handed_back
from viralfx.domain.jobs.settling import Settler
from viralfx.domain.jobs.suspects import Suspects, is_suspect

_logger = logging.getLogger("viralfx.jobs")


class Slots:
    """Runs claimed jobs.

    A slot is free again when its task has ended: the next job is claimed while the outcome is
    recorded. What is not recorded is bounded, too: it is never more than twice the slots. So are
    tasks that were left behind and still run: when they and those that run are twice the slots,
    nothing more begins until one ends.
    """

    def __init__(
        self,
        queue: str,
        count: int,
        *,
        executor: Executor,
        settler: Settler,
        suspects: Suspects,
        ring: Callable[[str, Sequence[str]], None],
    ) -> None:
        """``ring`` is called with the ids of jobs that were handed back."""
        self.queue = queue
        self.count = count
        self._executor = executor
        self._settler = settler
        self._suspects = suspects
        self._ring = ring
        self._on_room: Callable[[], None] = _nothing
        self._on_wait: Callable[[float], None] = _nothing
        self._running: set[Execution] = set()
        self._unrecorded: set[Execution] = set()
        self._left_behind: set[asyncio.Task[None]] = set()
        self._told = False
        self._stopping = False
        self.room = asyncio.Event()
        """Set while a slot is free."""
        self.room.set()
        self.abandoned = 0
        """Tasks that ran on after their timeout cancelled them, so far."""
        self.recorded = 0
        """Executions that had an outcome of their own, so far."""
        self.handed_back = 0
        """Jobs that wait again only because this worker leaves."""

    def subscribe(self, on_room: Callable[[], None], on_wait: Callable[[float], None]) -> None:
        """Call ``on_room`` when there is a free slot again after there was none.

        And call ``on_wait`` with the seconds after which a job is to be tried again.
        """
        self._on_room, self._on_wait = on_room, on_wait

    @property
    def free(self) -> int:
        """How many jobs may begin now."""
        waited_for = max(len(self._unrecorded), len(self._left_behind))
        return min(self.count, 2 * self.count - waited_for) - len(self._running)

    @property
    def active(self) -> int:
        """How many jobs there are, those included whose outcome is being recorded."""
        return len(self._running) + len(self._unrecorded)

    @property
    def holding(self) -> Sequence[str]:
        """The ids of these jobs."""
        return [each.claim.id for each in (*self._running, *self._unrecorded)]

    @property
    def runners(self) -> Sequence[asyncio.Task[None]]:
        """What these jobs are waited for by."""
        executions = (*self._running, *self._unrecorded)
        return [each.runner for each in executions if each.runner is not None]

    def begin(self, claim: Claim) -> None:
        """Run a job that was claimed."""
        execution = Execution(claim)
        self._running.add(execution)
        self._count_room()
        self._launch(execution, self._run(execution))

    def _launch(self, execution: Execution, run: Coroutine[Any, Any, None]) -> None:
        execution.runner = asyncio.create_task(run, name=execution.claim.id)
        execution.runner.add_done_callback(lambda runner: self._ended(execution, runner))

    async def _run(self, execution: Execution) -> None:
        claim = execution.claim
        if self._stopping:  # its claim was under way
            await self._record(execution, handed_back(claim))
        elif not is_suspect(claim):
            await self._record(execution, await self._executor.execute(execution))
        elif self._suspects.enter(execution):
            try:
                await self._record(execution, await self._execute_alone(execution))
            finally:  # not before: what is unrecorded would count as killed by the next one
                self._suspects.leave(execution)
        else:
            deferral = self._suspects.defer(claim)
            try:
                await self._record(execution, deferral)
            finally:
                self._suspects.deferred(deferral, self._on_wait)

    async def _execute_alone(self, execution: Execution) -> Settlement | None:
        try:
            await self._suspects.alone()
            return await self._executor.execute(execution)
        except asyncio.CancelledError:
            if execution.called_back:
                return handed_back(execution.claim)
            raise

    async def _record(self, execution: Execution, settlement: Settlement | None) -> None:
        if execution.abandoned:
            return
        execution.recording = True
        self._running.discard(execution)
        if settlement is not None:
            self._unrecorded.add(execution)
        self._count_room()
        if settlement is None:
            self.recorded += 1
        elif await self._settler.settle(settlement):
            self._recorded(settlement)

    def _recorded(self, settlement: Settlement) -> None:
        waits = settlement.state is JobState.WAITING
        if waits and self._stopping and settlement.error is None:
            self.handed_back += 1
            self._ring(self.queue, (settlement.claim.id,))
            return
        self.recorded += 1
        # What was put off for other reasons is for whoever looks first: this worker does not know
        # the task, for example, and another one may.
        if waits and settlement.spends_attempt:
            self._on_wait(settlement.delay or 0.0)

    def _ended(self, execution: Execution, runner: asyncio.Task[None]) -> None:
        self._running.discard(execution)
        self._unrecorded.discard(execution)
        self._left_behind.discard(runner)
        self._count_room()
        if not runner.cancelled() and (error := runner.exception()) is not None:
            runner.get_loop().call_exception_handler(
                {"message": "Job execution failed", "exception": error, "future": runner}
            )

    def _count_room(self) -> None:
        self._tell_of_those_left_behind()
        if self.free <= 0:
            self.room.clear()
        elif not self.room.is_set():
            self.room.set()
            self._on_room()

    def _tell_of_those_left_behind(self) -> None:
        count = len(self._left_behind)
        if not self._told and count >= 2 * self.count and not self._stopping:
            self._told = True
            _logger.error(
                "Queue stands still: its tasks ignore that they are cancelled",
                extra={"queue": self.queue, "running": count},
            )
        elif self._told and count <= self.count:
            self._told = False
            _logger.info(
                "Queue has all its slots again", extra={"queue": self.queue, "running": count}
            )

    # -- what does not end by itself ---------------------------------------------------------

    def abandon_late(self) -> None:
        """Leave behind each task that was late already when this was called before."""
        for execution in tuple(self._running):
            if execution.late:
                self._abandon(execution)
            elif execution.is_late():
                execution.late = True

    def _abandon(self, execution: Execution) -> None:
        self.abandoned += 1
        self._leave_behind(execution)
        claim = execution.claim
        recording = Execution(claim)
        self._launch(recording, self._record(recording, self._executor.overrun(claim)))

    def _leave_behind(self, execution: Execution) -> None:
        execution.abandoned = True
        self._running.discard(execution)
        self._suspects.leave(execution)
        if execution.runner is not None:
            self._left_behind.add(execution.runner)  # a task needs somebody who holds it
        self._count_room()

    def stop(self) -> None:
        """Hand back what begins from now on."""
        self._stopping = True

    def call_back(self) -> None:
        """Cancel the tasks that run, so that their jobs are handed back; after :meth:`stop`."""
        for execution in tuple(self._running):
            execution.call_back()

    def leave_all_behind(self) -> int:
        """Wait for no task any more; return how many ignored that they were called back."""
        ignoring = sum(not execution.recording for execution in self._running)
        for execution in tuple(self._running):
            execution.cancel()
            self._leave_behind(execution)
        return ignoring


def _nothing(*_: object) -> None:
    pass
