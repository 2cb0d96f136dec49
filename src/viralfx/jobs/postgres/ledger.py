"""The job ledger in Postgres: one row for each job."""

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import asyncpg

from viralfx.core.clock import Clock, SystemClock
from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.batching import keys_of
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.ledger import (
    MAX_ANNOUNCED,
    NO_LIMITS,
    Accepted,
    Check,
    Claims,
    KeyHeldError,
    PartlyDoneError,
    QueueCounts,
    Registration,
    SweepResult,
    UnrunnableJobs,
)
from viralfx.jobs.limits import Limit
from viralfx.jobs.model import Claim, JobDraft, JobState, Settlement
from viralfx.jobs.postgres import claims, enqueue, job_changes, ledger_sql
from viralfx.jobs.postgres.claims import Claimer, Wanted, register
from viralfx.jobs.postgres.enqueue import accept, accept_in, is_of_key
from viralfx.jobs.postgres.job_changes import MAX_SCANNED_JOBS, JobChanges
from viralfx.jobs.postgres.ledger_rows import (
    Row,
    claims_of_rows,
    counts_of_rows,
    identifiers,
    ids_by_queue,
    interval,
)
from viralfx.jobs.postgres.ledger_sql import MAX_SWEPT_JOBS, PROMOTED_AT_ONCE, SOON_SECONDS
from viralfx.jobs.postgres.settlements import (
    Effect,
    Effects,
    InDoubtError,
    SupersededError,
    finish_cancelled,
    ids_of,
    is_completed,
    log_refused,
    record,
    record_unlocked,
)
from viralfx.postgres.database import PostgresDatabase
from viralfx.postgres.errors import BAD_VALUE, is_fault_of_server, refusal
from viralfx.postgres.migrations import Statements, channel_of
from viralfx.postgres.pool import PING_AFTER
from viralfx.postgres.retry import Attempt, Place, RetriedSteps, in_portions
from viralfx.postgres.servers import OwnDatabase

_logger = logging.getLogger("viralfx.jobs")

MIN_COUNTERS_TO_FOLD = 100
"""Number of counter rows from which the sweep folds them."""
_PROMOTION_SECONDS = 20.0
"""With a takeover of the sweep, which takes some 40 s, still shorter than ``SOON_SECONDS``."""
_FORGETTING_SECONDS = 600.0
"""It reads all keys of limits: a rate per day has those of a day."""
_FORGOTTEN_AT_ONCE = 10_000
_MAX_PROMOTIONS = 25
"""Batches of one sweep; a batch takes some 50 ms."""
_MAYBE_REFUSED = (*BAD_VALUE, LedgerUnavailableError)
"""The errors of a step that may be a refusal."""
_NO_CRASH_LIMIT = 2**31 - 1
_KEY_SHARE = 0.75
"""Share of a call's time for which it waits for an open transaction with the same key."""
_SHARED_KEY_SECONDS = 0.1
"""The wait of a call that several callers share."""


