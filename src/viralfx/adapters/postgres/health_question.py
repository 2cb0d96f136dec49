"""The one question that all checks of the database share, over a connection of its own."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from asyncpg.connection import Connection
from asyncpg.exceptions import PostgresError

from viralfx.adapters.postgres.connection import answer
from viralfx.adapters.postgres.database import PostgresDatabase
from viralfx.adapters.postgres.errors import is_loss
from viralfx.adapters.postgres.job_rows import counts_of_rows
from viralfx.adapters.postgres.job_statements import COUNTS
from viralfx.adapters.postgres.outages import unavailable
from viralfx.adapters.postgres.schema import (
    REVISIONS,
    current_revision,
    is_later,
    missing_after,
)
from viralfx.domain.clock import Clock
from viralfx.domain.jobs.job import JobState, LedgerUnavailableError, NotMigratedError
from viralfx.domain.jobs.ledger import QueueCounts

_logger = logging.getLogger("viralfx.database")

# As cheap as SELECT 1, and tells a primary from a replica, or from one that was set so.
_WRITABLE: Final = "SELECT pg_catalog.current_setting('transaction_read_only') AS read_only"
QUESTION: Final = (
    f"{_WRITABLE}, counted.* FROM (VALUES (0)) AS one LEFT JOIN ({COUNTS}) AS counted ON true"
)

_COUNTING_SHARE = 0.4
"""Part of the time for an answer after which the server gives up counting, locked or busy."""

_FAILURE_SHARED_FOR = 1.0
"""Seconds for which a failure, too, serves who is content with an answer of some age."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said."""

    pending: tuple[str, ...]
    """The migrations that this code needs and the database lacks."""
    read_only: bool
    counts: Mapping[str, QueueCounts] | LedgerUnavailableError
    """How the queues stand that ever had a job, or why that could not be found out."""


class HealthQuestion:
    """Asks the server everything that checks want to know, in one command.

    Who is content with an answer of some age shares that of a question under way, or of one not
    long ago. Who waited while a question failed shares the failure. The connection is used for
    nothing else; one that fails, hangs or whose user is cancelled is cut, and made anew for the
    next question.
    """

    def __init__(self, database: PostgresDatabase, clock: Clock, *, timeout: float) -> None:
        """``timeout`` is how long an answer may take, in seconds, connecting included."""
        self._database = database
        self._clock = clock
        self._timeout = timeout
        self._connection: Connection[Any] | None = None
        self._schema_is_current = False
        self._told_of: str | None = None
        self._turn = asyncio.Lock()
        self._answer: Answer | None = None
        self._asked_at = 0.0
        self._failure: Exception | None = None
        self._failed_at = 0.0

    @property
    def connected(self) -> bool:
        """Whether there is a connection that has not failed."""
        return self._connection is not None

    async def ask(self, max_age: float = 0.0) -> Answer:
        """Return the answer to a question asked after the call, or at most ``max_age`` s before.

        Raises what the driver does, and ``TimeoutError``; also where another one's question failed
        since the call, or at most ``max_age`` and one second before it.
        """
        began = self._clock.monotonic()
        async with self._turn:
            if self._answer is not None and self._asked_at >= began - max_age:
                return self._answer
            shared_for = min(max_age, _FAILURE_SHARED_FOR)
            if self._failure is not None and self._failed_at >= began - shared_for:
                raise self._failure
            # When it is answered is too late: what happened since the server counted is missing.
            self._asked_at = self._clock.monotonic()
            try:
                async with asyncio.timeout(self._timeout):
                    self._answer = await self._look()
            except BaseException as error:
                self.close()
                self._answer = None
                self._failure = error if isinstance(error, Exception) else None
                self._failed_at = self._clock.monotonic()
                raise
            self._failure = None
            return self._answer

    async def counts(self, max_age: float = 0.0) -> Mapping[str, QueueCounts]:
        """Return how the queues stand; raises :class:`LedgerUnavailableError`."""
        try:
            counts = (await self.ask(max_age)).counts
        except Exception as error:
            raise unavailable(error) from error
        if isinstance(counts, LedgerUnavailableError):
            raise counts
        return counts

    def close(self) -> None:
        """Cut the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def _look(self) -> Answer:
        connection = self._connection
        if connection is None or connection.is_closed():
            self.close()
            connection = self._connection = await self._connect()
            self._schema_is_current = False
        if not self._schema_is_current:
            revision = await answer(connection, current_revision(connection))
            if pending := missing_after(revision):
                behind = NotMigratedError("the tables of jobs are behind: run `viralfx migrate`")
                return Answer(pending, read_only=False, counts=behind)
            self._schema_is_current = True
            self._tell_of_later(revision)
        try:
            rows = await answer(connection, connection.fetch(QUESTION, JobState.ACTIVE))
        except PostgresError as error:
            if is_loss(error) or connection.is_closed():
                raise
            # That a table of jobs is locked, or grew too long, is no fault of the server.
            read_only = await answer(connection, connection.fetchval(_WRITABLE))
            return Answer((), read_only=read_only != "off", counts=unavailable(error))
        counts = counts_of_rows(row for row in rows if row["queue"] is not None)
        return Answer((), read_only=rows[0]["read_only"] != "off", counts=counts)

    def _tell_of_later(self, revision: str | None) -> None:
        # Usable, as after a roll-out that was undone; but whoever runs the wrong image should see.
        if is_later(revision) and revision != self._told_of:
            extra = {"revision": revision, "known": REVISIONS[-1]}
            _logger.warning("Database schema is of a later version", extra=extra)
            self._told_of = revision

    async def _connect(self) -> "Connection[Any]":
        limit = str(max(1, round(self._timeout * _COUNTING_SHARE * 1000)))
        name = f"{self._database.config.application_name}-health"
        return await self._database.connect(application_name=name, statement_timeout=limit)
