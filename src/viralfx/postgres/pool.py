"""The connections of the pool: their use, their age, and the log of their slow queries."""

import asyncio
import contextlib
import logging
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import asyncpg
from asyncpg.connection import Connection, LoggedQuery
from asyncpg.transaction import Transaction

from viralfx.core.clock import default_rng
from viralfx.core.events import OperationListener, ignore_operation
from viralfx.postgres.connections import (
    CheckedConnection,
    PostgresConfig,
    cut,
    reset_session,
)
from viralfx.postgres.errors import DATABASE_ERRORS
from viralfx.postgres.servers import USER_TIMEOUT_SECONDS, limit_silence

_logger = logging.getLogger("viralfx.database")

_MAX_OPERATION_CHARACTERS = 20
"""Longer than any keyword at the beginning of a statement."""
_MAX_PARSED_CHARACTERS, _MAX_LOGGED_CHARACTERS = 10_000, 2_000
"""Characters of a statement that are parsed, and that are logged."""

# Names follow Postgres's scanner: they may contain every character beyond ASCII. Ambiguous text
# counts as a value: the meaning of a backslash before a quote depends on a server setting, and
# nested comments are not tracked.
_FIRST, _NEXT = r"[A-Za-z_\x80-\U0010FFFF]", r"\w\x80-\U0010FFFF"
_PARTS = re.compile(
    rf"""
    (?P<comment> --[^\n\r]*+ | /\*(?:[^*/]|\*(?!/)|/(?!\*))*+\*/ )
  | (?P<value>
        [eE]'(?:[^'\\]|\\.|'')*+'
      | (?:[bBxXnN]|[uU]&)?'(?:[^'\\]|\\(?!')|'')*+'
      | \$(?P<tag>(?:{_FIRST}[{_NEXT}]*+)?)\$ .*? \$(?P=tag)\$
      | \.?[0-9](?:[eE][+-](?=[0-9])|[\w.])*+
    )
  | (?P<kept> (?:[uU]&)?"(?:[^"]|"")*+" | \$[0-9]++ | {_FIRST}[{_NEXT}$]*+ )
  | (?P<endless> (?: ['"] | /\* | \$(?:{_FIRST}[{_NEXT}]*+)?\$ ) .* )
    """,
    re.VERBOSE | re.DOTALL,
)


class SlowQueryLog:
    """Counts and logs slow queries.

    The driver calls it after each query, in the context of the task that ran it, but not for
    cursors, prepared statements and COPY, nor for a query whose connection was lost.
    """

    def __init__(self, threshold: float) -> None:
        """``threshold`` in seconds; 0: no query is slow."""
        self._threshold = threshold
        self.observe: OperationListener = ignore_operation
        """Called for every query, slow or not."""
        self.count = 0
        """Number of slow queries."""

    def __call__(self, query: LoggedQuery) -> None:
        """Record one finished query."""
        self.observe(_operation(query.query), query.elapsed, query.exception)
        if not self._threshold or query.elapsed < self._threshold:
            return
        self.count += 1
        extra: dict[str, object] = {
            "statement": without_values(query.query),
            "duration": round(query.elapsed * 1000),
        }
        if query.exception is not None:
            extra["error"] = type(query.exception).__name__
        _logger.warning("Slow query", extra=extra)


def _operation(statement: str) -> str:
    word = statement.lstrip()[:_MAX_OPERATION_CHARACTERS].split(None, 1)
    return word[0].upper().rstrip(";") if word and word[0].rstrip(";").isalpha() else "_OTHER"


def without_values(statement: str) -> str:
    """Replace literals in SQL by ``?``, drop comments, and join it into one line.

    Parameters are not part of the statement. Text after an unterminated literal is omitted.
    """
    text = _PARTS.sub(_replacement, statement[:_MAX_PARSED_CHARACTERS])
    text = " ".join(text.split())
    whole = len(statement) <= _MAX_PARSED_CHARACTERS and len(text) <= _MAX_LOGGED_CHARACTERS
    return text if whole else text[:_MAX_LOGGED_CHARACTERS] + " ..."


