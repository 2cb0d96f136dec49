"""Accepts jobs: alone, in a transaction of the caller, or for a time of a schedule."""

import logging
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol, TypeVar

import asyncpg
from asyncpg.connection import Connection
from asyncpg.pool import PoolConnectionProxy

from viralfx.core.errors import LedgerUnavailableError, TransactionError
from viralfx.jobs.batching import keys_of
from viralfx.jobs.ledger import (
    Accepted,
    BlockingConnection,
    Check,
    KeyHeldError,
    WatchedTransaction,
)
from viralfx.jobs.model import JobDraft
from viralfx.jobs.notifier import IDS_PER_NOTIFICATION, JobNotification
from viralfx.jobs.postgres.ledger_rows import (
    Row,
    draft_columns,
    interval,
    job_of_draft,
    job_of_row,
    with_times,
)
from viralfx.jobs.postgres.ledger_sql import ACCEPT, SOON_SECONDS
from viralfx.jobs.postgres.notifier import NOTIFY, encode
from viralfx.jobs.schedule import Schedule, ScheduledAcceptance, ScheduleState
from viralfx.postgres.errors import BAD_VALUE, refusal
from viralfx.postgres.migrations import Statements
from viralfx.postgres.retry import Attempt, RetriedSteps
from viralfx.postgres.servers import IDENTITY, ElsewhereError, OwnDatabase

T = TypeVar("T")

_logger = logging.getLogger("viralfx.queues")
_MAX_ROUNDS = 10


class Session(Protocol):
    """A connection that runs the ledger's statements."""

    async def fetch(self, statement: str, /, *arguments: Any) -> Any:
        """Run a statement and return its rows."""
        ...


async def accept(
    connection: Session,
    sql: Statements,
    drafts: Sequence[JobDraft],
    *,
    again: bool,
    lock_timeout: float | None = None,
    identity: str | None = None,
) -> Sequence[Accepted]:
    """Insert the jobs that do not exist yet, and return all of them in order.

    ``again``: an earlier attempt may have succeeded although its response was lost.
    ``lock_timeout``: seconds to wait for an open transaction; None: as the connection does. Raises
    ``BAD_VALUE``, and :class:`LedgerUnavailableError` if jobs under the same keys are inserted and
    deleted concurrently all the time. With ``identity`` nothing is inserted in a database of
    another :data:`IDENTITY`, and :class:`ElsewhereError` is raised.
    """
    statement, more = (sql.ACCEPT, ()) if identity is None else (sql.ACCEPT_AT, (identity,))
    accepted: dict[int, Accepted] = {}
    left = dict(enumerate(drafts))
    limit = None if lock_timeout is None else f"{round(lock_timeout * 1000)}ms"
    for _ in range(_MAX_ROUNDS):
        if not left:
            return [accepted[place] for place in range(len(drafts))]
        asked = (*draft_columns(left.values()), SOON_SECONDS, limit, *more)
        rows = await connection.fetch(statement, *asked)
        if rows and rows[0]["id"] is None:
            raise ElsewhereError
        new = {str(row["id"]): row for row in rows}
        for place, draft in left.items():
            # Of several drafts with the same id, the first one was inserted.
            if (row := new.pop(draft.id, None)) is not None:
                accepted[place] = Accepted(job_of_draft(draft, with_times(row)), created=True)
        left = {place: draft for place, draft in left.items() if place not in accepted}
        if left:
            accepted |= await _find(connection, sql, left, again=again)
            # A key is free again if its job was deleted or has ended in between.
            left = {place: draft for place, draft in left.items() if place not in accepted}
    raise LedgerUnavailableError("the jobs under these idempotency keys change all the time")


