"""Work that one worker does for all: rescue of jobs, retention, and jobs of schedules."""

import asyncio
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from viralfx.core.clock import Clock, default_rng
from viralfx.core.correlation import new_correlation_id
from viralfx.core.errors import LedgerUnavailableError
from viralfx.core.ids import new_job_id
from viralfx.jobs.codec import unique_key_of
from viralfx.jobs.ledger import JobLedger, SweepResult
from viralfx.jobs.limits import scheduled_key_of
from viralfx.jobs.model import JobDraft
from viralfx.jobs.schedule import Schedule, ScheduleState
from viralfx.jobs.worker.context import WorkerContext
from viralfx.jobs.worker.lease import Heartbeat
from viralfx.jobs.worker.poller import SECONDS_PER_WORKER
from viralfx.jobs.worker.role import Role
from viralfx.resilience.deadline import Deadline

_logger = logging.getLogger("viralfx.jobs")

_MAX_EXPIRY_PAUSE_SECONDS = 60.0
"""Time between two searches for jobs that no worker can run; less if the patience is short."""

_STAND_IN_SECONDS, _STAND_IN_SECONDS_PER_WORKER = 60.0, 12.0
"""The shortest time between two sweeps of a worker that does not lead. With many workers it is
longer, so that together they make one such sweep in so many seconds."""


class Sweeper(Role):
    """Rescues the jobs of dead workers, and fails jobs that no worker can run.

    Other systems call this a reaper or rescuer.

    Of all live workers the leader sweeps, at least every ``interval`` seconds and at random times.
    Each of the others does so seldom, because a leader may renew its lease and be unable to sweep,
    for example without a free connection in its pool. Two sweeps at a time do no harm.

    After an outage of the ledger that outlasts leases, every worker appears dead. Therefore a
    worker sweeps only after the ledger has answered, and its own lease has been valid, for ``hold``
    seconds, in which all live workers renew their leases; a new worker waits as well. Each sweep
    has a deadline, so that a call that hangs through an outage takes no job afterwards.
    """

    name = "job-sweep"

    def __init__(
        self,
        context: WorkerContext,
        heartbeat: Heartbeat,
        *,
        interval: float,
        hold: float,
        max_crashes: int,
        unknown_patience: float,
        rng: random.Random | None = None,
    ) -> None:
        self._context = context
        self._heartbeat = heartbeat
        self._interval = interval
        self._hold = hold
        self._max_crashes = max_crashes
        self._unknown_patience = unknown_patience
        self._expire_at = -math.inf
        self._rng = rng or default_rng()
        self._swept_at = 0.0
        # Differs between workers that start together.
        self._spread = self._rng.uniform(0.75, 1.25)

    async def run(self) -> None:
        """Sweep until cancelled."""
        clock, availability = self._context.clock, self._context.availability
        self._swept_at = clock.monotonic()
        try:
            while not self.stopping:
                await clock.sleep(self._interval * self._rng.uniform(0.9, 1.0))
                unbroken_for = self._heartbeat.unbroken_for(clock.monotonic())
                steady_for = min(availability.steady_for, unbroken_for)
                now = clock.monotonic()
                if not (self._heartbeat.leads(now) or self._stands_in(now)):
                    availability.skip("sweep")
                elif steady_for >= self._hold:
                    self._swept_at = now
                    await self._sweep()
                elif steady_for > 0:
                    availability.skip("sweep")
        finally:
            availability.remove("sweep")

    def _stands_in(self, now: float) -> bool:
        share = _STAND_IN_SECONDS_PER_WORKER * self._heartbeat.workers
        return now - self._swept_at >= max(_STAND_IN_SECONDS, share) * self._spread

    async def _sweep(self) -> None:
        context = self._context
        try:
            before = self._heartbeat.others_valid_until
            result = await context.ledger.sweep(self._max_crashes, before)
            # Before the next call, which may fail.
            _log(result)
            for queue, ids in result.returned.items():
                context.notify(queue, ids)
            _log_failed(await self._expire(before))
        except Exception as error:  # noqa: BLE001 - other workers sweep too, and this one retries
            context.availability.failed("sweep", error)
            return
        context.availability.succeeded("sweep")

    async def _expire(self, before: datetime | None) -> Mapping[str, Sequence[str]]:
        """Fail jobs that no worker can run; that is seldom urgent, so not with every sweep."""
        now = self._context.clock.monotonic()
        if now < self._expire_at:
            return {}
        expired = await self._context.ledger.expire(self._unknown_patience, before)
        self._expire_at = now + min(self._unknown_patience / 10, _MAX_EXPIRY_PAUSE_SECONDS)
        return expired


def _log(result: SweepResult) -> None:
    returned = sum(len(ids) for ids in result.returned.values())
    if returned:
        _logger.warning("Jobs of dead workers are due again", extra={"count": returned})
    for job_id in result.cancelled:
        _logger.info("Job cancelled", extra={"job": job_id})
    _log_failed({"crashed": result.crashed})