def _replacement(match: re.Match[str]) -> str:
    if match["comment"] is not None:
        return " "
    return match["kept"] or "?"


_logger = logging.getLogger("viralfx.database")

PING_AFTER = 1.0
"""Seconds; a connection that was idle for so long is tested before a caller gets it."""
QUIET_PING_AFTER = 12.0
"""The same for work in the background. It is more than the pauses of an idle worker, whose
tests would be a quarter of its transactions."""
PING_TIMEOUT = 1.0
"""Seconds for that test; a server that is reachable answers in less than a millisecond."""
_LATE_SECONDS = 0.25
ACKNOWLEDGED_TIMEOUT = 1.5
"""Seconds in which the system of a pooler acknowledges the first statement after an idle time.

The answer may take longer, and lifts this limit.
"""
BEGIN_TIMEOUT = 2.0
"""Seconds for BEGIN, which waits for no lock and no disk."""
READ_ONLY_AGE = 1.0
"""Seconds after which a connection that has never accepted writes is replaced."""
RETIREMENT_GAP = 0.2
"""Minimum number of seconds between the ends of two idle connections."""
_QUESTION_TIMEOUT = 1.0
"""Seconds to ask a server whether it accepts writes."""

IS_READ_ONLY: Final = "SELECT pg_catalog.current_setting('transaction_read_only') AS read_only"
"""As cheap as SELECT 1; also detects a standby and a database that was set to read only."""


class ReplacedError(asyncpg.InterfaceError):
    """The connection is not used again; its pool closes it when a reset raises this."""


MIN_LIFETIME = 1.0
"""Seconds that a connection lives at least, so that a new one can be used."""
_LIFETIME_JITTER = 0.1
"""Share of the lifetime by which the end is early at random."""
_rng = default_rng()


def end_of_life(lifetime: float) -> float:
    """Return the time of the event loop at which a connection that opens now must end.

    ``lifetime`` in seconds; 0: never.
    """
    if not lifetime:
        return math.inf
    early = _rng.uniform(1.0 - _LIFETIME_JITTER, 1.0)
    return asyncio.get_running_loop().time() + max(MIN_LIFETIME, lifetime * early)


def reports_read_only(connection: "asyncpg.Connection[Any]") -> bool:
    """Return True if the server's last answer said that it is a standby, or set to read only.

    Postgres reports both with each answer. Behind a pooler the report may be an old one.
    """
    if connection.is_closed():
        return False
    reported = connection.get_settings()
    names = ("in_hot_standby", "default_transaction_read_only")
    return any(getattr(reported, name, "off") == "on" for name in names)


@dataclass(slots=True)
class Standing:
    """State of one connection of the pool; times are those of the event loop."""

    generation: int
    """Generation of the pool's connections to which it belongs."""
    was_writable: bool
    """True if the server accepted writes when it was opened."""
    opened_at: float
    ends_at: float
    idle_since: float
    lent: bool = False
    """True while a caller has it."""
    lent_at: float = 0.0
    """When the last caller got it."""
    on_answer: Callable[[LoggedQuery], None] | None = None
    """Lifts the limit of a connection that could not be tested; None: it has none."""
    timer: asyncio.TimerHandle | None = None
    """Ends it at ``ends_at``."""