async def _find(
    connection: Session, sql: Statements, drafts: Mapping[int, JobDraft], *, again: bool
) -> dict[int, Accepted]:
    ids = [draft.id for draft in drafts.values()]
    keys = [draft.key for draft in drafts.values() if draft.key is not None]
    unique = [draft.unique_key for draft in drafts.values() if draft.unique_key is not None]
    rows = await connection.fetch(sql.ACCEPTED_BEFORE, ids, keys, unique)
    jobs = [job_of_row(with_times(row)) for row in rows]
    by_id = {job.id: job for job in jobs}
    by_key = {job.key: job for job in jobs if job.key is not None}
    duplicates = {row["unique_key"]: by_id[str(row["id"])] for row in rows if row["unique_key"]}
    found = {}
    for place, draft in drafts.items():
        job = by_id.get(draft.id) if draft.key is None else by_key.get(draft.key)
        job = job or by_id.get(draft.id) or duplicates.get(draft.unique_key)
        if job is not None:
            found[place] = Accepted(job, created=again and job.id == draft.id)
    return found


# A condition without a column is judged before the function would be called.
ACCEPT_AT: Final = f"""
{ACCEPT} WHERE {IDENTITY} = $17::text
UNION ALL SELECT NULL, NULL, NULL WHERE {IDENTITY} <> $17::text
"""


async def accept_in(
    connection: Any,
    sql: Statements,
    drafts: Sequence[JobDraft],
    *,
    check: Check | None,
    on_commit: Callable[[Sequence[Accepted]], None],
    channel: str | None,
    own: OwnDatabase,
) -> Sequence[Accepted]:
    """Accept jobs in the caller's transaction; see :meth:`JobLedger.accept_in`.

    Without an event after the commit, the transaction notifies ``channel``, if that is not None.
    """
    transaction = _transaction_of(connection)
    wrapped = isinstance(connection, WatchedTransaction | BlockingConnection)
    given = connection.connection if wrapped else connection

    async def accept_here(identity: str | None = None) -> Sequence[Accepted]:
        return await accept(transaction, sql, drafts, again=False, identity=identity)

    await transaction.begin()
    try:
        if check is not None:
            await transaction.fetch("SAVEPOINT viralfx_accept")
        accepted = await (accept_here() if own.holds(given) else own.require(accept_here))
        if check is not None:
            try:
                check(accepted)
            except Exception:
                await transaction.fetch("ROLLBACK TO SAVEPOINT viralfx_accept")
                raise
            await transaction.fetch("RELEASE SAVEPOINT viralfx_accept")
    except Exception as error:
        code = _sqlstate_of(error)
        if code == asyncpg.LockNotAvailableError.sqlstate and any(map(keys_of, drafts)):
            raise KeyHeldError(drafts) from error
        if (problem := _PROBLEMS.get(code)) is not None:
            raise TransactionError(problem) from error
        raise
    watched = transaction.call_after_commit(lambda: on_commit(accepted))
    if not watched and channel is not None:
        # The server delivers it when the transaction commits.
        for notification in _notifications(accepted):
            await transaction.fetch(NOTIFY, channel, encode(notification))
    return accepted


def is_of_key(error: asyncpg.LockNotAvailableError) -> bool:
    """Return True if a statement waited for the transaction of an equal row, not for a table."""
    # The words depend on the language of the server. For a table, the first line has no name.
    return "viralfx_jobs" in str(getattr(error, "context", "")).partition("\n")[0]


_MISSING = (
    "the database of this connection has no job ledger of this version; pass a connection to the"
    " database of DATABASE_URL, and run `viralfx migrate`"
)
_PROBLEMS: Mapping[str | None, str] = {
    "0A000": "a job with an idempotency key needs a transaction that is READ COMMITTED; begin it"
    " with this isolation level, or submit the job after it",
    "25006": "the transaction of this connection is read only; begin one that may write, on the"
    " primary",
    "25P02": "the transaction of this connection has failed; roll it back",
    "3F000": _MISSING,
    "42883": _MISSING,
}
"""Texts for the SQLSTATEs of errors that are the caller's."""


def _sqlstate_of(error: BaseException) -> str | None:
    # SQLAlchemy wraps the error of its driver; that of its asyncpg dialect wraps it once more.
    original = getattr(error, "orig", None) or error
    found = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    return found if isinstance(found, str) else None


