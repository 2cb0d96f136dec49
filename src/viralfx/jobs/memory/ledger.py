"""The job ledger of the embedded default: in the memory of this process, lost with it."""

import math
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import islice, takewhile
from typing import Any

from viralfx.core.clock import Clock
from viralfx.core.errors import UnstorableError
from viralfx.core.loops import HomeLoop
from viralfx.jobs.codec import ResultError, is_json
from viralfx.jobs.ledger import (
    MAX_ANNOUNCED,
    MAX_UNRUNNABLE,
    NO_LIMITS,
    Claims,
    QueueCounts,
    Registration,
    SweepResult,
    UnrunnableJobs,
)
from viralfx.jobs.limits import Limit
from viralfx.jobs.memory.job_changes import JobChanges
from viralfx.jobs.memory.job_index import Schedules, TaskLimits
from viralfx.jobs.memory.transactions import MemoryTransaction
from viralfx.jobs.model import (
    HANDED_BACK,
    PAYLOAD,
    UNKNOWN_TASK,
    Claim,
    Job,
    JobError,
    JobState,
    Settlement,
    completed,
    crash_message,
    unknown_message,
)

MAX_BYTES = 64 * 2**20
"""Limit for the payloads, results and past errors of all jobs together."""


@dataclass(frozen=True, slots=True)
class _Worker:
    """The registration of a worker."""

    valid_until: float
    """End of the lease, in seconds of the monotonic clock."""
    queues: frozenset[str]
    tasks: frozenset[str] | None
    """The tasks that it knows; None: all."""
    eligible: bool


