"""The job ledger in Postgres: the row is the job."""

import random
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from asyncpg.connection import Connection

from viralfx.adapters.postgres import job_statements as sql
from viralfx.adapters.postgres.cleaning import Lease
from viralfx.adapters.postgres.database import PostgresDatabase
from viralfx.adapters.postgres.job_acceptance import accept
from viralfx.adapters.postgres.job_effects import Effect, Effects, InDoubtError, SupersededError
from viralfx.adapters.postgres.job_outcomes import record
from viralfx.adapters.postgres.job_rows import (
    Row,
    claims_of_rows,
    counts_of_rows,
    identifier,
    identifiers,
    ids_by_queue,
    interval,
    is_identifier,
    job_of_row,
)
from viralfx.adapters.postgres.job_search import MOST_LOOKED_AT, find
from viralfx.adapters.postgres.job_steps import Steps, Turn
from viralfx.adapters.postgres.outages import BAD_CONTENT, BAD_VALUE
from viralfx.adapters.postgres.own_connection import OwnConnection
from viralfx.domain.clock import Clock, SystemClock
from viralfx.domain.jobs.codec import PayloadError
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
    UnstorableError,
    failed,
)
from viralfx.domain.jobs.ledger import Accepted, Found, QueueCounts, Swept

_rng = random.Random()  # noqa: S311 - numbers that differ, no secrets

_NEWEST = "ffffffff-ffff-ffff-ffff-ffffffffffff"
_MANY_COUNTERS = 100
"""Rows of counters that are worth folding."""
_RETRIED = frozenset({JobState.WAITING, JobState.ACTIVE, JobState.COMPLETED})
_CANCELLED = frozenset({JobState.CANCELLED})
"""In which states a job was changed already, where the answer to the change was lost."""