def _notifications(accepted: Sequence[Accepted]) -> Iterator[JobNotification]:
    queues: defaultdict[str, list[str]] = defaultdict(list)
    for job in (each.job for each in accepted if each.created):
        if job.run_at <= job.created_at:
            queues[job.queue].append(job.id)
    for queue, ids in queues.items():
        for start in range(0, len(ids), IDS_PER_NOTIFICATION):
            yield JobNotification(queue=queue, ids=tuple(ids[start : start + IDS_PER_NOTIFICATION]))


class _Transaction(Session, Protocol):
    """The caller's transaction."""

    async def begin(self) -> None:
        """Begin it, or raise :class:`TransactionError`."""

    def call_after_commit(self, call: Callable[[], None]) -> bool:
        """Call a function after the commit; returns False if this cannot be done."""
        ...


def _transaction_of(connection: Any) -> _Transaction:
    if isinstance(connection, BlockingConnection):
        return _blocking_transaction(connection.connection)
    watched: list[Callable[[], None]] | None = None
    if isinstance(connection, WatchedTransaction):
        connection, watched = connection.connection, connection.after_commit
    if isinstance(connection, Connection | PoolConnectionProxy):
        return _AsyncpgTransaction(connection, watched)
    if _is_of_sqlalchemy(connection):
        return _sqlalchemy_transaction(connection)
    hint = _FOR_PSYCOPG if _is_asynchronous_psycopg(connection) else ""
    if _psycopg_cursor(connection) is not None:
        hint = "; jobs.submit_sync() takes it"
    raise TransactionError(
        f"connection= takes a connection of asyncpg, or a session or connection of SQLAlchemy, not"
        f" {type(connection).__module__}.{type(connection).__qualname__}{hint}"
    )


def _is_of_sqlalchemy(connection: Any, part: str = "") -> bool:
    return any(
        kind.__module__.startswith(f"sqlalchemy.{part}") for kind in type(connection).__mro__
    )


def _blocking_transaction(connection: Any) -> _Transaction:
    if (cursor := _psycopg_cursor(connection)) is not None:
        return _PsycopgTransaction(connection, cursor)
    if _is_of_sqlalchemy(connection, "ext.asyncio.") or isinstance(
        connection, Connection | PoolConnectionProxy
    ):
        hint = _AWAIT
    elif _is_of_sqlalchemy(connection):
        return _sqlalchemy_transaction(connection, blocks=True)
    else:
        hint = _FOR_PSYCOPG if _is_asynchronous_psycopg(connection) else ""
    raise TransactionError(
        "connection= of a synchronous call takes a session or connection of SQLAlchemy, or a"
        f" connection of psycopg or psycopg2, that is synchronous, not"
        f" {type(connection).__module__}.{type(connection).__qualname__}{hint}"
    )


_AWAIT = "; use `await jobs.submit(..., connection=...)` for it"
_FOR_PSYCOPG = (
    "; call the SQL function enqueue() in its transaction, or use a session of SQLAlchemy over"
    " `postgresql+psycopg:`"
)


def _is_asynchronous_psycopg(connection: Any) -> bool:
    latest = sys.modules.get("psycopg")
    return latest is not None and isinstance(connection, latest.AsyncConnection)


def _psycopg_cursor(connection: Any) -> Callable[[], Any] | None:
    """Return what makes a cursor with plain rows; None for a connection of another driver."""
    # The caller has imported the driver of the connection, and this package needs none of the two.
    latest, former = sys.modules.get("psycopg"), sys.modules.get("psycopg2.extensions")
    if latest is not None and isinstance(connection, latest.Connection):
        return lambda: _named_cursor(connection, latest)
    if former is not None and isinstance(connection, former.connection) and not connection.async_:
        return lambda: connection.cursor(cursor_factory=former.cursor)
    return None


def _named_cursor(connection: Any, driver: Any) -> Any:
    """Return a cursor whose parameters have names, also of a connection with raw cursors."""
    found = connection.cursor(row_factory=driver.rows.tuple_row)
    if isinstance(found, getattr(driver, "RawCursor", ())):
        return driver.Cursor(connection, row_factory=driver.rows.tuple_row)
    return found


_ARRAY = re.compile(r"(\$\d+)::(\w+\[\])")


