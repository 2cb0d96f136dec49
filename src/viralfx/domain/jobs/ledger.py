"""The ledger port: what is accepted here is kept until it reached a final state.

All time is the ledger's own, so that workers whose clocks differ agree about leases.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from viralfx.domain.jobs.job import Claim, Job, JobDraft, JobState, Settlement


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job in the ledger; ``created`` is False where its key had been accepted before."""

    job: Job
    created: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Jobs that were looked for, the newest first."""

    jobs: Sequence[Job]
    before: str | None
    """The id to go on looking from; None: there are no older jobs that it could be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueCounts:
    """How one queue stands."""

    waiting: int = 0
    """Jobs that are due."""
    scheduled: int = 0
    """Jobs whose ``run_at`` is still to come."""
    active: int = 0
    completed: int = 0
    """Since the ledger began, those included that were pruned since."""
    failed: int = 0
    """Likewise; a job that failed, was retried and completed counts as completed alone."""
    cancelled: int = 0
    """Likewise."""
    oldest_due: float = 0.0
    """Seconds for which the longest waiting job has been due."""
    consumers: int = 0
    """Workers that consume this queue and whose lease is good."""


Counts = Callable[[], Awaitable[Mapping[str, QueueCounts]]]
"""Finds out how the queues stand; raises :class:`LedgerUnavailableError`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What a sweep did: the ids of the jobs that wait again by queue, and of those given up."""

    returned: Mapping[str, Sequence[str]] = field(default_factory=dict)
    crashed: Sequence[str] = ()


class JobLedger(Protocol):
    """Port: keeps jobs.

    Each method is one step that happened entirely or not at all, and each may be called by any
    number of processes at once. Each raises :class:`LedgerUnavailableError` when the ledger
    cannot be reached in time. Cancelling a call leaves the ledger consistent; whether the step
    happened is then unknown.
    """

    async def accept(self, drafts: Sequence[JobDraft]) -> Sequence[Accepted]:
        """Keep the jobs durably and return them in order, or what is kept under their keys.

        A draft whose id is kept is that job: accepting again after an unknown outcome is harmless.
        """
        ...

    async def claim(
        self,
        queue: str,
        worker: str,
        limit: int,
        ids: Collection[str] | None = None,
    ) -> Sequence[Claim]:
        """Give up to ``limit`` due jobs of a queue to ``worker``, the longest due first.

        With ``ids`` only of these, whatever else is among them. A job is never given to two
        workers at once. What another claim is just taking is passed over, not waited for. The
        worker must have registered: what one without a good lease has, the next sweep takes.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> Collection[str]:
        """Record what became of claimed jobs; return the ids of those that were taken.

        One whose claim is no longer the job's latest, or that was settled before, is passed over.
        Settling again what was taken is therefore harmless. A result that cannot be kept for what
        it is fails its job with code ``result``, and no other. Raises :class:`UnstorableError` when
        nothing of that kind helps.
        """
        ...

    async def settle_with_effect(
        self, claim: Claim, effect: Callable[[Any], Awaitable[bytes]]
    ) -> bool:
        """Run ``effect`` and complete the job with what it returns, in one transaction.

        ``effect`` gets the ledger's connection (None where a ledger has none). Returns False,
        with everything the effect wrote rolled back, when the claim is no longer the latest.
        What ``effect`` raises rolls back likewise and is raised.
        """
        ...

    async def register(
        self,
        worker: str,
        queues: Collection[str],
        lease: float,
        holding: Collection[str] | None = None,
    ) -> datetime:
        """Note that ``worker`` lives and consumes ``queues``, for the next ``lease`` seconds.

        Returns when the lease ends, by the ledger's time.

        The name is of one life of one process: who starts again takes a new one. Called again it
        renews the lease: of all the worker's jobs at once. ``holding`` is the ids that it knows to
        have, None when it does not say. What it was given more than ``lease`` seconds ago and is
        not among them waits as before, without any cost: the answer to that claim never came, and
        nobody would ever run the job.
        """
        ...

    async def leave(self, worker: str) -> Mapping[str, Sequence[str]]:
        """Hand back whatever the worker still has, without any cost, and forget the worker.

        Returns the ids that wait again, by queue.
        """
        ...

    async def sweep(self, max_crashes: int, before: datetime | None = None) -> Swept:
        """Take the jobs from workers whose lease ran out, each counted as a crash.

        A job with ``max_crashes`` crashes fails with code ``crashed``; the others wait as before.
        Nobody's job is taken once it is ``before`` by the ledger's time: a sweep that was held up
        on its way, while nobody could renew a lease, is too late to do harm.
        """
        ...

    async def get(self, job_id: str) -> Job | None:
        """Return a job; None when there is none, or the id is none."""
        ...

    async def page(
        self,
        *,
        queue: str | None = None,
        state: JobState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> Sequence[Job]:
        """Return jobs, the newest first, from those older than the id ``before``.

        There need not be a job of that id any more; before what is no id there are none.
        """
        ...

    async def find(
        self,
        correlation_id: str,
        *,
        queue: str | None = None,
        state: JobState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> Found:
        """Look for the jobs of a conversation, as :func:`conversation_of` tells it.

        Only for those older than the id ``before``, as for a page; ``limit`` is one or more. A
        ledger may look at so many jobs and stop: then it finds fewer, or none, and says where to go
        on. To note whose conversation each job is could cost every job more than it is worth.
        """
        ...

    async def retry(self, job_id: str) -> Job:
        """Have a failed job wait again, due now, its attempts and crashes forgotten.

        Raises :class:`JobNotFoundError` and :class:`JobStateError`.
        """
        ...

    async def cancel(self, job_id: str) -> Job:
        """Cancel a waiting job. Raises :class:`JobNotFoundError` and :class:`JobStateError`."""
        ...

    async def counts(self) -> Mapping[str, QueueCounts]:
        """Return how each queue stands that ever had a job or has a consumer."""
        ...

    async def prune(self, older_than: float, limit: int = 1000) -> int:
        """Forget up to ``limit`` jobs that reached a final state ``older_than`` seconds ago.

        Returns how many. Their keys are free again.
        """
        ...
