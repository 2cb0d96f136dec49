"""The job ledger of the embedded default: in the memory of this process, lost with it."""

import asyncio
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import islice, takewhile
from typing import Any

from viralfx.core.clock import Clock
from viralfx.core.errors import LedgerFullError, LedgerUnavailableError, UnstorableError
from viralfx.core.loops import HomeLoop
from viralfx.jobs.bulk import Allowance
from viralfx.jobs.codec import ResultError, is_json
from viralfx.jobs.ledger import (
    MAX_ANNOUNCED,
    MAX_UNRUNNABLE,
    NO_LIMITS,
    Accepted,
    BlockingConnection,
    BulkStep,
    Check,
    Claims,
    Found,
    ProgressReport,
    QueueCounts,
    Registration,
    SweepResult,
    UnrunnableJobs,
    WatchedTransaction,
)
from viralfx.jobs.limits import Limit
from viralfx.jobs.memory.job_index import JobIndex, Schedules, TaskLimits, UniqueJobs
from viralfx.jobs.memory.transactions import ForeignTransactions, MemoryTransaction
from viralfx.jobs.model import (
    ANY_JOB,
    HANDED_BACK,
    MAX_HISTORY,
    MAX_TRACEBACKS,
    PAYLOAD,
    UNKNOWN_TASK,
    Claim,
    Job,
    JobAttempt,
    JobDraft,
    JobError,
    JobFilter,
    JobNotFoundError,
    JobState,
    JobStateError,
    Settlement,
    completed,
    crash_message,
    unknown_message,
)

MAX_BYTES = 64 * 2**20
"""Limit for the payloads, results and past errors of all jobs together."""
MAX_EXAMINED_JOBS = 1000
"""Jobs that a search examines in one call."""
MAX_STEP_JOBS = 1000
"""Jobs that one step of a bulk change examines."""


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


