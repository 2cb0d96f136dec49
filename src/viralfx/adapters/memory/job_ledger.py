"""The job ledger of the embedded default: this process's own memory, and gone with it."""

from bisect import bisect_left, insort
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import islice
from typing import Any
from uuid import UUID

from viralfx.adapters.memory.job_queue import MemoryJobQueue
from viralfx.adapters.memory.job_records import claim_of, is_due, is_of, new_job
from viralfx.adapters.memory.job_workers import MemoryWorkers
from viralfx.domain.clock import Clock
from viralfx.domain.jobs.job import (
    Claim,
    Job,
    JobDraft,
    JobError,
    JobNotFoundError,
    JobState,
    JobStateError,
    LedgerUnavailableError,
    Settlement,
    completed,
    conversation_of,
)
from viralfx.domain.jobs.ledger import Accepted, Found, QueueCounts, Swept


class MemoryJobLedger:
    """Implements ``JobLedger`` in process.

    No step gives way to another, but for the effect of :meth:`settle_with_effect`: each is
    whole. What that effect did is not undone when its job turns out to be no longer its own.
    """

    def __init__(self, clock: Clock, *, most_finished: int = 10_000) -> None:
        """Beyond ``most_finished`` jobs in a final state the oldest of them are forgotten."""
        self._clock = clock
        self._most_finished = most_finished
        self._jobs: dict[str, Job] = {}
        self._ids: list[str] = []
        """In order."""
        self._keys: dict[str, str] = {}
        self._queues: defaultdict[str, MemoryJobQueue] = defaultdict(MemoryJobQueue)
        self._held: defaultdict[str, dict[str, float]] = defaultdict(dict)
        """By worker, when its active jobs were given to it."""
        self._finished: OrderedDict[str, float] = OrderedDict()
        """When jobs reached their final state, in that order."""
        self._workers = MemoryWorkers(clock)
        self._closed = False

    def close(self) -> None:
        """Accept nothing more: the process stops, and would take the job with it."""
        self._closed = True

    async def accept(self, drafts: Sequence[JobDraft]) -> Sequence[Accepted]:
        """Keep the jobs, but for those whose key or id is kept already."""
        if self._closed:
            raise LedgerUnavailableError("the process stops, and its jobs in memory with it")
        return [self._accept(draft) for draft in drafts]

    def _accept(self, draft: JobDraft) -> Accepted:
        known = draft.id if draft.key is None else self._keys.get(draft.key, draft.id)
        if known in self._jobs:
            return Accepted(self._jobs[known], created=False)
        job = new_job(draft, self._clock.now())
        insort(self._ids, job.id)
        if job.key is not None:
            self._keys[job.key] = job.id
        self._put(job)
        return Accepted(job, created=True)

    async def claim(
        self,
        queue: str,
        worker: str,
        limit: int,
        ids: Collection[str] | None = None,
    ) -> Sequence[Claim]:
        """Give due jobs to a worker."""
        if queue not in self._queues:
            return []
        now = self._clock.now()
        if ids is None:
            chosen = [self._jobs[job_id] for job_id in self._queues[queue].pop_due(now, limit)]
        else:
            asked = [job for job_id in set(ids) if (job := self._jobs.get(job_id)) is not None]
            due = [job for job in asked if is_due(job, queue, now)]
            due.sort(key=lambda job: (job.run_at, job.id))
            chosen = due[: max(0, limit)]
        return [self._give(job, worker, now) for job in chosen]

    def _give(self, job: Job, worker: str, now: datetime) -> Claim:
        given = self._move(
            job, state=JobState.ACTIVE, worker=worker, claims=job.claims + 1, started_at=now
        )
        return claim_of(given, worker, now)

    async def settle(self, settlements: Sequence[Settlement]) -> Collection[str]:
        """Record what became of the jobs whose claims are good."""
        return {settled.claim.id for settled in settlements if self._settle(settled)}

    def _settle(self, settled: Settlement) -> bool:
        if (job := self._held_by(settled.claim)) is None:
            return False
        attempts = job.attempts + settled.spends_attempt
        if settled.state is JobState.COMPLETED:
            self._finish(job, JobState.COMPLETED, result=settled.result, error=None)
        elif settled.state is JobState.FAILED:
            self._finish(job, JobState.FAILED, error=settled.error, attempts=attempts)
        else:
            delay, error = settled.delay, settled.error or job.error
            due = job.run_at if delay is None else self._clock.now() + timedelta(seconds=delay)
            self._wait(job, run_at=due, error=error, attempts=attempts)
        return True

    async def settle_with_effect(
        self, claim: Claim, effect: Callable[[Any], Awaitable[bytes]]
    ) -> bool:
        """Run the effect, with None for a connection, and complete the job."""
        if self._held_by(claim) is None:
            return False
        result = await effect(None)
        return self._settle(completed(claim, result))

    async def register(
        self,
        worker: str,
        queues: Collection[str],
        lease: float,
        holding: Collection[str] | None = None,
    ) -> datetime:
        """Note a worker's queues, and until when its lease is good."""
        ends = self._clock.now() + timedelta(seconds=lease)
        self._workers.renew(worker, queues, lease)
        if holding is not None:
            known, long_ago = frozenset(holding), self._clock.monotonic() - lease
            for job_id, given in tuple(self._held.get(worker, {}).items()):
                if given < long_ago and job_id not in known:
                    self._wait(self._jobs[job_id])
        return ends

    async def leave(self, worker: str) -> Mapping[str, Sequence[str]]:
        """Let what the worker has wait again, and forget the worker."""
        returned: defaultdict[str, list[str]] = defaultdict(list)
        for job_id in self._forget(worker):
            job = self._wait(self._jobs[job_id])
            returned[job.queue].append(job.id)
        return dict(returned)

    async def sweep(self, max_crashes: int, before: datetime | None = None) -> Swept:
        """Take the jobs of workers without a good lease, and forget those workers."""
        if before is not None and self._clock.now() >= before:
            return Swept()
        returned: defaultdict[str, list[str]] = defaultdict(list)
        crashed: list[str] = []
        for worker in {*self._held, *self._workers.known}:
            if self._workers.is_alive(worker):
                continue
            for job_id in self._forget(worker):
                job = self._jobs[job_id]
                crashes = job.crashes + 1
                if crashes < max_crashes:
                    returned[job.queue].append(job_id)
                    self._wait(job, crashes=crashes)
                else:
                    crashed.append(job_id)
                    error = JobError(
                        code="crashed",
                        message=f"{crashes} workers died while they ran it, {worker} the last",
                    )
                    self._finish(job, JobState.FAILED, crashes=crashes, error=error)
        return Swept(returned=dict(returned), crashed=crashed)

    def _forget(self, worker: str) -> Iterable[str]:
        self._workers.forget(worker)
        return tuple(self._held.get(worker, ()))

    async def get(self, job_id: str) -> Job | None:
        """Return a job."""
        return self._jobs.get(job_id)

    async def page(
        self,
        *,
        queue: str | None = None,
        state: JobState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> Sequence[Job]:
        """Return jobs by id, downwards."""
        jobs = self._before(before)
        return list(islice((job for job in jobs if is_of(job, queue, state)), max(0, limit)))

    async def find(
        self,
        correlation_id: str,
        *,
        queue: str | None = None,
        state: JobState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> Found:
        """Return jobs of a conversation; all there are were looked at."""
        found = [
            job
            for job in self._before(before)
            if conversation_of(job) == correlation_id and is_of(job, queue, state)
        ]
        return Found(
            jobs=tuple(found[:limit]), before=found[limit - 1].id if found[limit:] else None
        )

    def _before(self, job_id: str | None) -> Iterator[Job]:
        place = len(self._ids) if job_id is None else self._place_of(job_id)
        return (self._jobs[self._ids[at]] for at in range(place - 1, -1, -1))

    def _place_of(self, job_id: str) -> int:
        try:
            return bisect_left(self._ids, str(UUID(job_id)))
        except ValueError:
            return 0

    async def retry(self, job_id: str) -> Job:
        """Have a failed job wait again."""
        job = self._in_state(job_id, JobState.FAILED, "retried")
        return self._wait(job, run_at=self._clock.now(), attempts=0, crashes=0)

    async def cancel(self, job_id: str) -> Job:
        """Cancel a waiting job."""
        job = self._in_state(job_id, JobState.WAITING, "cancelled")
        return self._finish(job, JobState.CANCELLED)

    def _in_state(self, job_id: str, state: JobState, what: str) -> Job:
        if (job := self._jobs.get(job_id)) is None:
            raise JobNotFoundError(f"there is no job {job_id}")
        if job.state is not state:
            raise JobStateError(
                f"job {job_id} is {job.state}; only one that is {state} can be {what}", job.state
            )
        return job

    async def counts(self) -> Mapping[str, QueueCounts]:
        """Return how the queues stand."""
        now, consumers = self._clock.now(), self._workers.consumers()
        idle = {name: QueueCounts(consumers=consumers[name]) for name in consumers}
        known = {name: it.counts(now, consumers[name]) for name, it in self._queues.items()}
        return {**idle, **known}

    async def prune(self, older_than: float, limit: int = 1000) -> int:
        """Forget jobs that are final, those first that have been so for longest."""
        until = self._clock.monotonic() - older_than
        forgotten = 0
        while self._finished and forgotten < limit:
            if next(iter(self._finished.values())) > until:
                break
            self._forget_oldest()
            forgotten += 1
        return forgotten

    def _forget_oldest(self) -> None:
        job = self._jobs.pop(self._finished.popitem(last=False)[0])
        if job.key is not None:
            del self._keys[job.key]
        del self._ids[bisect_left(self._ids, job.id)]

    def _held_by(self, claim: Claim) -> Job | None:
        job = self._jobs.get(claim.id)
        good = job is not None and (job.state, job.claims) == (JobState.ACTIVE, claim.number)
        return job if good else None

    def _wait(self, job: Job, **changes: Any) -> Job:
        return self._move(job, state=JobState.WAITING, worker=None, finished_at=None, **changes)

    def _finish(self, job: Job, state: JobState, **changes: Any) -> Job:
        return self._move(job, state=state, worker=None, finished_at=self._clock.now(), **changes)

    def _move(self, job: Job, **changes: Any) -> Job:
        self._queues[job.queue].take(job)
        if job.worker is not None:
            held = self._held[job.worker]
            del held[job.id]
            if not held:
                del self._held[job.worker]
        self._finished.pop(job.id, None)
        return self._put(replace(job, **changes))

    def _put(self, job: Job) -> Job:
        self._jobs[job.id] = job
        self._queues[job.queue].put(job)
        if job.worker is not None:
            self._held[job.worker][job.id] = self._clock.monotonic()
        if job.state.final:
            self._finished[job.id] = self._clock.monotonic()
            if len(self._finished) > self._most_finished:
                self._forget_oldest()
        return job
