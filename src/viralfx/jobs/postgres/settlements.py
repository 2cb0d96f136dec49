"""Outcomes of jobs: their statements, and effects that share a transaction with an outcome."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeAlias

import asyncpg
from asyncpg.connection import Connection

from viralfx.core.errors import LedgerUnavailableError, ViralFXError
from viralfx.jobs.codec import ResultError
from viralfx.jobs.ledger import PartlyDoneError
from viralfx.jobs.model import Claim, JobState, Settlement, completed
from viralfx.jobs.postgres.ledger_rows import (
    Row,
    completion_columns,
    settled_columns,
    settlement_columns,
)
from viralfx.jobs.postgres.ledger_sql import MAX_SWEPT_JOBS
from viralfx.postgres.database import Lease, PostgresDatabase
from viralfx.postgres.errors import (
    BAD_VALUE,
    DATABASE_ERRORS,
    refusal,
    unavailable,
)
from viralfx.postgres.migrations import Statements
from viralfx.postgres.retry import Attempt, Place, in_portions, is_loss, is_rolled_back

_logger = logging.getLogger("viralfx.jobs")

Effect = Callable[[Any], Awaitable[bytes]]
Report = Callable[[], bytes | None]

Session: TypeAlias = "Lease | Connection[Any]"


def log_refused(message: str) -> Callable[[Sequence[str], str | None], None]:
    """Return a function that logs refused jobs; they are left to a later sweep."""
    return lambda ids, code: _logger.error(message, extra={"jobs": ids, "code": code})


async def finish_cancelled(
    connection: Session, sql: Statements, place: Place | None = None
) -> Collection[str]:
    """Move the jobs that wait for it to the cancelled ones; return their ids.

    A job that the server refuses does not keep the others; it is left to a later sweep. ``place``
    is that of the sweeps.
    """
    rows = await in_portions(
        lambda ids: connection.fetch(sql.FINISH_CANCELLED, MAX_SWEPT_JOBS, ids),
        lambda after: ids_of(connection.fetch(sql.ENDING, MAX_SWEPT_JOBS, after)),
        log_refused("Cancellation refused by the ledger"),
        place,
    )
    return [str(row["id"]) for row in rows]


async def ids_of(fetching: Awaitable[Sequence[Row]]) -> Sequence[str]:
    """Return the ids in the rows of a query."""
    return [str(row["id"]) for row in await fetching]


async def record(
    attempt: Attempt, sql: Statements, settlements: Sequence[Settlement], *, waits: bool = False
) -> Collection[str]:
    """Record outcomes; return the ids of the jobs that this or an earlier attempt settled.

    If an outcome cannot be stored, none is recorded. Unless ``waits``, a lock is an error soon.
    """
    connection, completing, reporting = attempt.connection, 0, False
    for each in settlements:
        completing += each.state is JobState.COMPLETED
        reporting = reporting or each.progress is not None
    if completing == len(settlements) and not reporting:
        columns = completion_columns(settlements)
        rows = await connection.fetch(sql.SETTLE_COMPLETED, *columns, not waits)
    else:
        statement = sql.SETTLE_ALL if completing else sql.SETTLE_OTHERS
        rows = await connection.fetch(statement, *settlement_columns(settlements), not waits)
        if any(row["cancel_requested"] for row in rows):
            await finish_cancelled(connection, sql)
    settled = {str(row["id"]) for row in rows}
    if attempt.again:
        others = [each for each in settlements if each.claim.id not in settled]
        rows = await attempt.connection.fetch(sql.SETTLED_BEFORE, *settled_columns(others))
        settled.update(str(row["id"]) for row in rows)
    return settled


async def record_unlocked(
    attempt: Attempt, sql: Statements, settlements: Sequence[Settlement]
) -> Collection[str]:
    """Record the outcomes of the jobs that no other session has locked; return as :func:`record`.

    Raises :class:`PartlyDoneError` if any are locked.
    """
    fetch, ids = attempt.connection.fetch, [each.claim.id for each in settlements]
    free = {row["id"] for row in await fetch(sql.UNLOCKED, ids)}
    active = {(row["id"], row["claims"]) for row in await fetch(sql.ACTIVE, ids)}
    keys = [(each.claim.id, each.claim.number) for each in settlements]
    locked = {key[0] for key in keys if key in active and key[0] not in free}
    others = [each for each in settlements if each.claim.id not in locked]
    # Any other lock, such as one that a trigger waits for, is not for a moment only.
    settled = await record(attempt, sql, others, waits=True) if others else ()
    if locked:
        # The lock may be that of an earlier attempt, which the server still carries out.
        raise PartlyDoneError(
            "other transactions lock their rows", locked, settled=settled, doubtful=attempt.again
        )
    return settled


_CHECKS = 4
"""Checks of a cancelled effect within the timeout after which it is evicted."""


class SupersededError(ViralFXError):
    """The claim is not the job's latest; the effect was rolled back or did not start."""


class InDoubtError(ViralFXError):
    """The response to COMMIT was lost."""


async def is_completed(connection: Any, sql: Statements, claim: Claim) -> bool:
    """Return whether the job was completed under a claim, once no transaction is in doubt."""
    # Waits for the row lock of such a transaction, so that has ended.
    await connection.execute(sql.AWAIT_CHANGE, claim.id)
    return bool(await connection.fetchval(sql.COMPLETED_BY, claim.id, claim.number))


