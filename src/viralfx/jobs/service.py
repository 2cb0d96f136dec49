"""The job service of applications: accept, find, retry and cancel jobs."""

import logging
import math
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, Protocol, TypeVar

from viralfx.core.clock import Clock, SystemClock
from viralfx.core.correlation import current_correlation_id, current_user_id
from viralfx.core.errors import LedgerUnavailableError, UnstorableError, suggest
from viralfx.core.ids import new_job_id
from viralfx.core.keys import NamedKey, stored_key
from viralfx.core.loops import (
    HomeLoop,
    at_home,
    beside_others,
    require_no_loop,
    running_loop,
    without_loop,
)
from viralfx.jobs.batching import AcceptBatcher, keys_of
from viralfx.jobs.bulk import BulkCount, cut_off
from viralfx.jobs.codec import (
    DEFAULT_MAX_BYTES,
    Codec,
    PayloadError,
    PayloadTooLargeError,
    ResultError,
    too_large,
    unique_key_of,
)
from viralfx.jobs.follower import JobFollower
from viralfx.jobs.hooks import CombinedHooks, JobHooks, log_refusal
from viralfx.jobs.ledger import (
    Accepted,
    BlockingConnection,
    BulkStep,
    Check,
    Found,
    JobLedger,
    QueueCounts,
)
from viralfx.jobs.limits import (
    check_max_attempts,
    check_run_at,
    concurrency_key_of,
    scheduled_key_of,
)
from viralfx.jobs.model import (
    ANY_JOB,
    InvalidFilterError,
    Job,
    JobDraft,
    JobFilter,
    JobNotFoundError,
    JobState,
    Unique,
    UnknownQueueError,
    check_priority,
)
from viralfx.jobs.schedule import Schedule, ScheduleTimes, UnknownScheduleError, times_of
from viralfx.jobs.submission import Submission, about, require_all_same, require_same
from viralfx.jobs.tasks import TaskRegistry, submits, submits_many

T = TypeVar("T")
_logger = logging.getLogger("viralfx.queues")

MAX_PAYLOADS = 10_000
"""Payloads of one call of :meth:`JobService.submit_many`: they are one statement."""
MAX_CHANGED = 100_000
"""The most jobs that one change by a filter changes."""


def _unknown_queue(queue: str, known: Iterable[str]) -> UnknownQueueError:
    return UnknownQueueError(f"there is no queue {queue!r}; there are {', '.join(sorted(known))}")


def _id(job_id: object) -> str:
    if not isinstance(job_id, str):
        raise TypeError(
            f"pass the id of the job, such as accepted.job.id, not {type(job_id).__qualname__}"
        )
    return job_id


class JobsApart(Protocol):
    """Port: the jobs of a process that runs no application, through connections of its own."""

    def call(self, call: "Callable[[JobService], Awaitable[T]]") -> T:
        """Block this thread until the call of such a service has ended; return its result."""
        ...

    def call_soon(self, call: "Callable[[JobService], object]") -> None:
        """Call a function with such a service, without waiting for it."""
        ...