class MemoryJobLedger:
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
        self._clock = _MovableClock(clock)
        self._max_unfinished = max_unfinished
        self._max_finished = max_finished
        self._max_bytes = max_bytes
        self._bytes = 0
        self._bytes_finished = 0
        self._jobs: dict[str, Job] = {}
        self._index = JobIndex()
        self._keys: dict[str, str] = {}
        self._twins = UniqueJobs()
        self._held: defaultdict[str, dict[str, float]] = defaultdict(dict)
        """Times of the claims of active jobs, by worker and job id."""
        self._finished: OrderedDict[str, float] = OrderedDict()
        """Times at which jobs became final, oldest first."""
        self._refused: defaultdict[str, set[str]] = defaultdict(set)
        """Workers that could not decode the payload of a job, by job id."""
        self._closed = False
        self.transactions = ForeignTransactions(home or HomeLoop(), self._store)
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
        return self._clock.now()

    def advance(self, moment: datetime) -> None:
        """Move the ledger's time forward, for a test; leases and retention do not notice it."""
        self._clock.ahead += max(timedelta(), moment - self._clock.now())

    def submitted(self) -> list[Job]:
        """Return the jobs that no schedule submitted, by ascending id, for a test."""
        self.transactions.resolve()
        return [self._jobs[job_id] for job_id in sorted(self._jobs.keys() - self._scheduled)]

    def close(self) -> None:
        """Accept no more jobs: the process stops and would lose them."""
        self._closed = True

    async def accept(
        self, drafts: Sequence[JobDraft], *, check: Check | None = None
    ) -> Sequence[Accepted]:
        """Store the jobs whose key and id are new.

        Raises :class:`LedgerFullError` if not all of them fit.
        """
        self._require_open()
        self._make_space([draft for draft in drafts if self._known(draft) is None])
        accepted = [self._accept(draft) for draft in drafts]
        try:
            if check is not None:
                check(accepted)
        except Exception:
            for job in (each.job for each in accepted if each.created):
                self._index.counted[job.queue, job.state] -= 1
                self._twins.finished(job.id)
                self._delete(job)
            raise
        return accepted

    async def accept_in(
        self,
        connection: Any,
        drafts: Sequence[JobDraft],
        *,
        check: Check | None = None,
        on_commit: Callable[[Sequence[Accepted]], None],
    ) -> Sequence[Accepted]:
        """Accept in the transaction of an effect, of SQLAlchemy or of asyncpg.

        The job exists once that transaction has committed.
        """
        blocks = isinstance(connection, BlockingConnection)
        wrapped = blocks or isinstance(connection, WatchedTransaction)
        given = connection.connection if wrapped else connection
        transaction = await self.transactions.find(given, blocks=blocks)
        return await self.transactions.at_home(
            partial(self._accept_in, transaction, drafts, check=check, on_commit=on_commit)
        )

    def _accept_in(
        self,
        transaction: MemoryTransaction,
        drafts: Sequence[JobDraft],
        *,
        check: Check | None,
        on_commit: Callable[[Sequence[Accepted]], None],
    ) -> Sequence[Accepted]:
        self._require_open()
        began, accepted = len(transaction.accepted), []
        for draft in drafts:
            if (job := self._known(draft) or transaction.find(draft)) is None:
                job = new_job(draft, self._clock.now())
                transaction.accepted.append((draft, job))
                accepted.append(Accepted(job, created=True))
            else:
                accepted.append(Accepted(job, created=False))
        try:
            self._make_space([draft for draft, _ in transaction.accepted])
            if check is not None:
                check(accepted)
        except Exception:
            del transaction.accepted[began:]
            raise
        transaction.after_commit.append(partial(on_commit, accepted))
        return accepted

    def commit(self, transaction: MemoryTransaction) -> None:
        """Store the jobs of a transaction of the ledger. Raises as :meth:`accept` does."""
        self._make_space([draft for draft, _ in transaction.accepted])
        self._store(transaction)

    def _store(self, transaction: MemoryTransaction) -> None:
        """Store the jobs of a transaction, also beyond the limits: a database has committed it."""
        for draft, job in transaction.accepted:
            if self._known(draft) is None:
                self._insert(draft, job)
        for call in transaction.after_commit:
            call()

    async def _settle_transactions(self) -> None:
        """Store the jobs of each transaction that has committed, however late it is reported."""
        if self.transactions.ending or self.transactions.of_asyncpg:
            await self.transactions.settle()

    def _require_open(self) -> None:
        if self._closed:
            raise LedgerUnavailableError("the process stops, and its jobs in memory with it")

    def _make_space(self, drafts: Sequence[JobDraft]) -> None:
        if not drafts:
            return
        unfinished = len(self._jobs) - len(self._finished)
        if unfinished + len(drafts) > self._max_unfinished:
            raise LedgerFullError(
                f"the ledger in memory is full: {unfinished} jobs wait or run, and"
                f" JOB_MEMORY_MAX_JOBS={self._max_unfinished}"
            )
        needed = sum(len(draft.payload) for draft in drafts)
        used = self._bytes - self._bytes_finished
        if used + needed > self._max_bytes:
            raise LedgerFullError(
                f"the ledger in memory is full: the payloads of {unfinished} jobs that wait or run"
                f" take {used} of {self._max_bytes} bytes"
            )
        self._drop_finished(self._max_bytes - needed)

    def _known(self, draft: JobDraft) -> Job | None:
        job_id = draft.id if draft.key is None else self._keys.get(draft.key, draft.id)
        return self._jobs.get(job_id) or self._jobs.get(self._twins.holder(draft.unique_key))

    def _accept(self, draft: JobDraft) -> Accepted:
        if (known := self._known(draft)) is not None:
            return Accepted(known, created=False)
        job = new_job(draft, self._clock.now())
        self._insert(draft, job)
        return Accepted(job, created=True)

    def _insert(self, draft: JobDraft, job: Job) -> None:
        self._index.correlate(job)
        if job.key is not None:
            self._keys[job.key] = job.id
        self._twins.add(draft)
        self._put(job)

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

    async def get(self, job_id: str) -> Job | None:
        """Return a job."""
        await self._settle_transactions()
        return self._jobs.get(job_id)

    async def page(self, wanted: JobFilter = ANY_JOB) -> Sequence[Job]:
        """Return jobs by descending id; the cost depends on the size of the page alone."""
        await self._settle_transactions()
        ids = self._index.newest(wanted.queue, wanted.state, wanted.before)
        return [_listed(self._jobs[job_id]) for job_id in islice(ids, wanted.most)]

    async def find(self, correlation_id: str, wanted: JobFilter = ANY_JOB) -> Found:
        """Search the jobs of a correlation id; examines :data:`MAX_EXAMINED_JOBS` per call."""
        await self._settle_transactions()
        return self._search(self._index.correlated(correlation_id, wanted.before), wanted)

    async def search(self, wanted: JobFilter) -> Found:
        """Search jobs by any fields; examines :data:`MAX_EXAMINED_JOBS` per call."""
        await self._settle_transactions()
        return self._search(self._index.newest(wanted.queue, wanted.state, wanted.before), wanted)

    def _search(self, ids: Iterable[str], wanted: JobFilter) -> Found:
        found: list[Job] = []
        last = None
        for examined, job_id in enumerate(ids):
            if examined == MAX_EXAMINED_JOBS:
                return Found(jobs=tuple(found), before=last)
            job = self._jobs[job_id]
            if _matches(job, wanted):
                if len(found) == wanted.most:
                    return Found(jobs=tuple(found), before=found[-1].id)
                found.append(_listed(job))
            last = job_id
        return Found(jobs=tuple(found), before=None)

    async def retry(self, job_id: str) -> Job:
        """Make a failed job due now."""
        return self._retry(self._in_state(job_id, "retried", JobState.FAILED))

    def _retry(self, job: Job) -> Job:
        self._refused.pop(job.id, None)
        return self._wait(job, run_at=self._clock.now(), attempts=0, crashes=0)

    async def run(self, job_id: str) -> Job:
        """Make a waiting job due now."""
        await self._settle_transactions()
        job = self._in_state(job_id, "run now", JobState.WAITING)
        return self._wait(job, run_at=min(job.run_at, self._clock.now()))

    async def cancel(self, job_id: str, *, running: bool = False) -> Job:
        """Cancel a waiting job, or request the cancellation of an active one."""
        await self._settle_transactions()
        states = (JobState.WAITING, *[JobState.ACTIVE] * running)
        return self._cancel(self._in_state(job_id, "cancelled", *states))

    def _cancel(self, job: Job) -> Job:
        if job.state is JobState.WAITING:
            return self._finish(job, JobState.CANCELLED)
        self._twins.finished(job.id)
        return self._update(job, cancel_requested=True)

    def _in_state(self, job_id: str, what: str, *states: JobState) -> Job:
        if (job := self._jobs.get(job_id)) is None:
            raise JobNotFoundError(f"there is no job {job_id}")
        if job.state not in states:
            needed = " or ".join(states)
            raise JobStateError(
                f"job {job_id} is {job.state}; only one that is {needed} can be {what}", job.state
            )
        return job

    async def retry_all(
        self, wanted: JobFilter, most: int | None = None
    ) -> AsyncIterator[BulkStep]:
        """Retry failed jobs that match."""
        allowance = Allowance(most, MAX_STEP_JOBS)
        for ids in self._steps(wanted, JobState.FAILED):
            retried: defaultdict[str, list[str]] = defaultdict(list)
            for job in self._matching(ids, wanted, JobState.FAILED)[: allowance.step]:
                retried[job.queue].append(self._retry(job).id)
            count = allowance.use(sum(map(len, retried.values())))
            yield BulkStep(count=count, ids=dict(retried))
            if not allowance.step:
                break
            await asyncio.sleep(0)

    async def cancel_all(
        self, wanted: JobFilter, most: int | None = None
    ) -> AsyncIterator[BulkStep]:
        """Cancel waiting jobs that match, and request it of active ones."""
        allowance = Allowance(most, MAX_STEP_JOBS)
        for ids in self._steps(wanted, JobState.WAITING, JobState.ACTIVE):
            jobs = self._matching(ids, wanted, JobState.WAITING, JobState.ACTIVE)
            changed = [self._cancel(job) for job in jobs[: allowance.step]]
            yield BulkStep(count=allowance.use(len(changed)))
            if not allowance.step:
                break
            await asyncio.sleep(0)

    def _steps(self, wanted: JobFilter, *states: JobState) -> Iterable[Sequence[str]]:
        """Return the ids of the jobs in some states, as they are now, in portions."""
        ids = [
            job_id
            for state in states
            if wanted.state in (None, state)
            for job_id in self._index.newest(wanted.queue, state, wanted.before)
        ]
        return (ids[at : at + MAX_STEP_JOBS] for at in range(0, len(ids), MAX_STEP_JOBS))

    def _matching(self, ids: Iterable[str], wanted: JobFilter, *states: JobState) -> Sequence[Job]:
        jobs = [self._jobs[job_id] for job_id in ids if job_id in self._jobs]
        return [
            job
            for job in jobs
            if job.state in states and not job.cancel_requested and _matches(job, wanted)
        ]

    async def cancel_requests(self, worker: str) -> Mapping[str, int]:
        """Return the jobs that a worker has to cancel."""
        held = (self._jobs[job_id] for job_id in self._held.get(worker, ()))
        return {job.id: job.claims for job in held if job.cancel_requested}

    async def report(self, reports: Sequence[ProgressReport]) -> None:
        """Store the progress of running jobs."""
        for each in reports:
            if (job := self._held_by(each.claim)) is not None:
                self._update(job, progress=each.progress)

    # -- changes of state --------------------------------------------------------------------

    def _remove_oldest(self) -> None:
        self._remove(next(iter(self._finished)))

    def _remove(self, job_id: str) -> None:
        del self._finished[job_id]
        self._bytes_finished -= _bytes_of(self._jobs[job_id])
        self._delete(self._jobs[job_id])

    def _delete(self, job: Job) -> None:
        del self._jobs[job.id]
        if job.key is not None:
            del self._keys[job.key]
        self._index.remove(job)
        self._refused.pop(job.id, None)
        self._bytes -= _bytes_of(job)
        self._scheduled.discard(job.id)

    def _held_by(self, claim: Claim) -> Job | None:
        job = self._jobs.get(claim.id)
        held = job is not None and (job.state, job.claims) == (JobState.ACTIVE, claim.number)
        return job if held else None

    def _wait(self, job: Job, **changes: Any) -> Job:
        return self._move(
            job,
            state=JobState.WAITING,
            worker=None,
            finished_at=None,
            cancel_requested=False,
            **changes,
        )

    def _release(self, job: Job, **changes: Any) -> Job:
        """Take a job from its worker; it waits, unless its cancellation was requested."""
        if job.cancel_requested:
            return self._finish(job, JobState.CANCELLED, **changes)
        return self._wait(job, **changes)

    def _finish(self, job: Job, state: JobState, **changes: Any) -> Job:
        self._twins.finished(job.id)
        return self._move(
            job,
            state=state,
            worker=None,
            finished_at=self._clock.now(),
            cancel_requested=False,
            **changes,
        )

    def _update(self, job: Job, **changes: Any) -> Job:
        """Change fields of an active job that no index depends on."""
        changed = self._jobs[job.id] = replace(job, **changes)
        self._bytes += _bytes_of(changed) - _bytes_of(job)
        return changed

    def _history(self, job: Job, error: JobError | None) -> tuple[JobAttempt, ...]:
        if error is None:
            return job.history
        attempt = JobAttempt(
            number=job.claims,
            worker=job.worker,
            started_at=job.started_at,
            ended_at=self._clock.now(),
            error=error,
        )
        history = [*job.history, attempt][-MAX_HISTORY:]
        if len(history) > MAX_TRACEBACKS:
            old = history[-MAX_TRACEBACKS - 1]
            history[-MAX_TRACEBACKS - 1] = replace(old, error=replace(old.error, traceback=None))
        return tuple(history)

    def _move(self, job: Job, **changes: Any) -> Job:
        self._index.discard(job)
        self._index.counted[job.queue, job.state] -= 1
        if job.worker is not None:
            held = self._held[job.worker]
            del held[job.id]
            if not held:
                del self._held[job.worker]
        if self._finished.pop(job.id, None) is not None:
            self._bytes_finished -= _bytes_of(job)
        self._bytes -= _bytes_of(job)
        return self._put(replace(job, **changes))

    def _put(self, job: Job) -> Job:
        self._jobs[job.id] = job
        self._bytes += _bytes_of(job)
        self._index.add(job)
        self._index.counted[job.queue, job.state] += 1
        if job.worker is not None:
            self._held[job.worker][job.id] = self._clock.monotonic()
        if job.state.final:
            self._finished[job.id] = self._clock.monotonic()
            self._bytes_finished += _bytes_of(job)
            if len(self._finished) > self._max_finished:
                self._remove_oldest()
            self._drop_finished(self._max_bytes)
        return job

    def _drop_finished(self, max_bytes: int) -> None:
        while self._finished and self._bytes > max_bytes:
            self._remove_oldest()


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


