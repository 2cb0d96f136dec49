"""The ledger port: the durable record of all jobs and of the workers that run them.

All times are the ledger's own, so that workers with different clocks agree about leases.
"""

import math
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple, Protocol, Self

from viralfx.core.errors import LedgerLimitError
from viralfx.jobs.limits import Limit
from viralfx.jobs.model import ANY_JOB, Claim, Job, JobDraft, JobFilter, Settlement
from viralfx.jobs.schedule import ScheduledAcceptance, ScheduleStore


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job in the ledger; ``created`` is False if its key or id was accepted before."""

    job: Job
    created: bool


Check = Callable[[Sequence[Accepted]], None]


class PartlyDoneError(LedgerLimitError):
    """A call took effect except for some jobs, such as those that other transactions lock.

    Without a job, except for the worker itself.
    """

    def __init__(
        self,
        reason: str,
        left: Collection[str],
        *,
        settled: Collection[str] = (),
        returned: Mapping[str, Sequence[str]] | None = None,
        doubtful: bool = False,
    ) -> None:
        self.left = left
        """The ids of these jobs."""
        self.doubtful = doubtful
        """True if an earlier attempt of the call, whose answer was lost, may yet change them."""
        self.settled = settled
        self.returned = returned or {}
        """The answer for the others, of a settlement or a deregistration."""
        super().__init__(f"{len(left)} jobs are left: {reason}" if left else reason)


class KeyHeldError(LedgerLimitError):
    """An open transaction has submitted a job with the same key. The call accepted nothing."""

    def __init__(self, drafts: Sequence[JobDraft]) -> None:
        keyed = any(draft.key is not None for draft in drafts)
        same = "idempotency key" if keyed else "task and payload"
        super().__init__(
            f"an open transaction holds the same {same}; end it, or repeat the call after its end",
            "key_held",
        )


@dataclass(frozen=True, slots=True)
class WatchedTransaction:
    """A connection in a transaction whose owner calls ``after_commit``'s functions once it commits.

    A ledger takes it in place of the connection.
    """

    connection: Any
    after_commit: list[Callable[[], None]]


@dataclass(frozen=True, slots=True)
class BlockingConnection:
    """A synchronous connection in a transaction: its statements block the calling thread.

    :meth:`JobLedger.accept_in` takes it in place of the connection, and then never waits.
    """

    connection: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of a search, newest job first."""

    jobs: Sequence[Job]
    before: str | None
    """The id to continue the search from; None: no older job can match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkStep:
    """One step of a change of many jobs; it has taken effect."""

    count: int
    """How many jobs it changed."""
    ids: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By queue the ids of some of those that are due now, to announce."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressReport:
    """The last report of the task of a claim."""

    claim: Claim
    progress: bytes
    """JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueCounts:
    """The jobs of one queue by state, and its consumers.

    ``completed``, ``failed`` and ``cancelled`` count since the ledger was created, pruned jobs
    included. A failed job that is retried and completes counts as completed only.
    """

    waiting: int = 0
    """Jobs that are due."""
    scheduled: int = 0
    """Jobs whose ``run_at`` is in the future."""
    active: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    oldest_due: float = 0.0
    """Seconds for which the longest waiting job has been due."""
    consumers: int = 0
    """Workers that consume this queue and have a valid lease."""
    blocked: int = 0
    """Those of the consumers whose event loop was blocked at their last renewal."""
    paused: bool = False
    """True if no worker claims its jobs until it is resumed."""


Counts = Callable[[], Awaitable[Mapping[str, QueueCounts]]]
"""Returns the counts by queue; raises :class:`LedgerUnavailableError`."""


class Claims(tuple[Claim, ...]):  # noqa: SLOT001 - a tuple can have no slots
    """The claims of one call, in the order in which they run."""

    again_in: float
    """Seconds after which the limits of tasks may allow more; infinite if no limit is in the way.
    """

    def __new__(cls, claims: Iterable[Claim] = (), again_in: float = math.inf) -> Self:
        """Keep the claims."""
        made = super().__new__(cls, claims)
        made.again_in = again_in
        return made


