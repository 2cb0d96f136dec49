"""Effects of tasks that are one transaction with the completion of their job."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from viralfx.adapters.postgres.cleaning import Lease
from viralfx.adapters.postgres.database import PostgresDatabase
from viralfx.adapters.postgres.errors import DATABASE_ERRORS, is_loss, is_rolled_back
from viralfx.adapters.postgres.job_rows import settlement_columns
from viralfx.adapters.postgres.job_statements import HELD, SETTLE_AND_COMMIT
from viralfx.adapters.postgres.outages import BAD_VALUE, unavailable
from viralfx.domain.errors import ViralFXError
from viralfx.domain.jobs.codec import ResultError
from viralfx.domain.jobs.job import Claim, completed

Effect = Callable[[Any], Awaitable[bytes]]


class SupersededError(ViralFXError):
    """The claim is no longer the job's latest; nothing is left of the effect, if it began."""


class InDoubtError(ViralFXError):
    """The answer to COMMIT never came."""


class Effects:
    """Runs effects, so many at a time that connections are left for everything else."""

    def __init__(self, database: PostgresDatabase, patience: float) -> None:
        """``patience`` is in seconds, for each part but the effect itself."""
        self._database = database
        self._patience = patience
        # One for heartbeats and one for claims and outcomes: a worker whose own effects kept it
        # from renewing its lease would lose them all.
        self._slots = asyncio.Semaphore(max(1, database.config.pool_max - 2))

    async def settle(self, claim: Claim, effect: Effect) -> None:
        """Run ``effect`` and complete the job, in one transaction.

        It waits for its turn, and lets the effect run, for as long as that takes. Raises what
        ``effect`` raises, :class:`SupersededError`, :class:`LedgerUnavailableError`, with all of
        which nothing is left of the effect, and :class:`InDoubtError`.
        """
        async with self._slots:
            await _Execution(self._database, self._patience, claim, effect).run()


class _Execution:
    """One effect, and how far it came."""

    def __init__(
        self, database: PostgresDatabase, patience: float, claim: Claim, effect: Effect
    ) -> None:
        self._database = database
        self._patience = patience
        self._claim = claim
        self._effect = effect
        self._limit = asyncio.timeout(patience)
        self._failed_by_itself = False
        self._settled = False

    async def run(self) -> None:
        try:
            async with self._limit:
                # Not again: what it did elsewhere is not undone by a rollback.
                await self._database.execute_with_retry(self._operate, attempts=1)
        except DATABASE_ERRORS as error:
            if self._failed_by_itself:
                raise
            if self._settled and not is_rolled_back(error):
                raise InDoubtError("the answer to COMMIT never came") from error
            raise unavailable(error) from error

    async def _operate(self, connection: Lease) -> None:
        # No lock yet: that would hold up the sweep of a worker that hangs in its effect.
        if not await connection.fetchval(HELD, self._claim.id, self._claim.number):
            raise SupersededError(f"job {self._claim.id} is no longer that of this claim")
        self._limit.reschedule(None)
        try:
            result = await self._effect(connection)
        except Exception as error:
            ends = connection.is_closed() or isinstance(error, asyncpg.InternalClientError)
            self._failed_by_itself = not (ends and is_loss(error))
            raise
        self._limit.reschedule(asyncio.get_running_loop().time() + self._patience)
        await self._complete(connection, result)

    async def _complete(self, connection: Lease, result: bytes) -> None:
        if not (connection.is_closed() or connection.is_in_transaction()):
            raise RuntimeError("the task ended the transaction that would complete its job")
        try:
            columns = settlement_columns([completed(self._claim, result)])
            taken = await connection.fetch(SETTLE_AND_COMMIT, *columns)
        except BAD_VALUE as error:
            raise ResultError(f"the result cannot be stored: {error}") from error
        except asyncpg.InFailedSQLTransactionError as error:
            self._failed_by_itself = True
            error.add_note("The task went on after a statement of its transaction had failed.")
            raise
        if not taken:
            raise SupersededError(f"job {self._claim.id} was taken during its effect")
        self._settled = True