def _as_text(statement: str, arguments: Sequence[Any]) -> tuple[str, list[Any]]:
    """Pass arrays as text: the connection may have codecs of its own for every other type."""
    texts = [
        [None if each is None else str(each) for each in value]
        if isinstance(value, list)
        else value
        for value in arguments
    ]
    return _ARRAY.sub(r"\1::text[]::\2", statement), texts


class _AsyncpgTransaction:
    def __init__(self, connection: Any, after_commit: list[Callable[[], None]] | None) -> None:
        self._connection = connection
        self._after_commit = after_commit

    async def begin(self) -> None:
        if not self._connection.is_in_transaction():
            raise TransactionError(
                "the connection is in no transaction, so the job would be accepted at once; submit"
                " it inside `async with connection.transaction():`"
            )

    async def fetch(self, statement: str, /, *arguments: Any) -> Sequence[Row]:
        text, values = _as_text(statement, arguments)
        rows: Sequence[Row] = await self._connection.fetch(text, *values)
        return rows

    def call_after_commit(self, call: Callable[[], None]) -> bool:
        if self._after_commit is not None:
            self._after_commit.append(call)
        return self._after_commit is not None


class _PsycopgTransaction:
    """Runs statements through a connection of psycopg or psycopg2, which blocks."""

    def __init__(self, connection: Any, cursor: Callable[[], Any]) -> None:
        self._connection = connection
        self._cursor = cursor

    async def begin(self) -> None:
        # Without autocommit the driver begins a transaction with the first statement.
        if not self._connection.autocommit:
            return
        with self._results():
            pass  # the statement that begins a transaction may not have been sent yet
        if not self._connection.info.transaction_status:
            latest = hasattr(self._connection, "transaction")
            remedy = "submit it inside `with connection.transaction():`"
            raise TransactionError(
                "the connection is in autocommit mode and in no transaction, so the job would be"
                f" accepted at once; {remedy if latest else 'set connection.autocommit = False'}"
            )

    async def fetch(self, statement: str, /, *arguments: Any) -> Sequence[Row]:
        text, values = _as_text(statement, arguments)
        named = _PARAMETER.sub(r"%(p\1)s", text.replace("%", "%%"))
        with self._cursor() as cursor:
            with self._results():
                cursor.execute(
                    named, {f"p{number}": value for number, value in enumerate(values, 1)}
                )
            if cursor.description is None:
                return ()
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _results(self) -> AbstractContextManager[object]:
        """Have the results of the statements of a block at its end, also in a pipeline."""
        if getattr(self._connection.info, "pipeline_status", 0):
            inner: AbstractContextManager[object] = self._connection.pipeline()
            return inner  # its end synchronizes the outer one
        return nullcontext()

    def call_after_commit(self, call: Callable[[], None]) -> bool:
        del call
        return False  # the drivers have no such event


_PENDING = "viralfx_after_commit"
"""The key of the functions of a session in its ``info``."""


def _sqlalchemy_transaction(given: Any, *, blocks: bool = False) -> "_SqlAlchemyTransaction":
    # Loaded already, since this is one of its objects.
    from sqlalchemy import Connection as SyncConnection  # noqa: PLC0415
    from sqlalchemy.orm import Session as SyncSession  # noqa: PLC0415

    if callable(given) and hasattr(given, "registry"):
        given = given()  # a scoped session, which stands for the session of this task
    found = getattr(given, "sync_session", None) or getattr(given, "sync_connection", None) or given
    if isinstance(found, SyncSession):
        return _SqlAlchemyTransaction(found.connection, found, blocks=blocks)
    if isinstance(found, SyncConnection):
        return _SqlAlchemyTransaction(lambda: found, None, blocks=blocks)
    raise TransactionError(
        "connection= takes an open session or connection of SQLAlchemy, not"
        f" {type(given).__qualname__}"
    )


_PARAMETER = re.compile(r"\$(\d+)")