class PostgresJobLedger:
    """Keeps each job in a row; see :class:`JobLedger` for what it promises.

    A job's lease is that of its worker, so a heartbeat writes one row however many jobs there
    are; the fence is the number of the claim. All statements are such that the one who asks may
    lose the answer and ask again.
    """

    def __init__(
        self,
        database: PostgresDatabase,
        *,
        clock: Clock | None = None,
        patience: float = 8.0,
        most_looked_at: int = MOST_LOOKED_AT,
    ) -> None:
        """``patience`` is how long a call may take, in seconds; cleaning up may add two.

        ``most_looked_at`` is how many jobs :meth:`find` looks at.
        """
        self._most_looked_at = most_looked_at
        clock = clock or SystemClock()
        told = database.retries
        self._steps = Steps(database.acquire, patience=patience, clock=clock, listener=told)
        # Not of the pool: while tasks have all of that, a worker must not be taken for dead.
        own = OwnConnection(database, "heartbeat")
        self._life = Steps(own.acquire, patience=patience, clock=clock, listener=told)
        self._effects = Effects(database, patience)

    # -- accepting ---------------------------------------------------------------------------

    async def accept(self, drafts: Sequence[JobDraft]) -> Sequence[Accepted]:
        """See :class:`JobLedger`; raises :class:`PayloadError` for what is no JSON."""
        try:
            return await self._steps.run(
                lambda turn: accept(turn.connection, drafts, again=turn.again)
            )
        except BAD_VALUE as error:
            raise PayloadError(f"the job cannot be stored: {error}") from error

    async def accept_in(
        self, connection: "Lease | Connection[Any]", drafts: Sequence[JobDraft]
    ) -> Sequence[Accepted]:
        """Accept jobs in the transaction that is open on ``connection``, and live or die with it.

        Raises what the driver raises. No bell rings for them: workers find them by looking, unless
        whoever commits rings. Whoever accepts under the same key meanwhile waits for the end.
        """
        return await accept(connection, drafts, again=False)

    # -- working -----------------------------------------------------------------------------

    async def claim(
        self,
        queue: str,
        worker: str,
        limit: int,
        ids: Collection[str] | None = None,
    ) -> Sequence[Claim]:
        """See :class:`JobLedger`."""
        statement, more = sql.CLAIM, []
        if ids is not None:
            statement, more = sql.CLAIM_THESE, [identifiers(ids)]
        if limit < 1 or more == [[]]:
            return ()
        receipts: list[int] = []

        async def step(turn: Turn) -> Sequence[Row]:
            if receipts:
                # The answer was lost, and with it the knowledge of what it took.
                await turn.connection.execute(sql.TAKE_BACK, worker, receipts)
            receipts.append(_rng.getrandbits(63))
            return await turn.connection.fetch(statement, queue, worker, limit, receipts[-1], *more)

        return claims_of_rows(await self._steps.run(step), worker)

    async def settle(self, settlements: Sequence[Settlement]) -> Collection[str]:
        """See :class:`JobLedger`; a result that is no JSON fails its job, and no other."""
        if not settlements:
            return ()
        try:
            return await self._steps.run(lambda turn: record(turn, settlements))
        except BAD_CONTENT as error:
            if len(settlements) > 1:
                taken: set[str] = set()
                for each in settlements:
                    taken.update(await self.settle([each]))
                return taken
            (bad,) = settlements
            if bad.result is None:
                raise UnstorableError(f"the outcome cannot be stored: {error}") from error
            fault = JobError(code="result", message=f"the result cannot be stored: {error}")
            return await self.settle([failed(bad.claim, fault)])

    async def settle_with_effect(self, claim: Claim, effect: Effect) -> bool:
        """See :class:`JobLedger`.

        No more effects run at once than leave two connections of the pool to everything else, and
        no queue has all of these turns. One that gets none within the ledger's patience did not
        begin, which is :class:`LedgerUnavailableError`.
        """
        try:
            await self._effects.settle(claim, effect)
        except SupersededError:
            return False
        except InDoubtError as error:
            # Under the lock that the transaction in doubt holds, so it has ended when this reads.
            done = await self._steps.run(
                lambda turn: turn.connection.fetchval(sql.OUTCOME, claim.id, claim.number)
            )
            if not done:
                raise LedgerUnavailableError("the database lost the effect and its job") from error
        return True

    async def register(
        self,
        worker: str,
        queues: Collection[str],
        lease: float,
        holding: Collection[str] | None = None,
    ) -> datetime:
        """See :class:`JobLedger`."""
        statement, arguments = sql.REGISTER, [worker, sorted(set(queues)), interval(lease)]
        if holding is not None:
            statement, arguments = sql.REGISTER_HOLDING, [*arguments, identifiers(holding)]
        rows = await self._life.run(lambda turn: turn.connection.fetch(statement, *arguments))
        lease_until: datetime = rows[0]["lease_until"]
        return lease_until

    async def leave(self, worker: str) -> Mapping[str, Sequence[str]]:
        """See :class:`JobLedger`."""
        rows = await self._life.run(lambda turn: turn.connection.fetch(sql.LEAVE, worker))
        return ids_by_queue(rows)

    async def sweep(self, max_crashes: int, before: datetime | None = None) -> Swept:
        """See :class:`JobLedger`; the counters are folded on this occasion."""

        async def step(turn: Turn) -> Sequence[Row]:
            rows = await turn.connection.fetch(sql.SWEEP, max_crashes, before)
            await turn.connection.execute(sql.FOLD, _MANY_COUNTERS)
            return rows

        rows = await self._steps.run(step)
        waiting = [row for row in rows if row["state"] == JobState.WAITING]
        crashed = [str(row["id"]) for row in rows if row["state"] == JobState.FAILED]
        return Swept(returned=ids_by_queue(waiting), crashed=crashed)

    # -- looking and changing ----------------------------------------------------------------

    async def get(self, job_id: str) -> Job | None:
        """See :class:`JobLedger`."""
        if not is_identifier(job_id):
            return None
        row = await self._steps.run(lambda turn: turn.connection.fetchrow(sql.GET, job_id))
        return None if row is None else job_of_row(row)

    async def page(
        self,
        *,
        queue: str | None = None,
        state: JobState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> Sequence[Job]:
        """See :class:`JobLedger`."""
        if before is not None and (before := identifier(before)) is None:
            return ()
        statement, arguments = sql.PAGE, [before or _NEWEST, max(0, limit)]
        if queue is not None or state is not None:
            statement = sql.PAGE_OF_STATE if queue is None else sql.PAGE_OF_QUEUE
            arguments += [queue, [each.value for each in JobState if state in (None, each)]]
        rows = await self._steps.run(lambda turn: turn.connection.fetch(statement, *arguments))
        return [job_of_row(row) for row in rows]

    async def find(
        self,
        correlation_id: str,
        *,
        queue: str | None = None,
        state: JobState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> Found:
        """See :class:`JobLedger`; looks at ``most_looked_at`` jobs and stops."""
        return await self._steps.run(
            lambda turn: find(
                turn.connection,
                correlation_id,
                queue=queue,
                state=state,
                before=_NEWEST if before is None else before,
                limit=limit,
                most=self._most_looked_at,
            )
        )

    async def retry(self, job_id: str) -> Job:
        """See :class:`JobLedger`."""
        return await self._change(job_id, sql.RETRY, "retried", JobState.FAILED, _RETRIED)

    async def cancel(self, job_id: str) -> Job:
        """See :class:`JobLedger`."""
        return await self._change(job_id, sql.CANCEL, "cancelled", JobState.WAITING, _CANCELLED)

    async def _change(
        self, job_id: str, statement: str, change: str, needed: JobState, done: Collection[JobState]
    ) -> Job:
        async def step(turn: Turn) -> Job:
            row = await turn.connection.fetchrow(statement, job_id)
            if row is not None:
                return job_of_row(row)
            row = await turn.connection.fetchrow(sql.GET, job_id)
            if row is None:
                raise JobNotFoundError(f"there is no job {job_id}")
            job = job_of_row(row)
            if turn.again and job.state in done:
                return job
            raise JobStateError(
                f"job {job_id} is {job.state}; only one that is {needed} can be {change}", job.state
            )

        if not is_identifier(job_id):
            raise JobNotFoundError(f"there is no job {job_id}")
        return await self._steps.run(step)

    async def counts(self) -> Mapping[str, QueueCounts]:
        """See :class:`JobLedger`."""
        rows = await self._steps.run(
            lambda turn: turn.connection.fetch(sql.COUNTS, JobState.ACTIVE)
        )
        return counts_of_rows(rows)

    async def prune(self, older_than: float, limit: int = 1000) -> int:
        """See :class:`JobLedger`."""
        arguments = interval(older_than), max(0, limit)
        status = await self._steps.run(lambda turn: turn.connection.execute(sql.PRUNE, *arguments))
        return int(status.split()[-1])