class _MovableClock:
    """A clock whose time of day can be moved forward; leases are in monotonic time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.ahead = timedelta()
        self.monotonic = clock.monotonic

    def now(self) -> datetime:
        return self._clock.now() + self.ahead

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)


class MemoryJobLedger(JobChanges):
    """Implements ``JobLedger`` in process.

    Each method runs without interruption, apart from the effect of :meth:`settle_with_effect`.
    Of that effect only the jobs that it submits are rolled back.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        max_unfinished: int = 10_000,
        max_finished: int = 10_000,
        max_bytes: int = MAX_BYTES,
        home: HomeLoop | None = None,
    ) -> None:
        """Set the limits; without them the ledger would grow until the process is killed.

        The ledger refuses new jobs beyond ``max_unfinished`` waiting and active jobs. It drops the
        oldest final jobs beyond ``max_finished``, and to keep payloads and results within
        ``max_bytes``; if that is not enough, it refuses new jobs. ``home`` is the event loop that
        changes it, also for transactions in other threads.
        """
        self._movable = _MovableClock(clock)
        super().__init__(
            self._movable,
            max_unfinished=max_unfinished,
            max_finished=max_finished,
            max_bytes=max_bytes,
            home=home,
        )
        self._workers: dict[str, _Worker] = {}
        self._limits = TaskLimits(self._index, clock)
        self._paused: set[str] = set()
        self._unknown: dict[tuple[str, str], tuple[float, float]] = {}
        """Queues and tasks that no worker knows: since when, and when that was last seen."""
        schedules = Schedules(clock, self.accept)
        self.declare_schedules = schedules.declare
        self.accept_scheduled = schedules.accept
        self.schedules = schedules.states
        self.pause_schedule = schedules.pause
        self.resume_schedule = schedules.resume
        self._scheduled = schedules.job_ids

    def now(self) -> datetime:
        """Return the ledger's time."""
        return self._movable.now()

    def advance(self, moment: datetime) -> None:
        """Move the ledger's time forward, for a test; leases and retention do not notice it."""
        self._movable.ahead += max(timedelta(), moment - self._movable.now())

    def submitted(self) -> list[Job]:
        """Return the jobs that no schedule submitted, by ascending id, for a test."""
        self.transactions.resolve()
        return [self._jobs[job_id] for job_id in sorted(self._jobs.keys() - self._scheduled)]

    def _delete(self, job: Job) -> None:
        super()._delete(job)
        self._scheduled.discard(job.id)

    async def claim(
        self,
        queue: str,
        worker: str,
        limit: int,
        ids: Collection[str] | None = None,
        *,
        tasks: Collection[str] | None = None,
        limits: Mapping[str, Limit] = NO_LIMITS,
    ) -> Claims:
        """Assign due jobs to a worker."""
        if queue in self._paused or limit < 1:
            return Claims()
        now = self._clock.now()

        def is_mine(job_id: str) -> bool:
            return worker not in self._refused.get(job_id, ())

        if ids is None:
            chosen, again_in = self._limits.choose(queue, limit, tasks, limits, is_mine)
            due = [self._jobs[job_id] for job_id in chosen]
        else:
            jobs = [job for job_id in set(ids) if (job := self._jobs.get(job_id)) is not None]
            known = [job for job in jobs if tasks is None or job.task in tasks]
            mine = (job for job in known if job.task not in limits and is_mine(job.id))
            due = [job for job in mine if _is_due(job, queue, now)]
            due.sort(key=lambda job: (-job.priority, job.run_at, job.id))
            due, again_in = due[:limit], math.inf
        return Claims([self._assign(job, worker, now) for job in due], again_in)

    async def pause(self, queue: str) -> None:
        """Let no job of a queue be claimed until it is resumed."""
        self._paused.add(queue)

    async def resume(self, queue: str, limit: int = MAX_ANNOUNCED) -> Sequence[str]:
        """End the pause of a queue; return the ids of due jobs."""
        self._paused.discard(queue)
        return list(islice(self._index.due(queue, self._clock.now()), limit))

    def _assign(self, job: Job, worker: str, now: datetime) -> Claim:
        self._twins.claimed(job.id)
        active = self._move(
            job, state=JobState.ACTIVE, worker=worker, claims=job.claims + 1, started_at=now
        )
        return _claim_of(active, worker, now)

    async def due(
        self,
        queues: Collection[str],
        tasks: Collection[str] | None = None,
        *,
        within: float = 0.0,
    ) -> Mapping[str, float]:
        """Return the queues with a job of one of the tasks that is due soon enough."""
        now = self._clock.now()
        running = (queue for queue in queues if queue not in self._paused)
        firsts = {queue: self._index.first_due(queue, tasks) for queue in running}
        seconds = {
            queue: max(0.0, (first - now).total_seconds())
            for queue, first in firsts.items()
            if first is not None
        }
        return {queue: left for queue, left in seconds.items() if left <= within}

    async def settle(self, settlements: Sequence[Settlement]) -> Collection[str]:
        """Record the outcomes of the jobs whose claims are the latest."""
        results = (each.result for each in settlements if each.result is not None)
        if not all(map(is_json, results)):
            raise UnstorableError("the result is not JSON")
        return {settled.claim.id for settled in settlements if self._settle(settled)}

    def _settle(self, settled: Settlement) -> bool:
        if (job := self._held_by(settled.claim)) is None:
            return False
        attempts = job.attempts + settled.spends_attempt
        progress = settled.progress or job.progress
        if settled.state is JobState.COMPLETED:
            self._finish(
                job, JobState.COMPLETED, result=settled.result, error=None, progress=progress
            )
            return True
        error = job.error if settled.error is None else replace(settled.error, traceback=None)
        changes = {
            "error": error,
            "attempts": attempts,
            "progress": progress,
            "history": self._history(job, settled.attempt_error),
        }
        if settled.state is JobState.CANCELLED or job.cancel_requested:
            self._finish(job, JobState.CANCELLED, **changes)
        elif settled.state is JobState.FAILED:
            self._finish(job, JobState.FAILED, **changes)
        else:
            delay = settled.delay
            if settled.refused:
                delay = None if job.id in self._refused else 0.0
                self._refused[job.id].add(settled.claim.worker)
            due = job.run_at if delay is None else self._clock.now() + timedelta(seconds=delay)
            self._wait(job, run_at=due, **changes)
        return True

    async def settle_with_effect(
        self,
        claim: Claim,
        effect: Callable[[Any], Awaitable[bytes]],
        progress: Callable[[], bytes | None] = lambda: None,
    ) -> bool:
        """Run the effect with a :class:`MemoryTransaction`, and complete the job."""
        if self._held_by(claim) is None:
            return False
        transaction = MemoryTransaction()
        result = await effect(transaction)
        if not is_json(result):
            raise ResultError("the result cannot be stored: it is not JSON")
        if self._held_by(claim) is None:
            return False
        self.commit(transaction)
        return self._settle(completed(claim, result)._replace(progress=progress()))

    async def register(
        self,
        worker: str,
        queues: Collection[str],
        lease: float,
        holding: Collection[str] | None = None,
        *,
        tasks: Collection[str] | None = None,
        eligible: bool = True,
        grace: float | None = None,
    ) -> Registration:
        """Store a worker with the end of its lease."""
        ends, now = self._clock.now() + timedelta(seconds=lease), self._clock.monotonic()
        known_tasks = None if tasks is None else frozenset(tasks)
        self._workers[worker] = _Worker(now + lease, frozenset(queues), known_tasks, eligible)
        if holding is not None:
            known, old = frozenset(holding), now - (lease if grace is None else grace)
            for job_id, claimed_at in tuple(self._held.get(worker, {}).items()):
                if (grace == 0 or claimed_at < old) and job_id not in known:
                    self._release(self._jobs[job_id])
        living = self._living()
        eligible_others = (name for name in living if living[name].eligible and name != worker)
        first = min(eligible_others, default=None)
        return Registration(
            lease_until=ends,
            # Itself even if it has no queue.
            workers=1
            + sum(
                name != worker and not each.queues.isdisjoint(queues)
                for name, each in living.items()
            ),
            leader=eligible and (first is None or worker < first),
            leader_for=math.inf if first is None else living[first].valid_until - now,
        )

    def _living(self) -> Mapping[str, _Worker]:
        return {name: each for name, each in self._workers.items() if self._is_alive(name)}

    async def deregister(self, worker: str) -> Mapping[str, Sequence[str]]:
        """Hand back the worker's jobs, and remove the worker."""
        returned: defaultdict[str, list[str]] = defaultdict(list)
        for job_id in self._remove_worker(worker):
            job = self._jobs[job_id]
            job = self._release(job, history=self._history(job, HANDED_BACK))
            if job.state is JobState.WAITING:
                returned[job.queue].append(job.id)
        return dict(returned)

    async def sweep(self, max_crashes: int, before: datetime | None = None) -> SweepResult:
        """Take the jobs of workers without a valid lease, and remove those workers."""
        if before is not None and self._clock.now() >= before:
            return SweepResult()
        returned: defaultdict[str, list[str]] = defaultdict(list)
        crashed: list[str] = []
        cancelled: list[str] = []
        for worker in {*self._held, *self._workers}:
            if self._is_alive(worker):
                continue
            for job_id in self._remove_worker(worker):
                job = self._jobs[job_id]
                crashes = job.crashes + 1
                end = JobError(code="crashed", message=f"the lease of worker {worker} ran out")
                changes = {"crashes": crashes, "history": self._history(job, end)}
                if job.cancel_requested:
                    cancelled.append(job_id)
                    self._finish(job, JobState.CANCELLED, **changes)
                elif crashes < max_crashes:
                    returned[job.queue].append(job_id)
                    self._wait(job, **changes)
                else:
                    crashed.append(job_id)
                    error = JobError(code="crashed", message=crash_message(crashes, worker))
                    self._finish(job, JobState.FAILED, error=error, **changes)
        return SweepResult(returned=dict(returned), crashed=crashed, cancelled=cancelled)

    async def expire(
        self, patience: float, before: datetime | None = None
    ) -> Mapping[str, Sequence[str]]:
        """Fail jobs that no worker could run."""
        if before is not None and self._clock.now() >= before:
            return {}
        now, watched, self._unknown = self._clock.monotonic(), self._unknown, {}
        latest = self._clock.now() - timedelta(seconds=patience)
        failed: defaultdict[str, list[str]] = defaultdict(list)
        for queue, task in self._due_tasks():
            workers, since = self._workers_for(queue, task), now
            if not workers:
                since, seen = watched.get((queue, task), (now, now))
                since = now if seen < now - patience / 2 else since
                self._unknown[queue, task] = since, now
            if not (self._refused if workers else since <= now - patience):
                continue
            for job_id in tuple(self._index.due(queue, latest, [task])):
                job = self._jobs[job_id]
                error = JobError(code=UNKNOWN_TASK, message=unknown_message(task, patience))
                if workers:
                    error = JobError(code=PAYLOAD, message=job.error.message if job.error else "")
                if workers <= self._refused.get(job_id, set()):
                    self._finish(job, JobState.FAILED, error=error)
                    failed[error.code].append(job_id)
        return failed

    async def unrunnable(self) -> Sequence[UnrunnableJobs]:
        """Count the due jobs that no worker can run."""
        found: list[UnrunnableJobs] = []
        for queue, task in sorted(self._due_tasks()):
            workers = self._workers_for(queue, task)
            code = PAYLOAD if workers else UNKNOWN_TASK
            due = self._index.due(queue, self._clock.now(), [task])
            cannot = (job_id for job_id in due if workers <= self._refused.get(job_id, set()))
            if count := sum(1 for _ in islice(cannot, MAX_UNRUNNABLE)):
                found.append(UnrunnableJobs(queue, task, code, count))
        return found

    def _due_tasks(self) -> Sequence[tuple[str, str]]:
        """Return the tasks of due jobs, of the queues that a worker consumes."""
        consumed = {queue for each in self._living().values() for queue in each.queues}
        return [
            (queue, task)
            for queue in self._index.queues
            if queue in consumed
            for task in self._index.tasks(queue)
            if any(self._index.due(queue, self._clock.now(), [task]))
        ]

    def _workers_for(self, queue: str, task: str) -> set[str]:
        return {
            name
            for name, each in self._living().items()
            if queue in each.queues and (each.tasks is None or task in each.tasks)
        }

    def _is_alive(self, worker: str) -> bool:
        found = self._workers.get(worker)
        return found is not None and found.valid_until > self._clock.monotonic()

    def _remove_worker(self, worker: str) -> Sequence[str]:
        self._workers.pop(worker, None)
        return tuple(self._held.get(worker, ()))

    async def counts(self) -> Mapping[str, QueueCounts]:
        """Return the counts of each queue."""
        await self._settle_transactions()
        living = self._living().values()
        consumers = Counter(queue for worker in living for queue in worker.queues)
        blocked = Counter(queue for w in living if not w.eligible for queue in w.queues)
        now = self._clock.now()
        return {
            queue: self._index.counts(
                queue,
                now,
                consumers=consumers[queue],
                blocked=blocked[queue],
                paused=queue in self._paused,
            )
            for queue in {*consumers, *self._index.queues, *self._paused}
        }

    async def prune(
        self, older_than: float, limit: int = 1000, *, failed: bool | None = None
    ) -> int:
        """Delete jobs that have been final for long enough, oldest first."""
        until = self._clock.monotonic() - older_than
        old = takewhile(lambda job_id: self._finished[job_id] <= until, self._finished)
        chosen = [
            job_id
            for job_id in old
            if failed in (None, self._jobs[job_id].state is JobState.FAILED)
        ][: max(0, limit)]
        for job_id in chosen:
            self._remove(job_id)
        return len(chosen)


def _is_due(job: Job, queue: str, now: datetime) -> bool:
    return job.queue == queue and job.state is JobState.WAITING and job.run_at <= now


def _claim_of(job: Job, worker: str, now: datetime) -> Claim:
    """Return the claim of a job that is assigned to a worker now."""
    return Claim(
        id=job.id,
        queue=job.queue,
        task=job.task,
        payload=job.payload,
        worker=worker,
        number=job.claims,
        attempt=job.attempts + 1,
        crashes=job.crashes,
        correlation_id=job.correlation_id,
        traceparent=job.traceparent,
        user_id=job.user_id,
        created_at=job.created_at,
        due_since=max(0.0, (now - job.run_at).total_seconds()),
        max_attempts=job.max_attempts,
    )