class _SqlAlchemyTransaction:
    """Runs statements through SQLAlchemy, which begins its transaction with the first of them.

    The driver's connection would be in no transaction before that, and a job in it would survive
    the rollback of the session.
    """

    def __init__(self, connection: Callable[[], Any], session: Any, *, blocks: bool) -> None:
        """``blocks``: the driver is synchronous, and the call runs on no event loop."""
        self._connection = connection
        self._session = session
        self._blocks = blocks

    async def begin(self) -> None:
        await self._call(self._require_transaction)

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        if self._blocks:
            return function(*arguments)
        from sqlalchemy.util import greenlet_spawn  # noqa: PLC0415 - loaded already

        # Also for a connection of a driver that does not await anything.
        result: T = await greenlet_spawn(function, *arguments)
        return result

    def _require_synchronous_driver(self) -> None:
        bind = self._connection() if self._session is None else self._session.get_bind()
        if bind.dialect.is_async:
            raise TransactionError(f"the driver of this session is asynchronous{_AWAIT}")

    def _require_transaction(self) -> None:
        from sqlalchemy.exc import UnboundExecutionError  # noqa: PLC0415 - loaded already

        try:
            if self._blocks:
                self._require_synchronous_driver()
            connection = self._connection()
        except UnboundExecutionError as error:
            raise TransactionError(
                "the session has no database of its own, but one for each of its tables; pass the"
                " connection that `session.connection(bind_arguments=...)` returns"
            ) from error
        if connection.dialect.name != "postgresql":
            raise ElsewhereError
        if getattr(connection.connection, "autocommit", False):
            raise TransactionError(
                "the isolation level of the connection is AUTOCOMMIT, so the job would be accepted"
                " at once; use another one"
            )

    async def fetch(self, statement: str, /, *arguments: Any) -> Sequence[Row]:
        from sqlalchemy import text  # noqa: PLC0415 - as above

        plain, values = _as_text(statement, arguments)
        named = text(_PARAMETER.sub(r"(:p\1)", plain))
        parameters = {f"p{number}": value for number, value in enumerate(values, 1)}
        return await self._call(self._run, named, parameters)

    def _run(self, statement: Any, parameters: Mapping[str, Any]) -> Sequence[Row]:
        result = self._connection().execute(statement, parameters)
        return result.mappings().all() if result.returns_rows else ()

    def call_after_commit(self, call: Callable[[], None]) -> bool:
        from sqlalchemy import event  # noqa: PLC0415 - as above

        session = self._session
        if session is None:
            return False  # its event comes before the commit
        session.info.setdefault(_PENDING, []).append(call)
        if not event.contains(session, "after_commit", _run_pending):
            event.listen(session, "after_commit", _run_pending)
            event.listen(session, "after_transaction_end", _forget_pending)
        return True


def _run_pending(session: Any) -> None:
    # The end of a savepoint is no commit.
    if session.in_nested_transaction():
        return
    for call in session.info.pop(_PENDING, ()):
        try:
            call()
        except Exception as error:
            _logger.warning(
                "Notification of jobs not sent; workers find the jobs by polling", exc_info=error
            )


def _forget_pending(session: Any, transaction: Any) -> None:
    if transaction.parent is None:
        session.info.pop(_PENDING, None)


# -- schedules: a row for each, with the last time that a job was accepted for -------------------

_STATE = "task, cron, timezone, since, last_run_at, seen_at, paused_at, resumed_at"

