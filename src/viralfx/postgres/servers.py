"""Finds the server to use among all addresses of all hosts, and recognizes it on a connection."""

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import signature
from typing import Any, Final, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import asyncpg
from asyncpg import Connection, connect_utils
from asyncpg.transaction import Transaction

from viralfx.core.errors import TransactionError
from viralfx.core.loops import running_loop
from viralfx.core.threads import NameLookups
from viralfx.domain.cache import SingleFlight
from viralfx.postgres.errors import (
    DATABASE_ERRORS,
    NoServerError,
    WrongServerError,
    map_errors,
    most_telling,
)
from viralfx.settings import DatabaseAddress

T = TypeVar("T")
_logger = logging.getLogger("viralfx.database")


def _nothing(*_: object, **__: object) -> None:
    """Stand for a method of the connection."""


class _Driver:
    """Stands for the connection of a transaction, and keeps its statements."""

    def __init__(self) -> None:
        self.statements: list[str] = []

    def __getattr__(self, _: str) -> Any:
        return _nothing

    async def execute(self, statement: str) -> str:
        self.statements.append(statement)
        return statement


def _sends_transactions() -> bool:
    """Return True if a transaction of the driver begins and ends by ``Connection.execute``."""
    driver: Any = _Driver()
    driver._top_xact, driver._protocol = None, _Driver()  # noqa: SLF001 - as the driver's own
    transaction = Transaction(driver, None, False, False)
    with contextlib.suppress(Exception):
        for step in (transaction.start, transaction.commit):
            with contextlib.suppress(StopIteration):  # it waits for nothing
                step().send(None)
    statements: list[str] = driver.statements
    return statements == ["BEGIN;", "COMMIT;"]


_OF_CANCEL = frozenset({"loop", "addr", "params", "backend_pid", "backend_secret"})


def _lacking_parts() -> Iterator[tuple[str, str]]:
    """Yield each private part that this adapter uses and asyncpg lacks, with the lost ability."""
    names = [name for name in ("_addr", "_params", "_protocol") if name not in dir(Connection)]
    send: Any = getattr(connect_utils, "_cancel", None)
    if names or send is None or not signature(send).parameters.keys() >= _OF_CANCEL:
        part = f"Connection.{names[0]}" if names else "connect_utils._cancel"
        yield part, CANCELS
    if not _sends_transactions():
        yield "Transaction over Connection.execute", TRANSACTIONS
    if "_introspect_types" not in dir(Connection):
        yield "Connection._introspect_types", "look up types in one transaction"


CANCELS, TRANSACTIONS = "cancel the statement of a closed connection", "see BEGIN and COMMIT"


@lru_cache(maxsize=1)
def missing_abilities() -> frozenset[str]:
    """Return the abilities that asyncpg does not offer; the first call logs one warning.

    A statement of a closed connection then ends when the server finds out, within a second from
    Postgres 14. Transactions take one more round trip.
    """
    lacking = dict(_lacking_parts())
    if lacking:
        _logger.warning(
            "asyncpg lacks parts that the database adapter uses",
            extra={
                "asyncpg": asyncpg.__version__,
                "lacking": ", ".join(lacking),
                "cannot": "; ".join(lacking.values()),
            },
        )
    return frozenset(lacking.values())


class ServerConnection(asyncpg.Connection):
    """A connection whose transport can be asked for its socket and its TLS."""

    __slots__ = ("transport",)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        given = (*arguments, *options.values())
        self.transport: Any = next(
            (each for each in given if hasattr(each, "get_extra_info")), None
        )
        """None if the driver gives none: the system then decides when a silent connection ends."""


KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 30, 10, 3
"""Seconds of silence before the first probe, seconds between probes, and their number."""
USER_TIMEOUT_SECONDS = 30.0
"""Time for which sent data may be unacknowledged until the connection is lost."""
_MAX_SECONDS, _MAX_COUNT = 32767, 127


def keep_alive(connection: ServerConnection, address: DatabaseAddress) -> None:
    """Let the system notice that the server is gone, also while nothing is sent."""
    timeout = address.tcp_user_timeout
    limit_silence(connection, USER_TIMEOUT_SECONDS if timeout is None else timeout)
    if address.keepalives and (opened := _tcp_socket(connection)) is not None:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle, interval, count = _keepalive(address)
        _set(opened, TCP_KEEPIDLE=idle, TCP_KEEPINTVL=interval, TCP_KEEPCNT=count)


def limit_silence(connection: ServerConnection, seconds: float) -> None:
    """Let the connection end when sent data is unacknowledged for so long; 0: by the system.

    The system of the other side acknowledges, also while the program there is busy.
    """
    if not connection.is_closed() and (opened := _tcp_socket(connection)) is not None:
        _set(opened, TCP_USER_TIMEOUT=round(seconds * 1000))