def _log_failed(failed: Mapping[str, Sequence[str]]) -> None:
    for code, ids in failed.items():
        for job_id in ids:
            _logger.error("Job failed", extra={"job": job_id, "code": code})


BATCH_JOBS = 1000
PAUSE_SECONDS = 0.02
"""The shortest pause between two batches.

A pause is as long as the batch before it, so that deletion takes at most half of a connection and
jobs get the rest of the server.
"""
PERIOD_SECONDS = 60.0
_BUDGET_SECONDS = 45.0
"""The longest time for the batches of one period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long the ledger keeps final jobs, in seconds; 0: without limit."""

    finished: float = 0.0
    """For completed and cancelled jobs."""
    failed: float = 0.0

    @property
    def is_limited(self) -> bool:
        """True if any jobs are deleted."""
        return self.finished > 0 or self.failed > 0

    async def prune(self, ledger: JobLedger, deadline: Deadline, clock: Clock) -> int:
        """Delete older jobs, until none is left or ``deadline`` has passed; return how many."""
        pruned = 0
        for failed, older_than in ((False, self.finished), (True, self.failed)):
            while older_than and deadline.remaining() > 0:
                started = clock.monotonic()
                batch = await ledger.prune(older_than, BATCH_JOBS, failed=failed)
                pruned += batch
                if batch < BATCH_JOBS:
                    break
                await clock.sleep(max(PAUSE_SECONDS, clock.monotonic() - started))
        return pruned


class Pruner(Role):
    """Applies the retention every minute. Of all live workers only the leader does.

    It is no job, because a job would wait behind the other jobs of its queue.
    """

    name = "job-prune"

    def __init__(self, context: WorkerContext, heartbeat: Heartbeat, retention: Retention) -> None:
        self._context = context
        self._heartbeat = heartbeat
        self._retention = retention

    async def run(self) -> None:
        """Prune until cancelled."""
        clock, availability = self._context.clock, self._context.availability
        try:
            while not self.stopping:
                await clock.sleep(PERIOD_SECONDS)
                leads = self._heartbeat.leads(clock.monotonic())
                if not (leads and self._retention.is_limited):
                    # No call, so no sign that the ledger answers.
                    availability.skip("prune")
                    continue
                deadline = Deadline(_BUDGET_SECONDS, clock=clock)
                try:
                    await self._retention.prune(self._context.ledger, deadline, clock)
                except Exception as error:  # noqa: BLE001 - the next period tries again
                    availability.failed("prune", error)
                else:
                    availability.succeeded("prune")
        finally:
            availability.remove("prune")


_PAYLOAD = b"null"
_PATIENCE_SECONDS = 5.0
"""The shortest time that a worker leaves a due run to the one that submits the schedule."""
_MAX_SLEEP_SECONDS = 10.0
"""After this time the ledger's time is estimated again, since a server's clock may be set."""
_DECLARE_SECONDS = 3600.0
_FORGET_SECONDS = 90 * 86_400.0
"""A schedule that no worker has declared for this time is deleted from the ledger.

Any worker deletes those of all kinds, so it is longer than the outage of one kind: with the row the
last run is lost, and a missed one is not made up for.
"""


@dataclass(slots=True)
class _Entry:
    """A schedule of this worker."""

    schedule: Schedule
    step: str
    """The name of its step in the availability of the ledger."""
    handled_until: datetime
    """No run up to this moment is left."""
    next: datetime | None
    """The first run that is left; None: none in 50 years."""
    submits: bool = False
    """True if this worker submitted its last job."""

    def handle(self, until: datetime) -> None:
        """Leave out the runs up to a moment."""
        if until > self.handled_until:
            self.handled_until, self.next = until, self.schedule.next_after(until)


