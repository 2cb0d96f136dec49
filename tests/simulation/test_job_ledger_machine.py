"""The ledger in memory under any steps, compared with a model that looks at everything."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.manual_clock import ManualClock

from viralfx.jobs.ledger import QueueCounts
from viralfx.jobs.memory import MemoryJobLedger
from viralfx.jobs.model import (
    Claim,
    JobDraft,
    JobError,
    JobFilter,
    JobNotFoundError,
    JobState,
    JobStateError,
    Unique,
    completed,
    failed,
    handed_back,
    postponed,
    retried,
)

QUEUES = ["default", "analytics"]
WORKERS = ["a", "b", "c"]
ERROR = JobError(code="error", message="the task raised")
LEASE = 10.0
MAX_JOBS = 4
"""At a time: few jobs have long lives."""

ResultT = TypeVar("ResultT")


@dataclass
class Modelled:
    """The model of a job."""

    id: str
    queue: str
    key: str | None
    due: datetime
    state: JobState = JobState.WAITING
    attempts: int = 0
    crashes: int = 0
    claims: int = 0
    worker: str | None = None
    given: float = 0.0
    finished: float = 0.0
    pruned: bool = False
    error: str | None = None
    stopping: bool = False
    """Its cancellation was requested while it ran."""
    past: int = 0
    """Executions that did not complete it."""
    unique: Unique | None = None
    """While it has no twin; None: it may have one, or has ended, or was claimed."""


class LedgerMachine(RuleBasedStateMachine):
    """Steps of applications, workers and people, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        self.ledger = MemoryJobLedger(self.clock)
        self.jobs: dict[str, Modelled] = {}
        self.leases: dict[str, tuple[float, frozenset[str]]] = {}
        self.given: list[Claim] = []
        """Every claim there ever was, the stale ones too."""

    def do(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a coroutine on the machine's loop."""
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        """Close the loop."""
        self.runner.close()

    # -- the model ---------------------------------------------------------------------------

    def _now(self) -> float:
        return self.clock.monotonic()

    def _kept(self) -> list[Modelled]:
        return [job for job in self.jobs.values() if not job.pruned]

    def _due(self, queue: str) -> list[Modelled]:
        now = self.clock.now()
        due = [
            job
            for job in self._kept()
            if (job.queue, job.state) == (queue, JobState.WAITING) and job.due <= now
        ]
        return sorted(due, key=lambda job: (job.due, job.id))

    def _active(self, *workers: str) -> list[Modelled]:
        return [
            job
            for job in self._kept()
            if job.state is JobState.ACTIVE and (not workers or job.worker in workers)
        ]

    def _good(self, worker: str | None) -> bool:
        return worker in self.leases and self.leases[worker][0] > self._now()

    def _leave_state(self, job: Modelled, state: JobState) -> None:
        if job.stopping and state is not JobState.COMPLETED:
            state = JobState.CANCELLED
        job.state, job.worker, job.finished, job.stopping = state, None, self._now(), False
        job.unique = None if state.final else job.unique

    # -- what happens ------------------------------------------------------------------------

    @precondition(lambda self: len(self._kept()) < MAX_JOBS)
    @rule(
        queue=st.sampled_from(QUEUES),
        key=st.sampled_from([None, "k1", "k2"]),
        delay=st.sampled_from([None, -5.0, 3.0, 20.0]),
        unique=st.sampled_from([None, *Unique]),
    )
    def accept(
        self, queue: str, key: str | None, delay: float | None, unique: Unique | None
    ) -> None:
        """Have a job accepted, under a key that may be in use, or beside a twin."""
        now = self.clock.now()
        draft = JobDraft(
            id=str(UUID(int=len(self.jobs) + 1)),
            queue=queue,
            task="task",
            payload=b"1",
            key=key,
            run_at=None if delay is None else now + timedelta(seconds=delay),
            unique=unique,
            unique_key=unique and "twins",
        )
        (accepted,) = self.do(self.ledger.accept([draft]))
        same = [job for job in self._kept() if key is not None and job.key == key]
        same += [job for job in self._kept() if unique and job.unique]
        assert accepted.created == (not same)
        assert accepted.job.id == (same[0].id if same else draft.id)
        if accepted.created:
            due = now + timedelta(seconds=max(0.0, delay or 0.0))
            self.jobs[draft.id] = Modelled(draft.id, queue, key, due, unique=unique)

    @precondition(lambda self: any(self._due(queue) for queue in QUEUES))
    @rule(
        data=st.data(),
        worker=st.sampled_from(WORKERS),
        limit=st.sampled_from([3, 1, 0]),
        by_ids=st.booleans(),
    )
    def claim(self, data: st.DataObject, worker: str, limit: int, *, by_ids: bool) -> None:
        """Give out what is due, of all or of some."""
        queue = data.draw(st.sampled_from([q for q in QUEUES if self._due(q)]), label="queue")
        due, ids = self._due(queue), None
        if by_ids:
            some = st.lists(st.sampled_from(sorted(self.jobs)), min_size=1)
            ids = data.draw(some, label="ids")
            due = [job for job in due if job.id in ids]
        claims = self.do(self.ledger.claim(queue, worker, limit, ids))
        self._note(claims, due[:limit], worker)

    def _note(self, claims: Any, expected: list[Modelled], worker: str) -> None:
        for job in expected:
            job.state, job.worker, job.given = JobState.ACTIVE, worker, self._now()
            job.claims += 1
            job.unique = None if job.unique is Unique.WAITING else job.unique
        assert [(claim.id, claim.number, claim.attempt, claim.crashes) for claim in claims] == [
            (job.id, job.claims, job.attempts + 1, job.crashes) for job in expected
        ]
        self.given.extend(claims)

    @precondition(lambda self: self.given)
    @rule(
        data=st.data(),
        way=st.sampled_from(["completed", "effect", "failed", "retried", "postponed", "back"]),
        delay=st.sampled_from([0.0, 4.0]),
    )
    def settle(self, data: st.DataObject, way: str, delay: float) -> None:
        """Settle any earlier claim."""
        active = {job.id for job in self._active()}
        claims = [claim for claim in self.given if claim.id in active] or self.given
        claim = data.draw(st.sampled_from(claims), label="claim")
        job = self.jobs[claim.id]
        good = (job.state, job.claims) == (JobState.ACTIVE, claim.number) and not job.pruned
        assert self._settle(claim, way, delay) == good
        if not good:
            return
        stopping = job.stopping
        job.past += way not in ("completed", "effect")
        if way in ("completed", "effect"):
            self._leave_state(job, JobState.COMPLETED)
            job.error = None
        elif way == "failed":
            self._leave_state(job, JobState.FAILED)
        else:
            self._leave_state(job, JobState.WAITING)
        job.attempts += way in ("failed", "retried")
        if way in ("failed", "retried", "postponed"):
            job.error = ERROR.code
        if way in ("retried", "postponed") and not stopping:
            job.due = self.clock.now() + timedelta(seconds=delay)

    def _settle(self, claim: Claim, way: str, delay: float) -> bool:
        async def effect(_: Any) -> bytes:
            return b"1"

        if way == "effect":
            return self.do(self.ledger.settle_with_effect(claim, effect))
        settlement = {
            "completed": completed(claim, b"1"),
            "failed": failed(claim, ERROR),
            "retried": retried(claim, ERROR, delay),
            "postponed": postponed(claim, ERROR, delay),
            "back": handed_back(claim),
        }[way]
        return set(self.do(self.ledger.settle([settlement]))) == {claim.id}

    @rule(
        worker=st.sampled_from(WORKERS),
        queues=st.sets(st.sampled_from(QUEUES)),
        says=st.sampled_from(["nothing", "none", "all", "one"]),
        grace=st.sampled_from([None, 0.0]),
    )
    def register(self, worker: str, queues: set[str], says: str, grace: float | None) -> None:
        """Have a worker live, and say what it holds or not."""
        active = self._active(worker)
        held = {"none": [], "all": active, "one": active[:1]}.get(says)
        ids = None if held is None else [job.id for job in held]
        self.do(self.ledger.register(worker, queues, LEASE, ids, grace=grace))
        self.leases[worker] = (self._now() + LEASE, frozenset(queues))
        for job in active:
            lost = grace == 0.0 or job.given < self._now() - LEASE
            if held is not None and job not in held and lost:
                self._leave_state(job, JobState.WAITING)

    @precondition(lambda self: self._active())
    @rule(worker=st.sampled_from(WORKERS))
    def deregister(self, worker: str) -> None:
        """Have a worker end well."""
        mine = self._active(worker)
        returned = self.do(self.ledger.deregister(worker))
        assert sorted((queue, i) for queue, ids in returned.items() for i in ids) == sorted(
            (job.queue, job.id) for job in mine if not job.stopping
        )
        self.leases.pop(worker, None)
        for job in mine:
            job.past += 1
            self._leave_state(job, JobState.WAITING)

    @precondition(lambda self: self._active())
    @rule(most=st.integers(1, 4), after=st.sampled_from([0.0, LEASE + 1.0]))
    def sweep(self, most: int, after: float) -> None:
        """Take the jobs of the dead, or of those that die for this."""
        self.do(self.clock.advance(after))
        swept = self.do(self.ledger.sweep(most))
        returned, crashed, cancelled = set(), set(), set()
        for job in self._active():
            if self._good(job.worker):
                continue
            job.crashes += 1
            job.past += 1
            if job.stopping:
                cancelled.add(job.id)
                self._leave_state(job, JobState.CANCELLED)
            elif job.crashes < most:
                returned.add((job.queue, job.id))
                self._leave_state(job, JobState.WAITING)
            else:
                crashed.add(job.id)
                job.error = "crashed"
                self._leave_state(job, JobState.FAILED)
        assert {(queue, i) for queue, ids in swept.returned.items() for i in ids} == returned
        assert set(swept.crashed) == crashed
        assert set(swept.cancelled) == cancelled

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), what=st.sampled_from(["retry", "cancel", "stop", "run"]))
    def ask(self, data: st.DataObject, what: str) -> None:
        """Retry, run or cancel any job, preferably a failed one; with `stop` also a running one."""
        failed_ones = [job.id for job in self._kept() if job.state is JobState.FAILED]
        job = self.jobs[data.draw(st.sampled_from(failed_ones or sorted(self.jobs)), label="job")]
        needed = {JobState.FAILED if what == "retry" else JobState.WAITING}
        needed |= {JobState.ACTIVE} if what == "stop" else set()
        try:
            if what == "retry":
                self.do(self.ledger.retry(job.id))
            elif what == "run":
                self.do(self.ledger.run(job.id))
            else:
                self.do(self.ledger.cancel(job.id, running=what == "stop"))
        except JobNotFoundError:
            assert job.pruned
        except JobStateError as refused:
            assert not job.pruned
            assert refused.state is job.state  # noqa: PT017 - it may be right
            assert job.state not in needed
        else:
            assert not job.pruned
            assert job.state in needed
            if what == "run":
                job.due = min(job.due, self.clock.now())
            elif job.state is JobState.ACTIVE:
                job.stopping = True
            elif what != "retry":
                self._leave_state(job, JobState.CANCELLED)
            else:
                self._leave_state(job, JobState.WAITING)
                job.attempts, job.crashes, job.due = 0, 0, self.clock.now()

    @rule(seconds=st.sampled_from([0.5, 4.0, 11.0]))
    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.do(self.clock.advance(seconds))

    @precondition(lambda self: any(job.state.final for job in self._kept()))
    @rule(older_than=st.sampled_from([0.0, 5.0]), limit=st.integers(0, 3))
    def prune(self, older_than: float, limit: int) -> None:
        """Forget what is final for long."""
        due = [
            job
            for job in self._kept()
            if job.state.final and job.finished <= self._now() - older_than
        ]
        assert self.do(self.ledger.prune(older_than, limit)) == min(limit, len(due))
        left = {job.id for job in self.do(self.ledger.page(JobFilter(limit=1000)))}
        gone = [job for job in due if job.id not in left]
        assert len(gone) == min(limit, len(due))
        assert all(a.finished <= b.finished for a in gone for b in due if b not in gone)
        for job in gone:
            job.pruned = True

    # -- what always holds -------------------------------------------------------------------

    @invariant()
    def every_job_is_in_the_state_it_must_be_in(self) -> None:
        """With what it has been through; those that are pruned are gone."""
        kept = {job.id: job for job in self.do(self.ledger.page(JobFilter(limit=1000)))}
        assert list(kept) == sorted(kept, reverse=True)
        assert set(kept) == {job.id for job in self._kept()}
        for job in self._kept():
            found = kept[job.id]
            whole = self.do(self.ledger.get(job.id))
            assert whole is not None
            assert found == replace(whole, payload=b"", result=None, history=())
            assert (found.cancel_requested, len(whole.history)) == (job.stopping, min(job.past, 50))
            assert (found.state, found.worker, found.run_at) == (job.state, job.worker, job.due)
            assert (found.attempts, found.crashes, found.claims) == (
                job.attempts,
                job.crashes,
                job.claims,
            )
            assert (found.error and found.error.code) == job.error
            assert (found.finished_at is not None) == found.state.final
            assert (whole.result is not None) == (found.state is JobState.COMPLETED)

    @invariant()
    def every_job_counts_once(self) -> None:
        """None is lost: the counts of the states are all that were accepted."""
        counts = self.do(self.ledger.counts())
        total = 0
        for queue in QUEUES:
            jobs = [job for job in self.jobs.values() if job.queue == queue]
            due = self._due(queue)
            consumers = [w for w, (_, names) in self.leases.items() if queue in names]
            now, states = self.clock.now(), [job.state for job in jobs]
            expected = QueueCounts(
                waiting=len(due),
                scheduled=states.count(JobState.WAITING) - len(due),
                active=states.count(JobState.ACTIVE),
                completed=states.count(JobState.COMPLETED),
                failed=states.count(JobState.FAILED),
                cancelled=states.count(JobState.CANCELLED),
                oldest_due=(now - due[0].due).total_seconds() if due else 0.0,
                consumers=sum(self._good(worker) for worker in consumers),
            )
            found = counts.get(queue, QueueCounts())
            assert found == expected
            total += found.waiting + found.scheduled + found.active
            total += found.completed + found.failed + found.cancelled
        assert total == len(self.jobs)


def test_no_job_is_ever_lost() -> None:
    """For any order of events, each accepted job is in the state of the model."""
    run_state_machine_as_test(LedgerMachine, settings=settings(stateful_step_count=60))


async def test_the_oldest_finished_jobs_make_room() -> None:
    """Memory holds so many at most; their keys are free, and all of them stay counted."""
    ledger = MemoryJobLedger(ManualClock(), max_finished=3)
    drafts = [
        JobDraft(id=str(UUID(int=n)), queue="default", task="t", payload=b"1", key=f"k{n}")
        for n in range(5)
    ]
    await ledger.accept(drafts)
    await ledger.register("a", QUEUES, LEASE)
    for claim in await ledger.claim("default", "a", 5):
        await ledger.settle([completed(claim, b"1")])
    again = await ledger.accept(drafts)

    assert [accepted.created for accepted in again] == [True, True, False, False, False]
    assert (await ledger.counts())["default"].completed == 5