def _tcp_socket(connection: ServerConnection) -> Any:
    if connection.transport is None:
        return None
    opened = connection.transport.get_extra_info("socket")
    is_tcp = opened is not None and opened.family in {socket.AF_INET, socket.AF_INET6}
    return opened if is_tcp else None


def _set(opened: Any, **options: int) -> None:
    for name, value in options.items():
        if hasattr(socket, name):  # not on each system
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def keepalive_settings(address: DatabaseAddress) -> dict[str, str]:
    """Return the settings by which the server notices that this client is gone."""
    if not address.keepalives:
        return {}
    names = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")
    return dict(zip(names, map(str, _keepalive(address)), strict=True))


def _keepalive(address: DatabaseAddress) -> tuple[int, int, int]:
    return (
        min(address.keepalives_idle or KEEPALIVE_IDLE, _MAX_SECONDS),
        min(address.keepalives_interval or KEEPALIVE_INTERVAL, _MAX_SECONDS),
        min(address.keepalives_count or KEEPALIVE_COUNT, _MAX_COUNT),
    )


Server: TypeAlias = tuple[str, int]
"""Host name, address or socket folder, and port."""
Open: TypeAlias = Callable[[Server, str], Awaitable[ServerConnection]]
"""Opens a connection to a server at one of its addresses."""

NEXT_SECONDS = 0.25
"""Silence of a server after which the next one is tried, too (the delay of RFC 8305)."""
PREFERENCE_SECONDS = 1.0
"""How long to wait for a server of the preferred kind once another one is connected."""
_CLOSE_SECONDS = 1.0

_ROLE: Final = """
SELECT pg_catalog.pg_is_in_recovery() AS standby,
    pg_catalog.current_setting('transaction_read_only') = 'on' AS read_only
"""


@dataclass(frozen=True, slots=True)
class _Found:
    server: Server
    connection: ServerConnection
    is_preferred: bool = True


class ServerSearch:
    """Opens connections to the first server that suits ``target_session_attrs``.

    The next server is tried when one fails, and beside it when one is silent, so that a server
    that drops packets costs a quarter of a second. A query asks for the kind of a server: the
    report at login may be old behind a pooler.
    """

    def __init__(self) -> None:
        self._last: Server | None = None
        self._names = NameLookups()

    async def connect(
        self, address: DatabaseAddress, open_: Open, deadline: float
    ) -> ServerConnection:
        """Connect until the event loop's time is ``deadline``.

        Raises the error of the only host, or :class:`NoServerError` with those of all hosts.
        """
        servers = self._in_order(address)
        race = _Race(
            [partial(self._connect_to, server, address, open_, deadline) for server in servers],
            deadline,
        )
        if found := await race.run():
            self._last = found.server
            return found.connection
        if len(servers) == 1:
            raise race.errors[0]
        names = [f"{host}:{port}" for host, port in servers]
        raise NoServerError(tuple(zip(names, race.errors, strict=True)))

    def _in_order(self, address: DatabaseAddress) -> Sequence[Server]:
        servers = list(address.hosts)
        if address.load_balance_hosts:
            random.shuffle(servers)  # not for security
        elif address.target_session_attrs != "any" and self._last in servers:
            # Each connection would otherwise ask the servers before it for their kind.
            servers.remove(self._last)
            servers.insert(0, self._last)
        return servers

    async def _connect_to(
        self, server: Server, address: DatabaseAddress, open_: Open, deadline: float
    ) -> _Found:
        async def connect(place: str) -> _Found:
            return await _judged(server, await open_(server, place), address.target_session_attrs)

        places = address.host_addresses.get(server) or await self._places(*server)
        race = _Race([partial(connect, place) for place in places], deadline)
        if found := await race.run():
            return found
        raise most_telling(race.errors)

    async def _places(self, host: str, port: int) -> Sequence[str]:
        """Return the folder of a socket, or the addresses of a name."""
        if host.startswith("/"):
            return (host,)
        return await self._names.addresses(host, port)


async def _judged(server: Server, connection: ServerConnection, target: str) -> _Found:
    """Return a connection to a server of the kind ``target``; close any other."""
    if target == "any":
        return _Found(server, connection)
    try:
        role = await connection.fetchrow(_ROLE)
    except BaseException:
        connection.terminate()
        raise
    assert role is not None  # noqa: S101 - the query returns one row
    is_standby, is_read_only = role["standby"], role["read_only"]
    if target == "prefer-standby":
        return _Found(server, connection, is_standby)
    suits = {
        "read-write": not is_read_only,
        "read-only": is_read_only,
        "primary": not is_standby,
        "standby": is_standby,
    }
    if suits[target]:
        return _Found(server, connection)
    with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        await connection.close(timeout=_CLOSE_SECONDS)
    raise WrongServerError(target)