class Scheduler(Role):
    """Submits a job for each run of the schedules of the worker's tasks.

    The ledger accepts one job for each run, from the first worker, and its clock counts. A run
    costs one call, and not one of each worker: the worker that submitted the last job of a schedule
    submits the next one, and so does the leader. The others ask after a few seconds whether a run
    is left.
    """

    name = "job-schedule"

    def __init__(
        self, context: WorkerContext, heartbeat: Heartbeat, *, rng: random.Random | None = None
    ) -> None:
        self._context = context
        self._heartbeat = heartbeat
        self._entries: dict[str, _Entry] = {}
        self._declare_at = -math.inf
        self._renewed = asyncio.Event()
        # Differs between workers, so that they do not look at the same moment.
        self._spread = (rng or default_rng()).uniform(1.0, 2.0)

    def wake(self) -> None:
        """Continue if the worker had no lease: it was renewed."""
        self._renewed.set()

    async def run(self) -> None:
        """Submit until cancelled."""
        clock, availability = self._context.clock, self._context.availability
        schedules = [each.schedule for each in self._context.tasks if each.schedule is not None]
        try:
            while schedules and not self.stopping:
                while not self._heartbeat.is_valid(clock.monotonic()):
                    self._renewed.clear()
                    await self._renewed.wait()
                try:
                    if clock.monotonic() >= self._declare_at:
                        await self._declare(schedules)
                    pause = await self._submit_due()
                except Exception as error:  # noqa: BLE001 - the worker must go on
                    pause = availability.failed("schedule", error)
                await clock.sleep(pause)
        finally:
            for step in ("schedule", *(each.step for each in self._entries.values())):
                availability.remove(step)

    async def _declare(self, schedules: list[Schedule]) -> None:
        now = self._ledger_time()
        states = await self._context.ledger.declare_schedules(schedules, _FORGET_SECONDS)
        self._context.availability.succeeded("schedule")
        known = {each.task: each for each in schedules}
        for state in states:
            if state.task not in self._entries:
                schedule, until = known[state.task], state.handled_until
                self._entries[state.task] = _Entry(
                    schedule, f"schedule {state.task}", until, schedule.next_after(until)
                )
        self._handle(states, now)
        self._declare_at = self._context.clock.monotonic() + _DECLARE_SECONDS

    def _handle(self, states: Sequence[ScheduleState], now: datetime) -> None:
        """Leave out the runs that the ledger accepts no more; ``now``: before it was asked."""
        for state in states:
            until = state.settled_until if state.paused_at is None else now
            if until is not None and (entry := self._entries.get(state.task)) is not None:
                entry.handle(until)

    async def _submit_due(self) -> float:
        """Submit the due jobs; return the seconds until the next run."""
        availability = self._context.availability
        now, entries = self._ledger_time(), self._entries.values()
        if any(self._wait(each, now) <= 0 < self._patience(each) for each in entries):
            # One call for all schedules that other workers should have submitted.
            self._handle(await self._context.ledger.schedules(), now)
            availability.succeeded("schedule")
        else:
            availability.skip("schedule")
        pause = _MAX_SLEEP_SECONDS
        for task, entry in tuple(self._entries.items()):
            if (wait := self._wait(entry, now)) > 0:
                availability.skip(entry.step)
            else:
                try:
                    wait = await self._submit(entry, now)
                except LedgerUnavailableError as error:
                    # The others would wait as long. Each of them is the first one in turn.
                    self._entries[task] = self._entries.pop(task)
                    return availability.failed(entry.step, error)
                except Exception as error:  # noqa: BLE001 - must not stop the other schedules
                    wait = availability.failed(entry.step, error)
            pause = min(pause, wait)
        return pause

    def _ledger_time(self) -> datetime:
        now = self._heartbeat.ledger_time(self._context.clock.monotonic())
        assert now is not None  # noqa: S101 - the lease is valid, so it was renewed
        return now

    def _wait(self, entry: _Entry, now: datetime) -> float:
        """Return the seconds until this worker submits the next job of a schedule."""
        if entry.next is None:
            return math.inf
        return (entry.next - now).total_seconds() + self._patience(entry)

    def _patience(self, entry: _Entry) -> float:
        """Return the seconds for which a due time is left to other workers."""
        if entry.submits or self._heartbeat.leads(self._context.clock.monotonic()):
            return 0.0
        share = SECONDS_PER_WORKER * self._heartbeat.workers
        return max(_PATIENCE_SECONDS, share) * self._spread

    async def _submit(self, entry: _Entry, now: datetime) -> float:
        """Submit the jobs of a schedule that are due; return the seconds until the next run."""
        for time in entry.schedule.due(entry.handled_until, now):
            if not await self._accept(entry, time):
                break
        else:
            self._context.availability.skip(entry.step)
            entry.handle(now)
        return max(0.0, self._wait(entry, self._ledger_time()))

    async def _accept(self, entry: _Entry, time: datetime) -> bool:
        """Submit the job for one time; return False if another worker did."""
        task = self._context.tasks.find(entry.schedule.task)
        draft = JobDraft(
            id=new_job_id(),
            queue=task.queue,
            task=task.name,
            payload=_PAYLOAD,
            run_at=time,
            correlation_id=new_correlation_id(),
            priority=task.priority,
            unique=task.unique,
            unique_key=None if task.unique is None else unique_key_of(task.name, _PAYLOAD),
            concurrency_key=scheduled_key_of(task.concurrency_key),
        )
        accepted = await self._context.ledger.accept_scheduled(draft)
        self._context.availability.succeeded(entry.step)
        if accepted is None:
            # The ledger has lost it: it was deleted by hand, or because no worker was alive.
            self._declare_at = -math.inf
            return False
        entry.submits = accepted.created
        entry.handle(accepted.handled_until)
        if accepted.created:
            self._context.notify(draft.queue, (draft.id,))
        return accepted.created