class PoolMembers:
    """Decides about the connections of one pool.

    A connection ends, at its next use at the latest, if it reached ``DB_MAX_LIFETIME``, if it does
    not answer after an idle time, or if its server does not accept writes any more.
    """

    def __init__(self, config: PostgresConfig) -> None:
        """Begin without connections."""
        self._needs_writes = config.needs_writes
        self._lifetime = config.settings.max_lifetime
        # Behind a pooler, the report of the server's state may be older than that state.
        self._trusts_reports = config.settings.pooler == "none"
        # In this mode each statement may have to wait for a connection to the server.
        self._limits_waits = config.settings.pooler != "transaction"
        self._user_timeout = config.address.tcp_user_timeout
        self._open: set[Connection[Any]] = set()
        self._attempts: set[asyncio.Future[Connection[Any]]] = set()
        self.generation = 0
        """A connection of an earlier one ends."""
        self.share_processes = False
        """True if the last new connection of the health query proved that a pooler works in
        transaction mode, and ``DB_POOLER`` does not say so. No caller gets a connection then: it
        could run a statement of another program."""
        self._retired_at = 0.0

    # -- life --------------------------------------------------------------------------------

    async def add(self, connect: Callable[[], Awaitable["Connection[Any]"]]) -> "Connection[Any]":
        """Open a connection, add and return it; raises the errors of ``connect``.

        An attempt that began before the connections were replaced is left for a new one: it may
        wait for the server that they leave.
        """
        while True:
            generation = self.generation
            attempt = asyncio.ensure_future(connect())
            self._attempts.add(attempt)
            try:
                await asyncio.wait({attempt})
            except BaseException:
                attempt.add_done_callback(_drop)
                attempt.cancel()
                raise
            finally:
                self._attempts.discard(attempt)
            if attempt.cancelled() and generation != self.generation:
                continue
            connection = attempt.result()
            self._admit(connection, generation)
            return connection

    def _admit(self, connection: "Connection[Any]", generation: int) -> None:
        loop, checked = asyncio.get_running_loop(), _checked(connection)
        standing = checked.standing = Standing(
            generation=generation,
            was_writable=not reports_read_only(connection),
            opened_at=loop.time(),
            ends_at=end_of_life(self._lifetime),
            idle_since=loop.time(),
        )
        self._open.add(connection)
        if standing.ends_at < math.inf:
            standing.timer = loop.call_at(standing.ends_at, self._retire, connection)

    def discard(self, connection: "Connection[Any]") -> bool:
        """Forget a closed connection; return False if its end was planned."""
        if connection not in self._open:
            return True
        self._open.discard(connection)
        standing: Standing = _checked(connection).standing
        if standing.timer is not None:
            standing.timer.cancel()
        return standing.lent or not self._has_ended(standing)

    def lent(self) -> "Sequence[Connection[Any]]":
        """Return the connections that callers have."""
        return [each for each in self._open if _checked(each).standing.lent]

    def holds(self, connection: object) -> bool:
        """Return True for a connection of the pool, such as one that a caller has."""
        return getattr(connection, "itself", None) in self._open

    def replace_all(self, reason: str) -> None:
        """Close each connection before its next use, so that a new one replaces it."""
        self.generation += 1
        for attempt in self._attempts:
            attempt.cancel()
        _logger.warning("Database connections are replaced", extra={"reason": reason})

    def leave_silent(self, since: float) -> None:
        """Leave a server that has not answered ``since`` a time, and whose place another one has.

        Callers that wait for it get an error, which is transient: their connections are closed.
        """
        self.replace_all("silent")
        for connection in self.lent():
            standing: Standing = _checked(connection).standing
            if standing.opened_at < since and standing.lent_at < _now() - PING_TIMEOUT:
                cut(connection)

    # -- use ---------------------------------------------------------------------------------

    async def can_be_used(self, connection: Any, max_idle: float) -> bool:
        """Return True for a connection that the caller can have; close any other.

        It is tested if it was idle for ``max_idle`` seconds; behind a pooler in transaction mode,
        its first statement must be acknowledged in time instead.
        """
        standing: Standing = connection.standing
        standing.lent, standing.lent_at = True, (began := _now())
        try:
            if not self._has_ended(standing):
                if _now() - standing.idle_since >= max_idle:
                    await self._test(connection, standing)
                return True
            standing.lent = False
        except DATABASE_ERRORS:
            # The others were idle through the same silence. If the timeout is late, this event loop
            # was blocked, and the answer may wait to be read.
            in_time = _now() - began < PING_TIMEOUT + _LATE_SECONDS
            if in_time and standing.generation == self.generation:
                self.replace_all("silent")
        except BaseException:
            _terminate(connection)
            raise
        _terminate(connection)
        return False

    async def begin(self, connection: Any, transaction: Transaction) -> None:
        """Start a transaction; a connection that does not answer is closed."""
        try:
            async with asyncio.timeout(BEGIN_TIMEOUT if self._limits_waits else None):
                await transaction.start()
        except TimeoutError:
            # Nothing was done on it, so the operation can have another one.
            _terminate(connection)
            raise
        self._trust(connection.itself, connection.standing)

    async def reset(self, connection: Any) -> None:
        """Prepare a returned connection for its next use; raises :class:`ReplacedError`."""
        await reset_session(connection)
        standing: Standing = connection.standing
        standing.lent, standing.idle_since = False, _now()
        self._trust(connection.itself, standing)
        if self._has_ended(standing) or self._is_wrong(connection):
            raise ReplacedError("another connection takes the place of this one")

    async def judge(self, connection: Any, error: asyncpg.PostgresError) -> None:
        """Mark a refused write as the server's fault, and leave that server.

        Not if the caller's own transaction was read-only. If the connection of the caller ended in
        silence, the others are replaced: they were idle through it.
        """
        was_silent = connection.is_closed() and isinstance(error.__cause__, TimeoutError)
        if was_silent and connection.standing.generation == self.generation:
            self.replace_all("silent")
        if not self._needs_writes or not isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            return
        with contextlib.suppress(*DATABASE_ERRORS):
            if self._trusts_reports:
                of_server = reports_read_only(connection)
            elif of_server := await _is_read_only(connection):
                self._leave(connection.standing)
            error.of_server = of_server  # type: ignore[attr-defined]  # see is_transient

    # -- decisions ---------------------------------------------------------------------------

    async def _test(self, connection: Any, standing: Standing) -> None:
        if self._limits_waits:
            async with asyncio.timeout(PING_TIMEOUT):
                await connection.execute("SELECT 1")
        elif self._user_timeout is None:
            # A statement would wait for a connection to the server, as the caller's own has to.
            own: CheckedConnection = connection.itself
            standing.on_answer = lambda _: self._trust(own, standing)
            own.add_query_logger(standing.on_answer)
            limit_silence(own, ACKNOWLEDGED_TIMEOUT)

    def _trust(self, connection: CheckedConnection, standing: Standing) -> None:
        if standing.on_answer is not None:
            connection.remove_query_logger(standing.on_answer)
            standing.on_answer = None
            limit_silence(connection, USER_TIMEOUT_SECONDS)

    def _has_ended(self, standing: Standing) -> bool:
        return standing.generation != self.generation or _now() >= standing.ends_at

    def _is_wrong(self, connection: "Connection[Any]") -> bool:
        if not (self._needs_writes and self._trusts_reports and reports_read_only(connection)):
            return False
        standing: Standing = _checked(connection).standing
        if standing.was_writable:
            self._leave(standing)
            return True
        # While only such a server is reachable, connections are not opened for each use.
        return _now() - standing.opened_at >= READ_ONLY_AGE

    def _leave(self, standing: Standing) -> None:
        if standing.generation == self.generation:
            self.replace_all("read_only")

    def _retire(self, connection: "Connection[Any]") -> None:
        standing: Standing = _checked(connection).standing
        if connection.is_closed() or standing.lent:
            return  # closed when it comes back
        if (wait := self._retired_at + RETIREMENT_GAP - _now()) > 0:
            loop = asyncio.get_running_loop()
            standing.timer = loop.call_later(wait, self._retire, connection)
            return
        self._retired_at = _now()
        connection.terminate()


def _checked(connection: "Connection[Any]") -> Any:
    return connection  # a CheckedConnection


def _now() -> float:
    return asyncio.get_running_loop().time()


def _drop(attempt: "asyncio.Future[Connection[Any]]") -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().terminate()


def _terminate(connection: Any) -> None:
    with contextlib.suppress(asyncpg.InterfaceError):  # already closed
        connection.terminate()


async def _is_read_only(connection: Any) -> bool:
    async with asyncio.timeout(_QUESTION_TIMEOUT):
        if connection.is_in_transaction():
            await connection.execute("ROLLBACK")
        return bool(await connection.fetchval(IS_READ_ONLY) == "on")