# In the order of the tasks, so that two workers do not wait for each other.
DECLARE_SCHEDULES: Final = f"""
WITH forgotten AS (
    DELETE FROM viralfx_schedules
    WHERE seen_at < statement_timestamp() - make_interval(secs => $4) AND task <> ALL($1::text[])
        AND paused_at IS NULL
)
INSERT INTO viralfx_schedules AS known (task, cron, timezone, since, seen_at)
SELECT task, cron, timezone, statement_timestamp(), statement_timestamp()
FROM unnest($1::text[], $2::text[], $3::text[]) AS given (task, cron, timezone)
ORDER BY task
ON CONFLICT (task) DO UPDATE
SET cron = excluded.cron, timezone = excluded.timezone, seen_at = excluded.seen_at,
    since = CASE
        WHEN known.cron = excluded.cron AND known.timezone = excluded.timezone THEN known.since
        ELSE excluded.since
    END
RETURNING {_STATE}
"""  # noqa: S608 - constants
ADVANCE_SCHEDULE: Final = """
UPDATE viralfx_schedules SET last_run_at = $2
WHERE task = $1 AND (last_run_at IS NULL OR last_run_at < $2)
    AND paused_at IS NULL AND (resumed_at IS NULL OR resumed_at < $2)
RETURNING true
"""
LAST_SCHEDULED: Final = """
SELECT EXISTS (SELECT FROM viralfx_all_jobs WHERE id = $2::uuid) AS accepted,
    greatest(last_run_at, resumed_at, CASE WHEN paused_at IS NOT NULL THEN $3::timestamptz END)
        AS handled_until
FROM viralfx_schedules WHERE task = $1
"""
PAUSE_SCHEDULE: Final = """
UPDATE viralfx_schedules SET paused_at = coalesce(paused_at, statement_timestamp()) WHERE task = $1
"""
RESUME_SCHEDULE: Final = """
UPDATE viralfx_schedules
SET paused_at = NULL,
    resumed_at = CASE WHEN paused_at IS NULL THEN resumed_at ELSE statement_timestamp() END
WHERE task = $1
"""
SCHEDULES: Final = f'SELECT {_STATE} FROM viralfx_schedules ORDER BY task COLLATE "C"'  # noqa: S608 - constants


class Schedules:
    """The methods of :class:`JobLedger` for schedules."""

    def __init__(self, steps: RetriedSteps, sql: Statements) -> None:
        self._steps = steps
        self._sql = sql

    async def declare(
        self, schedules: Sequence[Schedule], forget_after: float
    ) -> Sequence[ScheduleState]:
        """See :meth:`JobLedger.declare_schedules`."""
        columns = (
            [each.task for each in schedules],
            [each.cron for each in schedules],
            [each.timezone for each in schedules],
            interval(forget_after),
        )
        return _states_of(
            await self._steps.run(
                lambda attempt: attempt.connection.fetch(self._sql.DECLARE_SCHEDULES, *columns)
            )
        )

    async def accept(self, draft: JobDraft) -> ScheduledAcceptance | None:
        """See :meth:`JobLedger.accept_scheduled`."""
        try:
            return await self._steps.run(lambda attempt: self._accept_once(attempt, draft))
        except (*BAD_VALUE, LedgerUnavailableError) as error:
            if (refused := refusal(error)) is None:
                raise
            raise refused from error

    async def _accept_once(self, attempt: Attempt, draft: JobDraft) -> ScheduledAcceptance | None:
        connection, sql, time = attempt.connection, self._sql, draft.run_at
        # Of two workers, the second one waits for the row until the first one has committed.
        async with connection.transaction(isolation="read_committed"):
            if await connection.fetchval(sql.ADVANCE_SCHEDULE, draft.task, time):
                assert time is not None  # noqa: S101 - else no row is changed
                await accept(connection, sql, [draft], again=False)
                return ScheduledAcceptance(created=True, handled_until=time)
        row = await connection.fetchrow(sql.LAST_SCHEDULED, draft.task, draft.id, time)
        if row is None or row["handled_until"] is None:
            return None
        # The commit of an earlier attempt may have succeeded although its response was lost.
        created = attempt.again and row["accepted"]
        return ScheduledAcceptance(created=created, handled_until=row["handled_until"])

    async def pause(self, task: str) -> bool:
        """See :meth:`JobLedger.pause_schedule`."""
        return await self._changed(self._sql.PAUSE_SCHEDULE, task)

    async def resume(self, task: str) -> bool:
        """See :meth:`JobLedger.resume_schedule`."""
        return await self._changed(self._sql.RESUME_SCHEDULE, task)

    async def _changed(self, statement: str, task: str) -> bool:
        status = await self._steps.run(lambda attempt: attempt.connection.execute(statement, task))
        return status != "UPDATE 0"

    async def states(self) -> Sequence[ScheduleState]:
        """See :meth:`JobLedger.schedules`."""
        return _states_of(
            await self._steps.run(lambda attempt: attempt.connection.fetch(self._sql.SCHEDULES))
        )


def _states_of(rows: Sequence[Row]) -> Sequence[ScheduleState]:
    return [ScheduleState(**row) for row in rows]