class JobService:
    """Accepts jobs durably, and gives access to them.

    Await its methods on any event loop: once the application has started, they run on the loop of
    the application. :meth:`submit_sync` and :meth:`submit_many_sync` need no event loop.

    Every method raises :class:`LedgerUnavailableError` if the ledger does not answer.
    """

    def __init__(
        self,
        *,
        ledger: JobLedger,
        tasks: TaskRegistry,
        codec: Codec,
        queues: Collection[str],
        notify: Callable[[str, Sequence[str], float], None] = lambda *_: None,
        hooks: JobHooks | None = None,
        max_payload_bytes: int = DEFAULT_MAX_BYTES,
        clock: Clock | None = None,
        home: HomeLoop | None = None,
        apart: JobsApart | None = None,
    ) -> None:
        """``notify`` announces jobs by queue, ids and the seconds until they are due.

        It neither waits nor raises. ``home`` is the event loop of the ledger. ``apart`` serves the
        blocking methods of a process in which that loop does not run; None: its jobs are in memory.
        """
        self._ledger = ledger
        self._max_payload_bytes = max_payload_bytes
        self._accept = AcceptBatcher(self._store)
        self._tasks = tasks
        self._codec = codec
        self._queues = tuple(dict.fromkeys(queues))
        self._notify = notify
        self._hooks = hooks or CombinedHooks()
        self._clock = clock or SystemClock()
        self._home = home or HomeLoop()
        self._apart = apart
        self.follower = JobFollower(self.get, self._clock, home=self._home)
        """Streams the changes of jobs."""

    async def accept(
        self,
        task: str,
        payload: bytes,
        *,
        run_at: datetime | None = None,
        key: str | NamedKey | None = None,
        traceparent: str | None = None,
        priority: int | None = None,
        unique: str | None = None,
        queue: str | None = None,
        max_attempts: int | None = None,
        connection: Any = None,
    ) -> Accepted:
        """Accept a job; it is durable when this returns.

        ``run_at`` is the earliest time, with a time zone. Of the due jobs of a queue, one with a
        higher ``priority`` runs first; None: the task's. A repeated ``key`` returns the first job;
        that of a name differs from all others with its text.
        With ``unique``, ``"waiting"`` or ``"unfinished"``, a job of the same task and payload that
        waits or has not ended is returned, and the key is not kept; None: the task's. ``queue`` is
        that of the job; None: the task's. ``max_attempts`` replaces the attempts that the
        :class:`BackoffPolicy` of the task allows, and limits those of another policy.

        ``connection`` is in a transaction of the ledger's database, or of any database if the jobs
        are in memory: one of asyncpg, or a session or connection of SQLAlchemy, whose transaction
        begins if it has not. The job exists if and only if that transaction commits. The call runs
        on the event loop of the connection.

        Raises :class:`UnknownTaskError`, :class:`UnknownQueueError`, :class:`PayloadError` and, if
        the key belongs to a different job, :class:`KeyConflictError`. A payload over the limit
        raises :class:`PayloadTooLargeError`, and one that the ledger alone refuses also
        :class:`UnstorableError`. Another value that is invalid raises ``ValueError``. With a
        ``connection`` also :class:`TransactionError` and the errors of its driver.
        """
        await self._require_somewhere(queue, connection)
        asked = Submission(
            task=task,
            payload=payload,
            run_at=run_at,
            key=key,
            priority=priority,
            unique=unique,
            queue=queue,
            max_attempts=max_attempts,
        )
        draft = self._draft(asked, traceparent)
        accepted = await self._accept_one(draft, connection)
        require_same(draft, accepted)
        self._hooks.accepted(accepted)
        return accepted

    def queue_of(self, task: str) -> str:
        """Return the queue of a task, by its name. Raises :class:`UnknownTaskError`."""
        return self._tasks.find(task).queue

    async def accept_draft(self, draft: JobDraft) -> Accepted:
        """Accept a job with an id of the caller's, of a task that this process need not know.

        A repeated id or key returns the first job, also if the draft asks for something else.
        Raises :class:`UnknownQueueError`, and for payload and key as :meth:`accept` does.
        """
        if draft.queue not in self._queues:
            raise _unknown_queue(draft.queue, self._queues)
        stored_key(draft.key)
        if problem := too_large(len(draft.payload), self._max_payload_bytes):
            raise PayloadTooLargeError(problem)
        self._codec.decode(draft.payload, Any)
        accepted = await self._accept_one(draft)
        self._hooks.accepted(accepted)
        return accepted

    async def _accept_one(self, draft: JobDraft, connection: Any = None) -> Accepted:
        with self._hooks.accepting(draft) as traced:
            try:
                if connection is not None:
                    (accepted,) = await self._ledger.accept_in(
                        connection, [traced], on_commit=self._announce
                    )
                    return accepted
                accepted = await self._home.run(partial(self._accept, traced))
            except UnstorableError as error:
                log_refusal([draft], error)
                raise
        self._announce([accepted])
        return accepted

    async def accept_all(
        self,
        submissions: Sequence[Submission],
        *,
        traceparent: str | None = None,
        connection: Any = None,
    ) -> list[Accepted]:
        """Accept all of the jobs or none, in one call of the ledger; returns them in order.

        Raises as :meth:`accept` does. The error about one of them has its position as ``index``,
        which counts from 0, and names it.
        """
        drafts = []
        queues: set[str | None] = {None}
        for index, each in enumerate(submissions):
            with about(index):
                if each.queue not in queues:
                    await self._require_somewhere(each.queue, connection)
                    queues.add(each.queue)
                draft = self._draft(each, traceparent)
            with self._hooks.accepting(draft) as draft:
                drafts.append(draft)
        if not drafts:
            return []
        check = None
        if any(map(keys_of, drafts)):
            check = partial(require_all_same, drafts)
        try:
            if connection is None:
                accepted = await self._home.run(partial(self._store, drafts, check))
                self._announce(accepted)
            else:
                accepted = await self._ledger.accept_in(
                    connection, drafts, check=check, on_commit=self._announce
                )
        except UnstorableError as error:
            log_refusal(drafts, error)
            raise
        for one in accepted:
            self._hooks.accepted(one)
        return list(accepted)

    def _draft(
        self, asked: Submission, traceparent: str | None, *, scheduled: bool = False
    ) -> JobDraft:
        declared = self._tasks.find(asked.task)
        key = declared.concurrency_key
        payload = asked.payload
        if problem := too_large(len(payload), self._max_payload_bytes):
            raise PayloadTooLargeError(problem)
        value = self._codec.decode(payload, declared.payload_type)
        unique = declared.unique if asked.unique is None else Unique.parse(asked.unique)
        priority = declared.priority if asked.priority is None else check_priority(asked.priority)
        most = asked.max_attempts
        return JobDraft(
            id=new_job_id(),
            queue=declared.queue if asked.queue is None else asked.queue,
            task=declared.name,
            payload=payload,
            run_at=check_run_at(asked.run_at),
            key=stored_key(asked.key),
            correlation_id=current_correlation_id(),
            traceparent=traceparent,
            user_id=current_user_id(),
            priority=priority,
            unique=unique,
            unique_key=None if unique is None else unique_key_of(declared.name, payload),
            concurrency_key=scheduled_key_of(key) if scheduled else concurrency_key_of(key, value),
            max_attempts=None if most is None else check_max_attempts(most),
        )

    async def _store(
        self, drafts: Sequence[JobDraft], check: Check | None = None
    ) -> Sequence[Accepted]:
        with self._hooks.storing(drafts):
            return await self._ledger.accept(drafts, check=check)

    def _announce(self, accepted: Sequence[Accepted]) -> None:
        """Notify workers of the new jobs among those accepted; call it in any thread."""
        if self._home.is_here:
            self._announce_here(accepted)
        elif self._home.running is not None:
            self._home.call_soon(partial(self._announce_here, accepted))
        elif running_loop() is not None:
            self._announce_here(accepted)
        elif self._apart is not None and not self._home.has_ended:
            self._apart.call_soon(lambda jobs: jobs._announce_here(accepted))  # noqa: SLF001 - its own class

    def _announce_here(self, accepted: Iterable[Accepted]) -> None:
        found: dict[tuple[str, float], list[str]] = {}
        for job in (each.job for each in accepted if each.created):
            due_in = (job.run_at - job.created_at).total_seconds()
            found.setdefault((job.queue, due_in), []).append(job.id)
        for (queue, due_in), ids in found.items():
            self._notify(queue, ids, due_in)

    @submits
    async def submit(
        self,
        task: str | Callable[..., Any],
        payload: Any,
        *,
        key: str | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
        unique: str | None = None,
        queue: str | None = None,
        max_attempts: int | None = None,
        connection: Any = None,
    ) -> Accepted:
        """Accept a job with a Python value as its payload; see :meth:`accept`.

        ``task`` is the name of a task or its function.
        """
        return await self.accept(
            self._tasks.name_of(task),
            self._encode(payload, task),
            key=key,
            run_at=run_at,
            priority=priority,
            unique=unique,
            queue=queue,
            max_attempts=max_attempts,
            connection=connection,
        )

    @submits_many
    async def submit_many(
        self,
        task: str | Callable[..., Any],
        payloads: Iterable[Any],
        *,
        run_at: datetime | None = None,
        priority: int | None = None,
        unique: str | None = None,
        queue: str | None = None,
        max_attempts: int | None = None,
        connection: Any = None,
    ) -> list[Accepted]:
        """Accept a job of a task for each payload, all or none; see :meth:`accept_all`.

        Raises ``ValueError`` for more than :data:`MAX_PAYLOADS`.
        """
        name = self._tasks.name_of(task)
        submissions: list[Submission] = []
        for index, payload in enumerate(payloads):
            if index == MAX_PAYLOADS:
                raise ValueError(
                    f"submit_many takes at most {MAX_PAYLOADS} payloads; call it again"
                )
            with about(index):
                encoded = self._encode(payload, name)
            submissions.append(
                Submission(
                    task=name,
                    payload=encoded,
                    run_at=run_at,
                    priority=priority,
                    unique=unique,
                    queue=queue,
                    max_attempts=max_attempts,
                )
            )
        return await self.accept_all(submissions, connection=connection)

    @submits
    def submit_sync(
        self,
        task: str | Callable[..., Any],
        payload: Any,
        *,
        key: str | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
        unique: str | None = None,
        queue: str | None = None,
        max_attempts: int | None = None,
        connection: Any = None,
    ) -> Accepted:
        """Do as :meth:`submit`, and block this thread until the job is accepted.

        For functions that run in a thread, and for processes without an event loop. If the
        application does not run in this process, the service opens connections of its own.
        ``connection`` is synchronous: a session or connection of SQLAlchemy, or a connection of
        psycopg or psycopg2. Raises as :meth:`submit` does, and ``RuntimeError`` in a thread that
        runs an event loop.
        """
        require_no_loop("submit_sync()", "jobs.submit(...)")
        submit: Callable[..., Coroutine[Any, Any, Accepted]] = partial(
            JobService.submit,
            task=task,
            payload=payload,
            key=key,
            run_at=run_at,
            priority=priority,
            unique=unique,
            queue=queue,
            max_attempts=max_attempts,
        )
        if connection is None:
            return self._block(submit)
        return without_loop(submit(self, connection=BlockingConnection(connection)))

    @submits_many
    def submit_many_sync(
        self,
        task: str | Callable[..., Any],
        payloads: Iterable[Any],
        *,
        run_at: datetime | None = None,
        priority: int | None = None,
        unique: str | None = None,
        queue: str | None = None,
        max_attempts: int | None = None,
        connection: Any = None,
    ) -> list[Accepted]:
        """Do as :meth:`submit_many`, and block this thread as :meth:`submit_sync` does."""
        require_no_loop("submit_many_sync()", "jobs.submit_many(...)")
        submit: Callable[..., Coroutine[Any, Any, list[Accepted]]] = partial(
            JobService.submit_many,
            task=task,
            payloads=payloads,
            run_at=run_at,
            priority=priority,
            unique=unique,
            queue=queue,
            max_attempts=max_attempts,
        )
        if connection is None:
            return self._block(submit)
        return without_loop(submit(self, connection=BlockingConnection(connection)))

    def _block(self, call: "Callable[[JobService], Awaitable[T]]") -> T:
        """Run ``call`` on an event loop that is not of this thread; return its result."""
        if self._apart is None or self._home.running is not None:
            return self._home.call(partial(call, self))
        if self._home.has_ended:
            raise LedgerUnavailableError(
                "the application of this process has stopped, or has failed to start"
            )
        return self._apart.call(call)

    def _encode(self, payload: Any, task: object) -> bytes:
        declared = self._tasks.find(self._tasks.name_of(task))
        try:
            return self._codec.encode(payload, declared.payload_type)
        except ResultError as error:
            raise PayloadError(str(error)) from error

    @at_home
    async def get(self, job_id: str) -> Job:
        """Return a job. Raises :class:`JobNotFoundError`."""
        job = await self._ledger.get(_id(job_id))
        if job is None:
            raise JobNotFoundError(f"there is no job {job_id}")
        return job

    @beside_others
    async def wait(self, job_id: str, *, timeout: float | None = None) -> Job:  # noqa: ASYNC109
        """Return a job once it has a final state; see :meth:`JobFollower.wait`."""
        return await self.follower.wait(job_id, timeout)

    @at_home
    async def search(
        self, wanted: JobFilter = ANY_JOB, *, correlation_id: str | None = None
    ) -> Found:
        """Return the jobs that match, newest first; also only those of a correlation id.

        The jobs have no payload, result and history: :meth:`get` returns a whole job.
        A call may examine a limited number of jobs, and so return fewer than ``wanted.limit``.
        Raises :class:`UnknownQueueError`.
        """
        await self._require_somewhere(wanted.queue)
        if correlation_id is not None:
            return await self._ledger.find(correlation_id, wanted)
        if wanted.is_search:
            return await self._ledger.search(wanted)
        # One more than requested, to know if there are further ones.
        jobs = await self._ledger.page(replace(wanted, limit=wanted.most + 1))
        page = jobs[: wanted.most]
        return Found(jobs=page, before=page[-1].id if len(jobs) > len(page) else None)

    @at_home
    async def retry(self, job_id: str) -> Job:
        """Run a failed job again. Raises :class:`JobNotFoundError`, :class:`JobStateError`."""
        job = await self._ledger.retry(_id(job_id))
        self._notify(job.queue, (job.id,), 0.0)
        return job

    @at_home
    async def run(self, job_id: str) -> Job:
        """Make a waiting job due now. Raises :class:`JobNotFoundError`, :class:`JobStateError`."""
        job = await self._ledger.run(_id(job_id))
        self._notify(job.queue, (job.id,), 0.0)
        return job

    @at_home
    async def cancel(self, job_id: str, *, running: bool = True) -> Job:
        """Cancel a waiting job; with ``running`` also request that an active one ends.

        The returned job is cancelled, or active with ``cancel_requested``: its worker learns of
        that within two seconds. Raises :class:`JobNotFoundError`, :class:`JobStateError`.
        """
        return await self._ledger.cancel(_id(job_id), running=running)

    @at_home
    async def retry_all(self, wanted: JobFilter, *, most: int | None = MAX_CHANGED) -> BulkCount:
        """Run failed jobs that match again, at most ``most``; return how many. None: all of them.

        Raises :class:`InvalidFilterError` for a filter without a field, with a limit or with
        another state, and :class:`UnknownQueueError`. It runs in steps: if it is interrupted, the
        jobs of the earlier steps are retried, and the same call continues with the others. The
        message of a :class:`LedgerUnavailableError` has their number.
        """
        await self._require_change(wanted, "retried", JobState.FAILED)
        return await self._counted(self._ledger.retry_all(wanted, most), most)

    @at_home
    async def cancel_all(self, wanted: JobFilter, *, most: int | None = MAX_CHANGED) -> BulkCount:
        """Cancel waiting jobs that match, and request it of active ones; return how many.

        ``most``, errors and interruptions are as those of :meth:`retry_all`.
        """
        await self._require_change(wanted, "cancelled", JobState.WAITING, JobState.ACTIVE)
        return await self._counted(self._ledger.cancel_all(wanted, most), most)

    async def _counted(self, steps: AsyncIterator[BulkStep], most: int | None) -> BulkCount:
        count = 0
        try:
            async for step in steps:
                count += step.count
                for queue, ids in step.ids.items():
                    self._notify(queue, ids, 0.0)
        except LedgerUnavailableError as error:
            if not count:
                raise
            raise cut_off(count, error) from error
        return BulkCount(count, more=most is not None and count >= most)

    async def _require_change(self, wanted: JobFilter, change: str, *states: JobState) -> None:
        await self._require_somewhere(wanted.queue)
        if wanted.limit is not None:
            raise InvalidFilterError("a change of many jobs has no limit: leave limit out")
        if wanted == ANY_JOB:
            raise InvalidFilterError("the filter needs at least one field, or it means every job")
        if wanted.state not in (None, *states):
            allowed = " or ".join(states)
            raise InvalidFilterError(
                f"only jobs that are {allowed} can be {change}: leave state out, or set it to that"
            )

    @at_home
    async def schedules(self, count: int = 5) -> Sequence[ScheduleTimes]:
        """Return the schedules of all tasks, with the next ``count`` times of each."""
        states = await self._ledger.schedules()
        return times_of(states, self._schedules_here(), self._clock.now(), count)

    def _schedules_here(self) -> Sequence[Schedule]:
        return [each.schedule for each in self._tasks if each.schedule is not None]

    async def _schedule(self, task: str) -> ScheduleTimes:
        found = {each.task: each for each in await self.schedules()}
        if task not in found:
            hint = suggest(task, found) or f"the tasks with one are {', '.join(found) or 'none'}"
            raise UnknownScheduleError(f"no task {task!r} has a schedule; {hint}")
        return found[task]

    @at_home
    async def pause_schedule(self, task: str | Callable[..., Any]) -> ScheduleTimes:
        """Skip the runs of a schedule until it is resumed; jobs that were accepted stay.

        All workers obey at once. Pausing a paused schedule does nothing. Raises
        :class:`UnknownScheduleError`.
        """
        name = self._tasks.name_of(task)
        await self._schedule(name)
        if not await self._ledger.pause_schedule(name):
            # No worker has declared it yet.
            mine = [each for each in self._schedules_here() if each.task == name]
            await self._ledger.declare_schedules(mine, math.inf)
            await self._ledger.pause_schedule(name)
        _logger.warning("Schedule paused", extra={"task": name})
        return await self._schedule(name)

    @at_home
    async def resume_schedule(self, task: str | Callable[..., Any]) -> ScheduleTimes:
        """Run a schedule again from its next time on. Raises as :meth:`pause_schedule` does."""
        name = self._tasks.name_of(task)
        await self._schedule(name)
        await self._ledger.resume_schedule(name)
        _logger.warning("Schedule resumed", extra={"task": name})
        return await self._schedule(name)

    async def run_schedule(
        self, task: str | Callable[..., Any], *, traceparent: str | None = None
    ) -> Accepted:
        """Submit a job as a schedule does, now; the times of the schedule do not change.

        Also while it is paused. This process must know the task. Raises
        :class:`UnknownScheduleError` and as :meth:`accept` does.
        """
        name = self._tasks.name_of(task)
        await self._schedule(name)
        draft = self._draft(Submission(task=name, payload=b"null"), traceparent, scheduled=True)
        accepted = await self._accept_one(draft)
        self._hooks.accepted(accepted)
        return accepted

    @at_home
    async def pause(self, queue: str) -> None:
        """Let no worker claim jobs of a queue until it is resumed; running jobs go on.

        Workers obey from their next claim on. Pausing a paused queue does nothing. Raises
        :class:`UnknownQueueError`.
        """
        await self._require_somewhere(queue)
        await self._ledger.pause(queue)
        _logger.warning("Queue paused", extra={"queue": queue})

    @at_home
    async def resume(self, queue: str) -> None:
        """End the pause of a queue, and announce its due jobs. Raises as :meth:`pause` does."""
        await self._require_somewhere(queue)
        self._notify(queue, await self._ledger.resume(queue), 0.0)
        _logger.warning("Queue resumed", extra={"queue": queue})

    async def _require_somewhere(self, queue: str | None, connection: Any = None) -> None:
        """Raise an error for a queue that is neither configured here nor known to the ledger."""
        if queue is None or queue in self._queues:
            return
        if isinstance(connection, BlockingConnection):
            known = self._block(lambda jobs: jobs.queues())
        else:
            known = await self.queues()
        if queue not in known:
            raise _unknown_queue(queue, known)

    @at_home
    async def queues(self) -> Mapping[str, QueueCounts]:
        """Return the counts of all queues by name, also of those that never had a job."""
        return self.every_queue(await self._ledger.counts())

    def every_queue(self, known: Mapping[str, QueueCounts]) -> Mapping[str, QueueCounts]:
        """Return ``known`` with zero counts added for queues that the ledger does not know."""
        return {name: known.get(name, QueueCounts()) for name in (*self._queues, *known)}
