"""The jobs in memory: accepted, also in transactions, and found and changed by operators."""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any

from viralfx.core.clock import Clock
from viralfx.core.errors import LedgerFullError, LedgerUnavailableError
from viralfx.core.loops import HomeLoop
from viralfx.jobs.bulk import Allowance
from viralfx.jobs.ledger import (
    Accepted,
    BlockingConnection,
    BulkStep,
    Check,
    Found,
    ProgressReport,
    WatchedTransaction,
)
from viralfx.jobs.memory.job_index import JobIndex, UniqueJobs
from viralfx.jobs.memory.transactions import ForeignTransactions, MemoryTransaction
from viralfx.jobs.model import (
    ANY_JOB,
    MAX_HISTORY,
    MAX_TRACEBACKS,
    Claim,
    Job,
    JobAttempt,
    JobDraft,
    JobError,
    JobFilter,
    JobNotFoundError,
    JobState,
    JobStateError,
)

MAX_EXAMINED_JOBS = 1000
"""Jobs that a search examines in one call."""
MAX_STEP_JOBS = 1000
"""Jobs that one step of a bulk change examines."""


class JobChanges:
    """The jobs of a ledger in memory: how they are accepted, found, and changed by id or filter."""

    def __init__(
        self,
        clock: Clock,
        *,
        max_unfinished: int,
        max_finished: int,
        max_bytes: int,
        home: HomeLoop | None,
    ) -> None:
        """Keep no jobs yet; see :class:`MemoryJobLedger` for the limits and for ``home``."""
        self._clock = clock
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
