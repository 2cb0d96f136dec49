"""Consumes one queue: decides when to claim, and runs the claimed jobs in its slots."""

import asyncio
import logging
import math
from collections.abc import Collection, Coroutine, Sequence
from functools import partial
from typing import Any

from viralfx.core.clock import default_rng, report_crash, supervised, wait_for
from viralfx.jobs.model import JobState, Settlement, handed_back
from viralfx.jobs.notifier import DUE_MARGIN_SECONDS, JobNotification, JobNotifier
from viralfx.jobs.worker.calls import JobTask
from viralfx.jobs.worker.completer import Completer
from viralfx.jobs.worker.context import WorkerContext
from viralfx.jobs.worker.due_times import DueTimes
from viralfx.jobs.worker.execution import CANCEL_GRACE_SECONDS, Executor
from viralfx.jobs.worker.lease import Heartbeat
from viralfx.jobs.worker.quarantine import PoisonJobQuarantine, may_be_poison
from viralfx.jobs.worker.running import Execution

_logger = logging.getLogger("viralfx.jobs")

SECONDS_BETWEEN_CLAIMS = 0.005
"""Average time between the claims of two workers for the same job."""


class QueueConsumer:
    """Claims jobs of a queue, and runs up to ``slots`` of them at once.

    It claims the announced jobs. It polls when it starts, when :meth:`poll` is called, when a job
    that it knows is due, and at once if the last poll filled all free slots. A failed claim is
    tried again.

    A slot is free again when its task has ended; the outcome is recorded while the next job runs.
    Jobs whose outcome is not recorded yet and running jobs together are at most twice the slots.
    The same limit holds for abandoned tasks that still run: at twice the slots no job starts until
    one of them ends.
    """

    def __init__(
        self,
        context: WorkerContext,
        queue: str,
        slots: int,
        *,
        notifier: JobNotifier,
        heartbeat: Heartbeat,
        executor: Executor,
        completer: Completer,
        quarantine: PoisonJobQuarantine,
        late_claim: float,
    ) -> None:
        """``late_claim``: seconds after which the answer to a claim is late."""
        self.queue = queue
        self.slots = slots
        self._step = f"claim {queue}"
        self._context = context
        self._clock = context.clock
        self._notifier = notifier
        self._heartbeat = heartbeat
        self._executor = executor
        self._completer = completer
        self._quarantine = quarantine
        self._late_claim = late_claim
        self._claim_began: float | None = None
        """When the claim that runs began; its jobs are not among ``holding`` yet."""
        self._listening: asyncio.Future[None] | None = None
        self._abandoning: asyncio.Task[None] | None = None
        self.claiming: asyncio.Task[None] | None = None
        """The task that claims; None before the start."""
        self._announced: dict[str, None] = {}
        self._surplus: Sequence[str] = ()
        """Announced ids that it may be unable to claim; its next claim shows whether they wait."""
        self._poll_again = False
        self._claim_announced_at = 0.0
        """When the announced jobs may be claimed."""
        self._rng = default_rng()
        self._poll_at = 0.0
        self._limited_until = math.inf
        """When the limits of tasks may allow more of the jobs that they keep back."""
        self._not_before = 0.0
        self._due = DueTimes()
        self._stopping = False
        self._wake = asyncio.Event()
        quarantine.subscribe(self._wake.set)
        self._next_claim_made = asyncio.Event()
        """Set once the next claim has been made."""
        self._running: set[Execution] = set()
        self._unrecorded: set[Execution] = set()
        self._abandoned: set[asyncio.Task[None]] = set()
        self._blocked = False
        self._slot_free = asyncio.Event()
        self._slot_free.set()
        self.abandoned = 0
        """Tasks so far that ignored the cancellation by their timeout."""
        self.recorded = 0
        """Executions so far whose outcome was recorded."""
        self.handed_back = 0
        """Jobs so far that were handed back because the worker stops."""

    @property
    def free_slots(self) -> int:
        """How many jobs may start now."""
        waited_for = max(len(self._unrecorded), len(self._abandoned))
        return min(self.slots, 2 * self.slots - waited_for) - len(self._running)

    @property
    def active(self) -> int:
        """How many jobs it has, including those whose outcome is being recorded."""
        return len(self._running) + len(self._unrecorded)

    @property
    def holding(self) -> Sequence[str]:
        """The ids of these jobs."""
        return [each.claim.id for each in (*self._running, *self._unrecorded)]

    @property
    def running(self) -> Collection[Execution]:
        """The executions whose tasks run."""
        return tuple(self._running)

    @property
    def busy_until(self) -> float:
        """The monotonic time of the latest deadline of running jobs; minus infinity without."""
        now = self._clock.monotonic()
        left = [each.deadline.remaining() for each in self._running if each.deadline is not None]
        return now + max(left, default=-math.inf)

    def is_claim_late(self) -> bool:
        """Return True if jobs may have been claimed for long that are not among ``holding``."""
        began = self._claim_began
        return began is not None and self._clock.monotonic() - began > self._late_claim

    @property
    def jobs(self) -> Sequence[asyncio.Task[None]]:
        """The asyncio tasks of these jobs."""
        executions = (*self._running, *self._unrecorded)
        return [each.task for each in executions if each.task is not None]

    def polls_within(self, seconds: float) -> bool:
        """Return True if it polls without a call of :meth:`poll` by then, once it can."""
        # The limits of tasks may keep their jobs back for hours, but not those of other tasks.
        limited_for = self._limited_until - self._clock.monotonic()
        return self._poll_again or self._poll_at < math.inf or limited_for <= seconds

    def has_work_before(self, moment: float) -> bool:
        """Return True if it has jobs, or knows a job that is due before a monotonic time."""
        return self.active > 0 or self._due.first <= moment

    def is_limited_until(self, moment: float) -> bool:
        """Return True if limits keep all due jobs back beyond a monotonic time."""
        claims_anyway = self._poll_again or self._announced or self._poll_at < math.inf
        return not claims_anyway and moment < self._limited_until < math.inf

    # -- start and stop ----------------------------------------------------------------------

    def start(self) -> None:
        """Listen and claim, on the running loop; call it once."""
        if self._notifier.broadcasts:
            self._listen()
        self.claiming = supervised(self._run(), f"job-queue-{self.queue}")

    def _listen(self) -> None:
        if self._listening is None:
            listening = self._notifier.listen(self.queue, self.on_notification, self.slots)
            self._listening = supervised(listening, f"job-notifications-{self.queue}")

    def stop_listening(self) -> None:
        """Take no more notifications; polls go on."""
        self._listening = self._listening or asyncio.get_running_loop().create_future()
        self._listening.cancel()

    def stop(self) -> None:
        """Claim no more, and hand back each job of a running claim.

        The announced jobs that were not claimed are announced to the other workers.
        """
        self._stopping = True
        self._wake.set()
        announced, self._announced = (*self._announced, *self._surplus), {}
        self._context.notify(self.queue, announced)

    def cancel_claiming(self) -> None:
        """Stop waiting for the claim that runs."""
        if self.claiming is not None:
            self.claiming.cancel()

    def hand_back_running(self) -> None:
        """Cancel the running tasks, so that their jobs are handed back; call :meth:`stop` first."""
        for execution in tuple(self._running):
            execution.hand_back()

    def abandon_all(self) -> int:
        """Stop waiting for running tasks; return how many ignored their cancellation."""
        if self._abandoning is not None:
            self._abandoning.cancel()
        ignoring = sum(not execution.recording for execution in self._running)
        for execution in tuple(self._running):
            execution.cancel()
            self._abandon(execution)
        return ignoring

    # -- reasons to claim --------------------------------------------------------------------

    async def on_notification(self, notification: JobNotification) -> None:
        """Accept a notification; return when this worker can take the next one.

        Returns after a claim that left a slot free, the next one at the earliest. This is the
        backpressure: a worker at full load polls, and the notifier gives the rest to others. If
        every worker receives it, it returns at once, and claims later.
        """
        if self._notifier.broadcasts:
            self._claim_soon(notification.ids)
            return
        next_claim_made = self._next_claim_made
        if not self._poll_again:
            free = max(0, self.free_slots - len(self._announced))
            self._announced.update(dict.fromkeys(notification.ids[:free]))
            if surplus := notification.ids[free:]:
                # This worker polls until the queue is empty. Others may have free slots for more.
                self._poll_again = True
                if self._stopping or self._pause() is not None:
                    self._context.notify(self.queue, surplus)
                else:
                    self._surplus = surplus
            self._wake.set()
        await next_claim_made.wait()
        while self._poll_again:
            await self._next_claim_made.wait()
        await self._slot_free.wait()

    def _claim_soon(self, ids: Sequence[str]) -> None:
        """Claim after a random time, since other workers received the same notification.

        The more workers there are, the longer it is, so that the first of them finds the job after
        a few milliseconds and the others come when it is taken.
        """
        moment = self._clock.monotonic() + self._random_pause()
        if 0 < len(ids) <= self.free_slots - len(self._announced):
            earlier = self._claim_announced_at if self._announced else moment
            self._claim_announced_at = min(earlier, moment)
            self._announced.update(dict.fromkeys(ids))
        else:
            self._poll_at = min(self._poll_at, moment)
        self._wake.set()

    def _random_pause(self) -> float:
        others = self._heartbeat.workers - 1
        return self._rng.uniform(0.0, others * SECONDS_BETWEEN_CLAIMS)

    def poll(self) -> None:
        """Poll the ledger as soon as a slot is free."""
        self._poll_at = 0.0
        self._wake.set()

    def wake(self) -> None:
        """Check again whether to claim: a slot became free, or the lease was renewed."""
        self._wake.set()

    def poll_when_due(self, seconds: float) -> bool:
        """Poll for a job that is due in ``seconds``, as other workers do that know of it.

        Returns False if a poll was planned for that moment already.
        """
        moment = self._clock.monotonic() + seconds
        if self._due.has(moment):
            return False
        self.poll_after(seconds + self._random_pause())
        return True

    def poll_after(self, seconds: float) -> None:
        """Poll, in addition to the interval, after ``seconds``."""
        if self._due.add(self._clock.monotonic() + seconds + DUE_MARGIN_SECONDS):
            self._wake.set()

    # -- claiming ----------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                pause = self._pause()
                if pause is None:
                    await self._claim()
                    self._listen()  # before its first lease it would keep jobs from other workers
                elif pause == math.inf:
                    await self._wake.wait()
                else:
                    await wait_for(self._wake, pause, self._clock)
        finally:
            self._context.availability.remove(self._step)

    def _pause(self) -> float | None:
        """Return the seconds to wait before the next claim; None: claim now."""
        now = self._clock.monotonic()
        if self.free_slots <= 0 or not self._heartbeat.is_secure(now):
            return math.inf  # a change of either calls wake()
        if (least := max(self._quarantine.isolated_for(), self._not_before - now)) > 0:
            return least
        if self._poll_again:
            return None
        announced_at = self._claim_announced_at if self._announced else math.inf
        seconds = min(self._next_poll, announced_at) - now
        return seconds if seconds > 0 else None

    @property
    def _next_poll(self) -> float:
        return min(self._poll_at, self._limited_until, self._due.first)

    async def _claim(self) -> None:
        """Claim announced jobs, or any if a poll is due, and start them."""
        context, limit = self._context, self.free_slots
        ids, releases = self._take_announced(limit), context.begun.releases
        surplus, self._surplus = self._surplus, ()
        claim_made, self._next_claim_made = self._next_claim_made, asyncio.Event()
        self._claim_began = self._clock.monotonic()
        try:
            with self._quarantine.claiming():
                claims = await context.ledger.claim(
                    self.queue,
                    context.worker,
                    limit,
                    ids,
                    tasks=context.tasks.names,
                    limits=context.tasks.limits,
                )
        except Exception as error:  # noqa: BLE001 - the consumer must not end
            # The next poll finds the announced jobs.
            pause = context.availability.failed(self._step, error)
            self._poll_at = self._not_before = self._clock.monotonic() + pause
            if surplus:
                context.notify(self.queue, surplus)
            return
        finally:
            self._claim_began = None
            claim_made.set()
        context.availability.succeeded(self._step)
        if claims.again_in < math.inf:
            pause = claims.again_in + DUE_MARGIN_SECONDS + self._random_pause()
            self._limited_until = self._clock.monotonic() + pause
        for claim in claims:
            execution = Execution(claim, releases)
            self._running.add(execution)
            self._launch(execution, self._run_job(execution))
        self._update_slot_free()
        if ids is None:
            self._poll_again = self._poll_again or len(claims) == limit
            if surplus and len(claims) == limit:
                context.notify(self.queue, surplus)
        elif len(claims) < len(ids) and not self._notifier.broadcasts:
            # Another worker claimed them in a poll, perhaps instead of jobs that are still due.
            self.poll()

    def _take_announced(self, limit: int) -> Sequence[str] | None:
        """Return the announced jobs to claim; None: poll.

        Polls also while notifications keep arriving: it is the only way to find due jobs that were
        not announced.
        """
        now = self._clock.monotonic()
        polls = self._poll_again or now >= self._next_poll
        # Jobs of tasks with limits are claimed only by polls. If every worker received the ids, one
        # that finds too few of them does not poll: most find that other workers have claimed them.
        limited = self._context.has_limits(None if self._notifier.broadcasts else self.queue)
        if self._announced and not polls and not limited:
            ids = list(self._announced)[:limit]
            for job_id in ids:
                del self._announced[job_id]
            return ids
        # A reason to poll that arises from here on leads to another poll.
        self._due.drop_until(now)
        self._poll_at = self._limited_until = math.inf
        self._announced.clear()
        self._poll_again = False
        return None

    # -- running a job -----------------------------------------------------------------------

    def _launch(self, execution: Execution, run: Coroutine[Any, Any, None]) -> None:
        execution.task = JobTask(run, job=execution.claim.id)
        execution.task.add_done_callback(partial(self._ended, execution))
        if self._abandoning is None:
            self._abandoning = supervised(self._abandon_late(), f"job-timeouts-{self.queue}")

    async def _run_job(self, execution: Execution) -> None:
        claim, quarantine = execution.claim, self._quarantine
        execution.begun = True
        poison, deferral = may_be_poison(claim), None
        try:
            settlement: Settlement | None
            if self._stopping:  # the claim was under way when the worker stopped
                settlement = handed_back(claim)
            elif self._context.begun.is_released(execution):
                settlement = Settlement(claim=claim, state=JobState.WAITING, delay=0.0)
            elif not poison:
                settlement = await self._executor.execute(execution)
            elif quarantine.try_acquire(execution):
                settlement = await quarantine.execute_alone(execution, self._executor)
            else:
                settlement = deferral = quarantine.defer(claim)
            await self._record(execution, settlement)
        finally:
            if deferral is not None:
                quarantine.deferred(deferral, self.poll_after)
            elif poison:
                # Not earlier: a crash would count for a job that is not recorded yet.
                quarantine.release(execution)

    async def _record(self, execution: Execution, settlement: Settlement | None) -> None:
        if execution.abandoned:
            return
        execution.recording = True
        self._running.discard(execution)
        if settlement is not None:
            self._unrecorded.add(execution)
        self._update_slot_free()
        if settlement is None:
            self.recorded += 1
            return
        released = self._context.begun.is_released(execution)
        recorded = await self._completer.settle(settlement, released=released)
        if not (recorded or released):
            return
        waits = settlement.state is JobState.WAITING
        back = recorded and waits and self._stopping and settlement.error is None
        self.handed_back += back
        self.recorded += not (back or released)
        if back or released or settlement.refused:
            self._context.notify(self.queue, (settlement.claim.id,))
        # A job that waits for another reason is left to the next poll of any worker.
        elif waits and (settlement.spends_attempt or execution.delayed_itself):
            self.poll_after(settlement.delay or 0.0)

    def _ended(self, execution: Execution, task: asyncio.Task[None]) -> None:
        self._running.discard(execution)
        self._unrecorded.discard(execution)
        self._abandoned.discard(task)
        self._context.begun.end(execution)
        self._update_slot_free()
        # Its outcome is recorded, so a limit may allow one more. A claim that runs may have counted
        # it still.
        limited = self._limited_until < math.inf or self._claim_began is not None
        if limited and execution.claim.task in self._context.tasks.limits:
            self.poll()
        report_crash(task)

    def _update_slot_free(self) -> None:
        if self._abandoned or self._blocked:
            self._log_if_blocked()
        if self.free_slots <= 0:
            self._slot_free.clear()
        elif not self._slot_free.is_set():
            self._slot_free.set()
            self._wake.set()

    def _log_if_blocked(self) -> None:
        count = len(self._abandoned)
        fields = {"queue": self.queue, "running": count}
        if not self._blocked and count >= 2 * self.slots and not self._stopping:
            self._blocked = True
            _logger.error("Queue is blocked: its tasks ignore their cancellation", extra=fields)
        elif self._blocked and count <= self.slots:
            self._blocked = False
            _logger.info("Queue has all its slots again", extra=fields)

    # -- tasks that ignore their cancellation ------------------------------------------------

    async def _abandon_late(self) -> None:
        """While jobs run, abandon each task that two checks in a row found late."""
        try:
            while self._running:
                await self._clock.sleep(CANCEL_GRACE_SECONDS)
                for execution in tuple(self._running):
                    if not execution.is_late():
                        continue  # or its outcome is being recorded
                    if execution.late:
                        self._time_out(execution)
                    execution.late = True
        finally:
            self._abandoning = None

    def _time_out(self, execution: Execution) -> None:
        self.abandoned += 1
        self._abandon(execution)
        recording = Execution(execution.claim)
        self._context.begun.replace(execution, recording)
        # At once: a renewal of the lease that does not name the job makes it due again.
        self._unrecorded.add(recording)
        self._launch(recording, self._record(recording, self._executor.timed_out(execution)))

    def _abandon(self, execution: Execution) -> None:
        execution.abandoned = True
        self._running.discard(execution)
        self._quarantine.release(execution)
        if execution.task is not None:
            self._abandoned.add(execution.task)  # asyncio itself keeps only weak references
        self._update_slot_free()