class _Race:
    """Runs attempts side by side, each started when the one before failed or is silent."""

    def __init__(
        self, attempts: Sequence[Callable[[], Awaitable[_Found]]], deadline: float
    ) -> None:
        self._waiting = list(enumerate(attempts))
        self._running: dict[asyncio.Task[_Found], int] = {}
        self._deadline = deadline
        self._spare: _Found | None = None
        self.errors: list[Exception] = [TimeoutError() for _ in attempts]

    async def run(self) -> _Found | None:
        """Return the first preferred result, else any; None: each attempt has its error."""
        time, chosen = asyncio.get_running_loop().time, None
        try:
            while chosen is None and (self._waiting or self._running) and time() < self._deadline:
                if self._waiting:
                    index, attempt = self._waiting.pop(0)
                    self._running[asyncio.ensure_future(attempt())] = index
                until = time() + NEXT_SECONDS if self._waiting else self._deadline
                done, _ = await asyncio.wait(
                    self._running,
                    timeout=max(0.0, min(until, self._deadline) - time()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in sorted(done, key=self._running.__getitem__):
                    chosen = self._take(task, chosen)
            chosen = chosen or self._spare
        finally:
            if self._spare is not None and self._spare is not chosen:
                self._spare.connection.terminate()
            # Not awaited: a cancellation meanwhile would lose the chosen connection.
            for task in self._running:
                task.add_done_callback(_drop)
                task.cancel()
        return chosen

    def _take(self, task: asyncio.Task[_Found], chosen: _Found | None) -> _Found | None:
        """Judge an attempt that has ended, and return the chosen result."""
        index = self._running.pop(task)
        error = TimeoutError() if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self.errors[index] = error
        elif chosen is not None:
            _drop(task)
        elif task.result().is_preferred:
            return task.result()
        elif self._spare is None:
            self._spare = task.result()
            now = asyncio.get_running_loop().time()
            self._deadline = min(self._deadline, now + PREFERENCE_SECONDS)
        else:
            _drop(task)
        return chosen


def _drop(attempt: "asyncio.Task[_Found]") -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().connection.terminate()


# The name of the database on a server, and the start of that server to the microsecond. Each role
# may ask for both, and neither depends on a setting of the session.
IDENTITY: Final = (
    "pg_catalog.concat(pg_catalog.current_database(), ' ',"
    " extract(epoch FROM pg_catalog.pg_postmaster_start_time())::pg_catalog.numeric(20, 6))"
)
"""Identifies the database that a connection leads to.

It is that of the server that runs now: a copy has another one, such as a database that was restored
from a backup of this one, and so has the same database after a restart or a failover.
"""


class ElsewhereError(TransactionError):
    """A statement did nothing, since it ran in a database of another :data:`IDENTITY`."""

    def __init__(self) -> None:
        """Name the remedy."""
        super().__init__(
            "the connection leads to another database or server than DATABASE_URL, and no worker"
            " would find the job there; pass a connection to the database of DATABASE_URL"
        )


class OwnDatabase:
    """The database that the configuration leads to, by its identity at the moment."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[ServerConnection]],
        *,
        holds: Callable[[object], bool],
        timeout: float,
    ) -> None:
        """``connect`` opens a connection on the running event loop, and may take ``timeout``.

        ``holds`` returns True for a connection that leads to this database in any case.
        """
        self._connect = connect
        self.holds = holds
        self._timeout = timeout
        self._identity: str | None = None
        self._asking: WeakKeyDictionary[asyncio.AbstractEventLoop, SingleFlight[str]]
        self._asking = WeakKeyDictionary()

    async def require(self, call: Callable[[str], Awaitable[T]]) -> T:
        """Return the result of ``call``, which gets the identity that its database must have.

        It raises :class:`ElsewhereError` for another one, and is then called a second time if the
        identity has changed. The first call asks the server for it; later ones cost nothing. Raises
        :class:`LedgerUnavailableError` if the server does not answer.
        """
        identity = self._identity or await self._ask()
        try:
            return await call(identity)
        except ElsewhereError:
            # The server may have restarted, or another one may have taken its place.
            renewed = await self._ask()
            if renewed == identity:
                raise
        return await call(renewed)

    async def _ask(self) -> str:
        """Return the identity; callers of one event loop share a question."""
        if running_loop() is None:
            return asyncio.run(self._ask_server())  # for a blocking call
        flights = self._asking.setdefault(asyncio.get_running_loop(), SingleFlight())
        return await flights.run("identity", self._ask_server)

    async def _ask_server(self) -> str:
        # On a connection of its own: those of the pool may all be in transactions that wait for
        # this answer, and the pool is closed before the start and belongs to one event loop.
        with map_errors():
            async with asyncio.timeout(self._timeout):
                connection = await self._connect()
                try:
                    identity: str = await connection.fetchval(f"SELECT {IDENTITY}")
                except BaseException:
                    connection.terminate()
                    raise
        with contextlib.suppress(*DATABASE_ERRORS):
            await connection.close(timeout=_CLOSE_SECONDS)
        self._identity = identity
        return identity