class Effects:
    """Runs effects with limited concurrency, so that other work gets connections."""

    def __init__(self, database: PostgresDatabase, sql: Statements, timeout: float) -> None:
        """``timeout``: seconds for each step except the effect itself."""
        self._database = database
        self._sql = sql
        self._timeout = timeout
        # Two connections stay free for claims, outcomes and other queries.
        turns = max(1, database.config.settings.pool_max - 2)
        self._turns = asyncio.Semaphore(turns)
        # One slot is always left for the other queues.
        self._turns_of_queue: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(max(1, turns - 1))
        )
        self.unchangeable: set[str] = set()
        """Jobs whose rows others may not change until their effects have ended: a transaction with
        one snapshot, which is the default of some databases, could not complete them."""

    async def settle(self, claim: Claim, effect: Effect, progress: Report) -> None:
        """Run ``effect`` and complete the job, in one transaction.

        The duration of the effect is not limited, but the wait for a slot is: another worker may
        have a free one. Raises the errors of ``effect``, :class:`SupersededError` and
        :class:`LedgerUnavailableError`, after each of which the effect is rolled back, and
        :class:`InDoubtError`.
        """
        async with self._turn(claim.queue) as turn:
            await _TransactionalExecution(
                self._database,
                self._sql,
                claim,
                effect,
                turn,
                unchangeable=self.unchangeable,
                progress=progress,
                timeout=self._timeout,
            ).run()

    @asynccontextmanager
    async def _turn(self, queue: str) -> AsyncIterator[AsyncExitStack]:
        async with AsyncExitStack() as turn:
            try:
                async with asyncio.timeout(self._timeout):
                    await turn.enter_async_context(self._turns_of_queue[queue])
                    await turn.enter_async_context(self._turns)
            except TimeoutError as error:
                reason = "the tasks that run have all its connections"
                raise LedgerUnavailableError(reason) from error
            yield turn


class _TransactionalExecution:
    """One effect and its progress."""

    def __init__(
        self,
        database: PostgresDatabase,
        sql: Statements,
        claim: Claim,
        effect: Effect,
        turn: AsyncExitStack,
        *,
        unchangeable: set[str],
        progress: Report,
        timeout: float,
    ) -> None:
        self._database = database
        self._sql = sql
        self._timeout = timeout
        self._claim = claim
        self._effect = effect
        self._progress = progress
        self._turn = turn
        self._unchangeable = unchangeable
        self._limit = asyncio.timeout(timeout)
        self._failed_by_itself = False
        self._settled = False

    async def run(self) -> None:
        try:
            async with self._limit:
                # No retries: a rollback does not undo the effect's actions outside the database.
                await self._database.execute_with_retry(self._operate, attempts=1)
        except DATABASE_ERRORS as error:
            # At COMMIT: a deferred constraint refuses the rows of the effect.
            refused_at_commit = self._settled and refusal(error) is not None
            # The effect may have met a server that accepts no writes any more.
            demoted = isinstance(error, asyncpg.ReadOnlySQLTransactionError) and is_loss(error)
            if (self._failed_by_itself and not demoted) or refused_at_commit:
                raise
            if self._settled and not is_rolled_back(error):
                raise InDoubtError("the response to COMMIT was lost") from error
            raise unavailable(error) from error
        finally:
            self._unchangeable.discard(self._claim.id)

    async def _operate(self, connection: Lease) -> None:
        # No row lock yet: it would block the sweep of a worker that hangs in its effect.
        isolation = await connection.fetchval(self._sql.HELD, self._claim.id, self._claim.number)
        if isolation is None:
            raise SupersededError(f"job {self._claim.id} is no longer that of this claim")
        if isolation != "read committed":
            self._unchangeable.add(self._claim.id)
        self._limit.reschedule(None)
        watching = asyncio.create_task(self._evict(connection, asyncio.current_task()))
        try:
            result = await self._effect(connection)
        except Exception as error:
            ends = connection.is_closed() or isinstance(error, asyncpg.InternalClientError)
            self._failed_by_itself = not (ends and is_loss(error))
            raise
        finally:
            watching.cancel()
        self._limit.reschedule(asyncio.get_running_loop().time() + self._timeout)
        await self._complete(connection, result)

    async def _evict(self, connection: Lease, runner: "asyncio.Task[Any] | None") -> None:
        """Take connection and slot from an effect that ignores its cancellation.

        Otherwise it would keep both although its result is no longer needed.
        """
        ignored_checks = 0
        while ignored_checks <= _CHECKS:
            await asyncio.sleep(self._timeout / _CHECKS)
            ignored = runner is not None and runner.cancelling() > 0
            ignored_checks = ignored_checks + 1 if ignored else 0
        with suppress(asyncpg.InterfaceError):  # already closed
            connection.terminate()
        await self._turn.aclose()

    async def _complete(self, connection: Lease, result: bytes) -> None:
        if not (connection.is_closed() or connection.is_in_transaction()):
            raise RuntimeError("the task ended the transaction that would complete its job")
        try:
            columns = completion_columns([completed(self._claim, result)])
            report = self._progress()
            progress = [None if report is None else report.decode()]
            settled = await connection.fetch(self._sql.SETTLE_AND_COMMIT, *columns, progress)
        except asyncpg.InFailedSQLTransactionError as error:
            self._failed_by_itself = True
            error.add_note("The task continued after a statement of its transaction had failed.")
            raise
        except (*BAD_VALUE, asyncpg.PostgresError) as error:
            if (refused := refusal(error)) is None:
                raise
            raise ResultError(f"the result cannot be stored: {refused}") from error
        except asyncpg.InterfaceError as error:
            if connection.is_closed():
                raise
            raise RuntimeError(
                "an asyncio task that it left behind uses its connection; await each statement"
            ) from error
        if not settled:
            raise SupersededError(
                f"job {self._claim.id} was given to another worker during its effect"
            )
        self._settled = True