NO_LIMITS: Final[Mapping[str, Limit]] = {}
MAX_ANNOUNCED = 1000
"""The most due jobs of a resumed queue that are announced; their workers find the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """The result of a sweep."""

    returned: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Ids of the jobs that are due again, by queue."""
    crashed: Sequence[str] = ()
    """Ids of the jobs that failed with code ``crashed``."""
    cancelled: Sequence[str] = ()
    """Ids of the jobs that are cancelled, because that was requested while they ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A worker's lease, and the worker's place among the others."""

    lease_until: datetime
    """End of the lease, by the ledger's time."""
    workers: int = 1
    """Workers with a valid lease that share a queue with this one, which is included."""
    leader: bool = True
    """True if this worker has the smallest name of all eligible workers with a valid lease.

    Two workers may believe it for a short time, while their registrations overlap.
    """
    leader_for: float = math.inf
    """Seconds until the lease ends that the first eligible one of the other workers has; infinite
    without one. For a worker that does not lead, this is the lease of the leader."""


MAX_UNRUNNABLE = 1000
"""The most jobs of a task that are counted although no worker can run them."""


class UnrunnableJobs(NamedTuple):
    """The due jobs of a task in a queue that no worker with a valid lease can run."""

    queue: str
    task: str
    code: str
    """``unknown_task`` or ``payload``: the code of their failure, if that lasts."""
    number: int
    """At most :data:`MAX_UNRUNNABLE`."""


class WorkerRegistry(Protocol):
    """The part of two ports that registers workers and renews their leases."""

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
        """Register ``worker`` for ``queues`` with a lease of ``lease`` seconds, or renew the lease.

        The name is unique to one run of one process; a restarted worker uses a new one. A renewal
        covers all jobs of the worker, and replaces its queues, its tasks and its eligibility.
        ``tasks`` is the names of the tasks that the worker knows; None: it knows every task.
        ``eligible``: whether the worker can lead; one whose event loop is blocked cannot.

        ``holding`` is the ids of the jobs that the worker has; None: unknown. A job that was
        assigned to it more than ``grace`` seconds ago and is not among them is due again, its
        attempt unspent: the worker will not run it. None: ``lease`` seconds, after which the
        response to that claim was lost. Zero: at once, for a worker that runs no other job, not
        even one whose claim is under way.
        """
        ...


class LeaseStore(WorkerRegistry, Protocol):
    """Port: renews the lease of a worker from a thread, while the worker's event loop is blocked.

    All calls come from one event loop, which is not that of the ledger. It shares neither
    connections nor locks with the ledger.
    """

    async def close(self) -> None:
        """Release its connection, within a second; never raises."""
        ...


