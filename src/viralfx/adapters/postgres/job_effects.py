"""Effects of tasks that are one transaction with the completion of their job."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
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
from viralfx.domain.jobs.job import Claim, LedgerUnavailableError, completed

Effect = Callable[[Any], Awaitable[bytes]]

_LOOKS = 4
"""At an effect, in the patience it gets to end after it was cancelled."""


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
        # The others are for claims and outcomes, and for whoever else asks the database.
        turns = max(1, database.config.pool_max - 2)
        self._turns = asyncio.Semaphore(turns)
        # One is always left to the other queues, whatever the tasks of one of them do.
        self._turns_of_queue: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(max(1, turns - 1))
        )

    async def settle(self, claim: Claim, effect: Effect) -> None:
        """Run ``effect`` and complete the job, in one transaction.

        It lets the effect run for as long as that takes, but waits no longer for its turn than
        for the server: another worker may have one to give. Raises what ``effect`` raises,
        :class:`SupersededError`, :class:`LedgerUnavailableError`, with all of which nothing is
        left of the effect, and :class:`InDoubtError`.
        """
        async with self._turn(claim.queue) as turn:
            await _Execution(self._database, self._patience, claim, effect, turn).run()

    @asynccontextmanager
    async def _turn(self, queue: str) -> AsyncIterator[AsyncExitStack]:
        async with AsyncExitStack() as turn:
            try:
                async with asyncio.timeout(self._patience):
                    await turn.enter_async_context(self._turns_of_queue[queue])
                    await turn.enter_async_context(self._turns)
            except TimeoutError as error:
                reason = "the tasks that run have all its connections"
                raise LedgerUnavailableError(reason) from error
            yield turn


class _Execution:
    """One effect, and how far it came."""

    def __init__(
        self,
        database: PostgresDatabase,
        patience: float,
        claim: Claim,
        effect: Effect,
        turn: AsyncExitStack,
    ) -> None:
        self._database = database
        self._patience = patience
        self._claim = claim
        self._effect = effect
        self._turn = turn
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
        watching = asyncio.create_task(self._evict(connection, asyncio.current_task()))
        try:
            result = await self._effect(connection)
        except Exception as error:
            ends = connection.is_closed() or isinstance(error, asyncpg.InternalClientError)
            self._failed_by_itself = not (ends and is_loss(error))
            raise
        finally:
            watching.cancel()
        self._limit.reschedule(asyncio.get_running_loop().time() + self._patience)
        await self._complete(connection, result)

    async def _evict(self, connection: Lease, runner: "asyncio.Task[Any] | None") -> None:
        """Take the connection and the turn from an effect that ignores its cancellation.

        It would have both for as long as it likes, and nobody waits for it any more.
        """
        looks = 0
        while looks <= _LOOKS:
            await asyncio.sleep(self._patience / _LOOKS)
            ignored = runner is not None and runner.cancelling() > 0
            looks = looks + 1 if ignored else 0
        with suppress(asyncpg.InterfaceError):  # it is gone already
            connection.terminate()
        await self._turn.aclose()

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