class PostgresJobLedger(JobChanges):
    """Keeps each job in a row; see :class:`JobLedger` for the contract.

    A job's lease is that of its worker, so a heartbeat writes one row for any number of jobs. The
    fencing token is the number of the claim. All statements can be repeated if their response is
    lost.
    """

    def __init__(
        self,
        database: PostgresDatabase,
        *,
        clock: Clock | None = None,
        timeout: float = 8.0,
        max_scanned: int = MAX_SCANNED_JOBS,
        notifies: bool = False,
    ) -> None:
        """``timeout``: seconds for a call; cleaning up may add two.

        ``max_scanned``: number of jobs that :meth:`find` scans. ``notifies``: whether workers
        listen for the notifications of transactions.
        """
        self._max_scanned = max_scanned
        self._clock = clock = clock or SystemClock()
        self._timeout = timeout
        self._promote_at = self._forget_at = -math.inf
        self._lost, self._ending, self._soon = Place(), Place(), Place()
        self._pruned_to: dict[bool, datetime] = {}
        """When the last job of a full batch had finished; of failed jobs, and of the others."""
        listener = database.retries
        # Each statement of a step is a transaction of its own and changes no session.
        self._steps = RetriedSteps(
            partial(database.acquire, reset=False), timeout=timeout, clock=clock, listener=listener
        )
        # Not of the pool: if tasks use all of it, the lease must still be renewed.
        self._database = database
        self._dedicated = database.dedicated("heartbeat")
        self._lease_steps = RetriedSteps(
            self._dedicated.acquire, timeout=timeout, clock=clock, listener=listener
        )
        schema = database.config.settings.schema
        self._channel = channel_of(schema) if notifies else None
        self._own = OwnDatabase(
            partial(database.connector.connect, purpose="identity"),
            holds=database.members.holds,
            timeout=timeout,
        )
        self._sql = Statements(schema, ledger_sql, claims, job_changes, enqueue)
        scheduler = enqueue.Schedules(self._steps, self._sql)
        self.declare_schedules = scheduler.declare
        self.accept_scheduled = scheduler.accept
        self.schedules = scheduler.states
        self.pause_schedule = scheduler.pause
        self.resume_schedule = scheduler.resume
        self._register = partial(register, self._lease_steps, self._sql)
        self._claimer = Claimer(self._sql, clock)
        self._effects = Effects(database, self._sql, timeout)

    # -- accepting ---------------------------------------------------------------------------

    async def accept(
        self, drafts: Sequence[JobDraft], *, check: Check | None = None
    ) -> Sequence[Accepted]:
        """See :class:`JobLedger`; raises :class:`PayloadError` for a value that is not valid."""
        limit: float | None = None
        if any(map(keys_of, drafts)):
            shared = check is None and len(drafts) > 1
            limit = _SHARED_KEY_SECONDS if shared else _KEY_SHARE * self._timeout

        async def step(attempt: Attempt) -> Sequence[Accepted]:
            try:
                return await self._accept_once(attempt, drafts, check, limit)
            except asyncpg.LockNotAvailableError as error:
                if is_of_key(error):
                    raise KeyHeldError(drafts) from error
                # A lock of the table, as that of a migration.
                return await self._accept_once(attempt, drafts, check, None)

        try:
            return await self._steps.run(step, max_idle=PING_AFTER)
        except _MAYBE_REFUSED as error:
            if (refused := refusal(error)) is None:
                raise
            if is_fault_of_server(refused.code):
                raise refused from error
            raise PayloadError(f"the job cannot be stored: {refused}") from error

    async def _accept_once(
        self, attempt: Attempt, drafts: Sequence[JobDraft], check: Check | None, limit: float | None
    ) -> Sequence[Accepted]:
        connection, again = attempt.connection, attempt.again
        call = partial(accept, connection, self._sql, drafts, again=again, lock_timeout=limit)
        if check is None:
            # Another isolation level may be the default of this database or user.
            with contextlib.suppress(asyncpg.FeatureNotSupportedError):
                return await call()
        async with connection.transaction(isolation="read_committed"):
            accepted = await call()
            if check is not None:
                check(accepted)
            return accepted

    async def accept_in(
        self,
        connection: Any,
        drafts: Sequence[JobDraft],
        *,
        check: Check | None = None,
        on_commit: Callable[[Sequence[Accepted]], None] = lambda _: None,
    ) -> Sequence[Accepted]:
        """See :class:`JobLedger`.

        A concurrent accept with the same key waits for the end of the transaction.
        """
        return await accept_in(
            connection,
            self._sql,
            drafts,
            check=check,
            on_commit=on_commit,
            channel=self._channel,
            own=self._own,
        )

    # -- working -----------------------------------------------------------------------------

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
        """See :class:`JobLedger`."""
        valid = None if ids is None else identifiers(ids)
        if limit < 1 or valid == []:
            return Claims()
        wanted = Wanted(queue, worker, limit, tasks, valid, limits)
        receipts: list[int] = []

        async def step(attempt: Attempt) -> tuple[Sequence[Row], float]:
            if receipts:
                # The response was lost, and with it the ids of the claimed jobs.
                await attempt.connection.execute(self._sql.UNDO_CLAIM, worker, receipts)
            return await self._claimer.claim(attempt.connection, wanted, receipts)

        rows, again_in = await self._steps.run(step)
        return Claims(claims_of_rows(rows, queue, worker), again_in)

    async def pause(self, queue: str) -> None:
        """See :class:`JobLedger`."""
        await self._changed(self._sql.PAUSE, queue)

    async def resume(self, queue: str, limit: int = MAX_ANNOUNCED) -> Sequence[str]:
        """See :class:`JobLedger`."""
        rows = await self._fetched_by_index(self._sql.RESUME, queue, limit)
        return [str(row["id"]) for row in rows]

    async def due(
        self,
        queues: Collection[str],
        tasks: Collection[str] | None = None,
        *,
        within: float = 0.0,
    ) -> Mapping[str, float]:
        """See :class:`JobLedger`."""
        asked = list(queues), None if tasks is None else list(tasks), within
        rows = await self._fetched_by_index(self._sql.DUE, *asked)
        return {row["queue"]: row["seconds"] for row in rows}

    async def settle(self, settlements: Sequence[Settlement]) -> Collection[str]:
        """See :class:`JobLedger`."""
        if not settlements:
            return ()

        async def step(attempt: Attempt) -> Collection[str]:
            try:
                return await record(attempt, self._sql, settlements)
            except asyncpg.LockNotAvailableError:
                return await record_unlocked(attempt, self._sql, settlements)

        try:
            return await self._steps.run(step)
        except _MAYBE_REFUSED as error:
            if (refused := refusal(error)) is None:
                raise
            raise refused from error

    async def settle_with_effect(
        self,
        claim: Claim,
        effect: Effect,
        progress: Callable[[], bytes | None] = lambda: None,
    ) -> bool:
        """See :class:`JobLedger`.

        Concurrent effects leave two connections of the pool free, and one queue cannot use all
        slots for effects. An effect that gets no slot within the ledger's timeout does not start:
        :class:`LedgerUnavailableError`.
        """
        try:
            await self._effects.settle(claim, effect, progress)
        except SupersededError:
            return False
        except InDoubtError as error:
            if not await self._steps.run(lambda a: is_completed(a.connection, self._sql, claim)):
                raise LedgerUnavailableError("the database lost the effect and its job") from error
        return True

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
        """See :class:`JobLedger`."""
        return await self._register(
            worker, queues, lease, holding=holding, tasks=tasks, eligible=eligible, grace=grace
        )

    async def deregister(self, worker: str) -> Mapping[str, Sequence[str]]:
        """See :class:`JobLedger`."""
        # The budget of a drain is short: an idle connection of the pool saves opening one.
        idle = self._database.idle_connections and not self._dedicated.is_open
        steps = self._steps if idle else self._lease_steps

        async def step(attempt: Attempt) -> Mapping[str, Sequence[str]]:
            fetch = attempt.connection.fetch
            rows = await in_portions(
                lambda ids: fetch(self._sql.HAND_BACK, worker, ids),
                lambda _: ids_of(fetch(self._sql.HELD_BY, worker)),
                log_refused("Hand-back refused by the ledger"),
            )
            if any(row["cancel_requested"] for row in rows):
                await finish_cancelled(attempt.connection, self._sql)
            returned = ids_by_queue(row for row in rows if not row["cancel_requested"])
            if kept := await fetch(self._sql.DEREGISTER, worker):
                left = [row["id"] for row in kept if row["id"] is not None]
                reason = "their rows are locked, or may not be changed"
                if not left:
                    reason = "the row of the worker is locked"
                raise PartlyDoneError(reason, left, returned=returned)
            return returned

        return await steps.run(step)

    async def sweep(self, max_crashes: int, before: datetime | None = None) -> SweepResult:
        """See :class:`JobLedger`; also promotes scheduled jobs and folds the counters.

        Takes up to ``MAX_SWEPT_JOBS`` jobs. If another sweep is under way, it takes none. If the
        server refuses a failed job, such as by a trigger, all of them are due again. If it refuses
        any change of a job, that one alone is left to a later sweep. After many such jobs, the next
        sweep goes on with those that follow them.
        """

        async def take(ids: Sequence[str] | None) -> Sequence[Row]:
            more = before, MIN_COUNTERS_TO_FOLD, ids
            try:
                return await self._fetch(self._sql.SWEEP, max_crashes, *more)
            except _MAYBE_REFUSED as error:
                if refusal(error) is None or (ids is not None and len(ids) > 1):
                    raise
                # One row must not keep the jobs of all workers that have died.
                return await self._fetch(self._sql.SWEEP, _NO_CRASH_LIMIT, *more)

        rows = await in_portions(
            take,
            lambda after: ids_of(self._fetch(self._sql.LOST, MAX_SWEPT_JOBS, after)),
            log_refused("Sweep refused by the ledger"),
            self._lost,
        )
        waiting = [row for row in rows if row["state"] == JobState.WAITING]
        crashed = [str(row["id"]) for row in rows if row["state"] == JobState.FAILED]
        cancelled: Collection[str] = ()
        # Afterwards, since it may take long or fail, and the sweep has a time limit.
        try:
            if any(row["state"] == JobState.ACTIVE for row in rows):
                cancelled = await self._steps.run(
                    lambda attempt: finish_cancelled(attempt.connection, self._sql, self._ending)
                )
            await self._promote_all()
        except _MAYBE_REFUSED:
            if not (waiting or crashed):
                raise
            # The jobs must be reported; the next sweep promotes.
        return SweepResult(
            returned=ids_by_queue(waiting), crashed=crashed, cancelled=tuple(cancelled)
        )

    async def _promote_all(self) -> None:
        """Do it seldom: scheduled jobs are promoted long before they are due."""
        if self._clock.monotonic() < self._promote_at:
            return
        limits = SOON_SECONDS, PROMOTED_AT_ONCE
        for _ in range(_MAX_PROMOTIONS):
            promoted = await in_portions(
                lambda ids: self._fetch(self._sql.PROMOTE, *limits, ids),
                lambda after: ids_of(self._fetch(self._sql.SOON, *limits, after)),
                log_refused("Promotion refused by the ledger"),
                self._soon,
            )
            if len(promoted) < PROMOTED_AT_ONCE:
                # Jobs that follow refused ones may be due already.
                if self._soon.after is None:
                    self._promote_at = self._clock.monotonic() + _PROMOTION_SECONDS
                await self._forget_limits()
                break

    async def _forget_limits(self) -> None:
        """Delete the keys of rates whose period is over."""
        if self._clock.monotonic() < self._forget_at:
            return
        for _ in range(_MAX_PROMOTIONS):
            forgotten = await self._changed(self._sql.FORGET_LIMITS, _FORGOTTEN_AT_ONCE)
            if forgotten < _FORGOTTEN_AT_ONCE:
                self._forget_at = self._clock.monotonic() + _FORGETTING_SECONDS
                break

    async def _fetch(self, statement: str, *arguments: object, **options: float) -> Sequence[Row]:
        return await self._steps.run(lambda a: a.connection.fetch(statement, *arguments), **options)

    async def expire(
        self, patience: float, before: datetime | None = None
    ) -> Mapping[str, Sequence[str]]:
        """See :class:`JobLedger`; an id of a lost response is missing from the answer."""
        return await self._steps.run(
            lambda attempt: claims.expire(attempt.connection, self._sql, interval(patience), before)
        )

    async def unrunnable(self) -> Sequence[UnrunnableJobs]:
        """See :class:`JobLedger`."""
        return await self._steps.run(
            lambda attempt: claims.unrunnable(attempt.connection, self._sql)
        )

    async def counts(self) -> Mapping[str, QueueCounts]:
        """See :class:`JobLedger`."""
        rows = await self._fetch(self._sql.COUNTS, JobState.WAITING)
        return counts_of_rows(rows)

    async def prune(
        self, older_than: float, limit: int = 1000, *, failed: bool | None = None
    ) -> int:
        """See :class:`JobLedger`."""
        pruned = 0
        for kind in (False, True) if failed is None else (failed,):
            pruned += await self._prune(interval(older_than), limit - pruned, failed=kind)
        return pruned

    async def _prune(self, older_than: float, limit: int, *, failed: bool) -> int:
        """Delete up to ``limit`` jobs: first those that finished after the full batch before.

        If these are too few, it looks for older ones that the batch left, since they were locked.
        """
        statement = self._sql.PRUNE_FAILED if failed else self._sql.PRUNE
        begin, pruned = self._pruned_to.pop(failed, None), 0
        while pruned < limit:
            (batch,) = await self._fetch(statement, older_than, limit - pruned, begin)
            pruned += batch["jobs"]
            if pruned >= limit:
                self._pruned_to[failed] = batch["last"]
            elif begin is None:
                break
            begin = None
        return pruned