def _bytes_of(job: Job) -> int:
    errors = [each.error for each in job.history]
    texts = sum(len(error.message) + len(error.traceback or "") for error in errors)
    return len(job.payload) + len(job.result or b"") + len(job.progress or b"") + texts


def _matches(job: Job, wanted: JobFilter) -> bool:
    return (
        wanted.queue in (None, job.queue)
        and wanted.state in (None, job.state)
        and wanted.task in (None, job.task)
        and (wanted.code is None or (job.error is not None and job.error.code == wanted.code))
        and (wanted.created_before is None or job.created_at < wanted.created_before)
    )


def _listed(job: Job) -> Job:
    return replace(job, payload=b"", result=None, history=())


def new_job(draft: JobDraft, now: datetime) -> Job:
    """Return the job of a draft that is accepted now."""
    return Job(
        id=draft.id,
        queue=draft.queue,
        task=draft.task,
        state=JobState.WAITING,
        payload=draft.payload,
        key=draft.key,
        correlation_id=draft.correlation_id,
        traceparent=draft.traceparent,
        user_id=draft.user_id,
        priority=draft.priority,
        concurrency_key=draft.concurrency_key,
        created_at=now,
        run_at=now if draft.run_at is None else max(now, draft.run_at),
        asked_run_at=draft.run_at,
        started_at=None,
        finished_at=None,
        attempts=0,
        crashes=0,
        claims=0,
        worker=None,
        result=None,
        error=None,
        max_attempts=draft.max_attempts,
    )