class JobLedger(WorkerRegistry, ScheduleStore, Protocol):
    """Port: stores jobs durably.

    Each method is atomic, and any number of processes may call it at once. Each raises
    :class:`LedgerUnavailableError` if the ledger does not answer in time. Cancelling a call leaves
    the ledger consistent; the caller then does not know whether the call took effect.
    """

    async def accept(
        self, drafts: Sequence[JobDraft], *, check: Check | None = None
    ) -> Sequence[Accepted]:
        """Store the jobs and return them in order, or the stored jobs with the same keys.

        A draft with the id of a stored job returns that job, so you can repeat a call after an
        unknown outcome. A draft with the unique key of an unfinished job returns that job; the
        first claim of a job that is unique while it waits, and the end of any job, free its key.

        ``check`` gets the result before the jobs are stored for good; if it raises, none is stored.
        Raises :class:`PayloadError` or :class:`UnstorableError` if the ledger refuses the content
        of a draft; then it stored none of them. So it does for :class:`KeyHeldError`. Without
        ``check``, several drafts with keys are of several callers: the call fails soon then, so
        that others can be stored. Any other call waits for the open transaction for some time.
        """
        ...

    async def accept_in(
        self,
        connection: Any,
        drafts: Sequence[JobDraft],
        *,
        check: Check | None = None,
        on_commit: Callable[[Sequence[Accepted]], None],
    ) -> Sequence[Accepted]:
        """Do as :meth:`accept` in the transaction of ``connection``.

        The jobs exist if and only if that transaction commits.

        ``on_commit`` gets the result after the commit, in the thread of the commit, where the
        ledger can learn of it. Raises :class:`TransactionError` for a connection that has no
        transaction, is of another kind or leads to another database, and the errors of its driver.
        """
        ...

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
        """Assign up to ``limit`` due jobs of a queue to ``worker``.

        A job with a higher priority comes first; among equal ones, the one that has been due for
        longest. A paused queue yields no job. ``ids`` limits the claim to these jobs; unknown ids
        are ignored. ``tasks`` limits it to jobs of these tasks, which are the tasks that the worker
        knows; None: of any task. A backlog of other tasks costs little: beside one, a claim may
        take the jobs of a task before those of the next with the same priority, from the task whose
        job has been due for longest.

        ``limits``: the limits of some of the tasks, by name. Active jobs and starts of all queues
        and workers count. Jobs of such a task are claimed only without ``ids``. Of a limited task
        with keys, each key has its turn. If a limit keeps due jobs back, or another claim decides
        about its task at this moment, ``again_in`` of the answer is finite.

        A job is never assigned to two workers at once: a claim skips jobs that a concurrent claim
        has locked. The worker must be registered, since the next sweep takes the jobs of a worker
        without a valid lease.
        """
        ...

    async def due(
        self,
        queues: Collection[str],
        tasks: Collection[str] | None = None,
        *,
        within: float = 0.0,
    ) -> Mapping[str, float]:
        """Return those of ``queues`` in which a job of one of ``tasks`` is due; None: of any task.

        Also those whose first job is due within some seconds. The value is the seconds until then;
        zero if it is due already. Paused queues are left out. The cost does not depend on the
        number of jobs.
        """
        ...

    async def pause(self, queue: str) -> None:
        """Let no job of a queue be claimed until it is resumed; running jobs go on.

        A queue that is paused already stays so. The queue need not have jobs yet.
        """
        ...

    async def resume(self, queue: str, limit: int = MAX_ANNOUNCED) -> Sequence[str]:
        """End the pause of a queue; return the ids of up to ``limit`` of its due jobs.

        The ids are in the order in which the jobs run.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> Collection[str]:
        """Record the outcomes of claimed jobs; return the ids of the jobs that were settled.

        The ledger skips a settlement whose claim is not the job's latest, or that was settled
        before, so repeating a settlement is harmless. A job that a worker refused is not assigned
        to that worker again, until an operator retries it.

        A job whose cancellation was requested is completed or cancelled, also by a settlement with
        another state. The history of a job gets an entry for each settlement that has an
        ``attempt_error``, and for each crash.

        Raises :class:`UnstorableError` if it refuses the content of a settlement; then it recorded
        none of them. Raises :class:`PartlyDoneError` if it recorded all but those of locked jobs.
        """
        ...

    async def settle_with_effect(
        self,
        claim: Claim,
        effect: Callable[[Any], Awaitable[bytes]],
        progress: Callable[[], bytes | None] = lambda: None,
    ) -> bool:
        """Run ``effect`` and complete the job with its result, in one transaction.

        ``effect`` gets the ledger's connection, or without a database an object that
        :meth:`accept_in` accepts as one, and ``progress`` returns the last report of the task.
        Returns False and rolls the transaction back if the claim is no longer the latest. An error
        of ``effect`` rolls the transaction back too, and is raised; :class:`ResultError` if the
        ledger refuses the result.
        """
        ...

    async def deregister(self, worker: str) -> Mapping[str, Sequence[str]]:
        """Hand back all jobs of the worker, their attempts unspent, and remove the worker.

        Returns the ids that are due again, by queue. Raises :class:`PartlyDoneError` if some jobs
        cannot be handed back yet, or the worker cannot be removed; then it keeps its lease.
        """
        ...

    async def sweep(self, max_crashes: int, before: datetime | None = None) -> SweepResult:
        """Take the jobs of workers whose lease has expired; each counts a crash.

        A job with ``max_crashes`` crashes fails with code ``crashed``; the others are due again.
        From ``before`` on, by the ledger's time, the sweep does nothing: a sweep that an outage
        delayed must not take the jobs of workers that could not renew their leases either.
        """
        ...

    async def expire(
        self, patience: float, before: datetime | None = None
    ) -> Mapping[str, Sequence[str]]:
        """Fail due jobs that no worker could run for ``patience`` seconds; return ids by code.

        * ``unknown_task``: workers with a valid lease consume the queue, and none of them knows the
          task. The time counts from the first call that finds it so, and only while such calls go
          on.
        * ``payload``: every such worker that knows the task refused the job, the first one
          ``patience`` seconds ago.

        One call fails a limited number of jobs. From ``before`` on, by the ledger's time, it does
        nothing, as in :meth:`sweep`.
        """
        ...

    async def unrunnable(self) -> Sequence[UnrunnableJobs]:
        """Count the due jobs that no worker with a valid lease can run, by task.

        :meth:`expire` has the two reasons; for neither counts a queue without a worker. Of the jobs
        whose payload was refused, it counts no more than :data:`MAX_UNRUNNABLE` in all.
        """
        ...

    async def get(self, job_id: str) -> Job | None:
        """Return a job; None if there is no such job or the id is malformed."""
        ...

    async def page(self, wanted: JobFilter = ANY_JOB) -> Sequence[Job]:
        """Return jobs by queue, state and ``before``, newest first; no other field is looked at.

        Jobs in a list have neither payload, result nor history, which are large.
        """
        ...

    async def find(self, correlation_id: str, wanted: JobFilter = ANY_JOB) -> Found:
        """Search for the jobs of a correlation id, as :func:`correlation_id_of_job` returns it.

        A ledger may examine a limited number of jobs per call: then it returns fewer than the
        limit, or none, and the id to continue from. An index over correlation ids could cost more
        on each job than it saves.
        """
        ...

    async def search(self, wanted: JobFilter) -> Found:
        """Search for jobs by any fields; like :meth:`find`, it may examine a limited number."""
        ...

    async def accept_scheduled(self, draft: JobDraft) -> ScheduledAcceptance | None:
        """Accept the job of a schedule for the time ``draft.run_at``, if it is the first one.

        The job and the schedule's ``last_run_at`` are stored together, so that of all calls for a
        time only one creates a job, also once the job is deleted. A schedule that is paused, or was
        resumed at that time or later, gets no job. None: no worker declared a schedule for
        ``draft.task``. Raises as :meth:`accept` does.
        """
        ...

    async def retry(self, job_id: str) -> Job:
        """Make a failed job due now, with its attempts and crashes reset, and its history kept.

        Raises :class:`JobNotFoundError` and :class:`JobStateError`.
        """
        ...

    async def run(self, job_id: str) -> Job:
        """Make a waiting job due now; one that is due already keeps its place.

        Raises :class:`JobNotFoundError` and :class:`JobStateError`.
        """
        ...

    async def cancel(self, job_id: str, *, running: bool = False) -> Job:
        """Cancel a waiting job; with ``running`` request the cancellation of an active one, too.

        Raises :class:`JobNotFoundError` and :class:`JobStateError`.
        """
        ...

    def retry_all(self, wanted: JobFilter, most: int | None = None) -> AsyncIterator[BulkStep]:
        """Do as :meth:`retry` with all failed jobs that match, in steps; each is atomic.

        Together they change at most ``most`` jobs; None: any number. A step changes at most some
        thousand jobs. It waits for no other call: a job that one changes at the same moment is left
        out. Each job is retried at most once, unless the answer of a step is lost: then the step is
        repeated, and the jobs of the first time do not count.
        """
        ...

    def cancel_all(self, wanted: JobFilter, most: int | None = None) -> AsyncIterator[BulkStep]:
        """Do as :meth:`cancel`, also with active jobs, with all that match, in such steps.

        A job that is accepted after the first step may be left out.
        """
        ...

    async def cancel_requests(self, worker: str) -> Mapping[str, int]:
        """Return the jobs that ``worker`` has to cancel: their ids and the numbers of its claims.

        The cost does not depend on the number of jobs.
        """
        ...

    async def report(self, reports: Sequence[ProgressReport]) -> None:
        """Store the progress of running jobs; skip a job whose latest claim is another one.

        It may also skip a job with an effect, until that has ended.
        """
        ...

    async def counts(self) -> Mapping[str, QueueCounts]:
        """Return the counts of each queue that ever had a job, has a consumer or is paused."""
        ...

    async def prune(
        self, older_than: float, limit: int = 1000, *, failed: bool | None = None
    ) -> int:
        """Delete up to ``limit`` jobs that have been final for ``older_than`` seconds.

        ``failed`` selects the failed jobs (True) or the completed and cancelled ones (False); None
        selects all. Within both groups, those that have been final for longest are deleted first.
        Returns how many. Their idempotency keys can be used again.
        """
        ...
