"""Opens connections to Postgres: their TLS, the settings of their sessions, their reset."""

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import asyncpg
from asyncpg import connect_utils

from viralfx.postgres.credentials import Login, Logins, TlsContexts
from viralfx.postgres.errors import (
    DATABASE_ERRORS,
    POOLER_REFUSAL,
    explain,
    is_login_refused,
    mark_login,
    refuses_tls,
)
from viralfx.postgres.servers import (
    CANCELS,
    TRANSACTIONS,
    Server,
    ServerConnection,
    ServerSearch,
    keep_alive,
    keepalive_settings,
    missing_abilities,
)
from viralfx.settings import (
    CredentialsCallable,
    DatabaseAddress,
    DatabaseSettings,
    Secret,
    milliseconds,
)

_IS_BEGIN = re.compile(r"BEGIN[ A-Z]*;").fullmatch
"""Matches the statement with which the driver begins a transaction."""


_LISTS = {"search_path", "DateStyle", "datestyle", "temp_tablespaces"}
"""Settings whose value is a list."""


def _assignments(verb: str, settings: Mapping[str, str]) -> str:
    return "".join(f" {verb} {name} = {_quoted(name, settings[name])};" for name in settings)


def _quoted(name: str, value: str) -> str:
    # Quoted as a whole, a list would be one name.
    parts = value.split(",") if name in _LISTS else [value]
    if name in _LISTS:
        parts = [part.strip().strip('"') for part in parts]
    return ", ".join("'" + part.replace("'", "''") + "'" for part in parts)


class CheckedConnection(ServerConnection):
    """A connection that applies the settings of its session as a pooler allows.

    As a connection of the pool it knows whether its next reset is needed. It raises if the server
    answers COMMIT with ROLLBACK, because a statement had failed. Neither Postgres nor the driver
    treats that as an error. Code that catches the error of a statement and continues would
    otherwise assume that its changes are saved.
    """

    __slots__ = ("_is_session_clean", "_on_begin", "_on_reset", "standing")

    standing: Any
    """Its :class:`Standing` in a pool; set by that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_session_clean = False
        self._on_reset: str | None = ""
        self._on_begin = ""

    async def keep_settings(self, settings: Mapping[str, str]) -> None:
        """Set ``settings`` now, and again after each reset: the server had none at the login."""
        self._on_reset = _assignments("SET", settings)
        await self.execute(self._on_reset)

    def limit_transactions(self, settings: Mapping[str, str]) -> None:
        """Set ``settings`` in each transaction, and never anything that outlives one.

        A server process then belongs to this connection for a transaction only, so that a reset
        would reach the session of another client.
        """
        self._on_begin, self._on_reset = _assignments("SET LOCAL", settings), None

    async def on_begin(self) -> None:
        """Set what :meth:`limit_transactions` asks for, after a BEGIN that did not."""
        if self._on_begin:
            await self.execute(self._on_begin)

    @property
    def itself(self) -> "CheckedConnection":
        """The connection without the proxy that a pool lends."""
        return self

    @property
    def owns_session(self) -> bool:
        """False if the server process may be another one after each transaction."""
        return self._on_reset is not None

    def get_reset_query(self) -> str:
        """Return the statements that restore the settings of the session."""
        return "" if self._on_reset is None else super().get_reset_query() + self._on_reset

    def transaction(self, **options: Any) -> Any:
        """Return a transaction that sets what :meth:`limit_transactions` asks for.

        Its statements pass through :meth:`execute`. If the driver does not send them there, they
        are sent beside its own.
        """
        made = super().transaction(**options)
        return _PlainTransaction(self, made) if TRANSACTIONS in missing_abilities() else made

    async def _introspect_types(self, *arguments: Any, **options: Any) -> Any:
        # At the first use of an array type, and of each type that the server defines itself, the
        # driver looks it up, with jit turned off in the meantime. Outside a transaction these
        # statements would reach different server processes, and some would stay without jit.
        introspect = super()._introspect_types  # type: ignore[misc]  # not in the stubs
        if self.owns_session or self.is_in_transaction():
            return await introspect(*arguments, **options)
        async with self.transaction():
            return await introspect(*arguments, **options)

    def mark_session_clean(self) -> None:
        """Skip the next reset, because no statement has changed the session."""
        self._is_session_clean = True

    def takes_reset(self) -> bool:
        """Return whether the next reset is needed; later ones are, unless it is marked again."""
        is_clean, self._is_session_clean = self._is_session_clean, False
        return self.owns_session and not is_clean

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109 - as its base
        """Run a statement and return its status."""
        if self._on_begin and not args and _IS_BEGIN(query):
            query += self._on_begin
        status = await super().execute(query, *args, timeout=timeout)
        if status == "ROLLBACK" and query == "COMMIT;":
            raise asyncpg.InFailedSQLTransactionError(
                "the transaction was rolled back: a statement in it had failed"
            )
        return status


class _PlainTransaction:
    """A transaction of the driver, by its public methods alone."""

    def __init__(self, connection: CheckedConnection, inner: Any) -> None:
        self._connection = connection
        self._inner = inner

    async def start(self) -> None:
        is_nested = self._connection.is_in_transaction()
        await self._inner.start()
        if not is_nested:
            await self._connection.on_begin()

    async def commit(self) -> None:
        await self._connection.execute("SELECT 1")  # fails if a statement had failed
        await self._inner.commit()

    async def rollback(self) -> None:
        await self._inner.rollback()

    async def __aenter__(self) -> None:
        await self.start()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await (self.commit() if kind is None else self.rollback())


async def reset_session(connection: "asyncpg.Connection[Any]") -> None:
    """Reset a released connection, by a round trip, unless its session is clean."""
    if isinstance(connection, CheckedConnection) and not connection.takes_reset():
        return
    await connection.execute(connection.get_reset_query())


_logger = logging.getLogger("viralfx.database")

T = TypeVar("T")

_READER_ATTRIBUTES = frozenset({"read-only", "standby", "prefer-standby"})
"""Values of ``target_session_attrs`` for which a server without writes is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresConfig:
    """Address (``DATABASE_URL``) and settings (``DB_*``) of the database."""

    address: DatabaseAddress
    settings: DatabaseSettings = field(default_factory=DatabaseSettings)
    suspect_after: float = 2.0
    """Seconds; a connection that is awaited or in use for longer triggers a health check."""

    url: Secret | None = None
    """The secret that held the address; if it came from a file, that is read again."""
    url_variable: str = "DATABASE_URL"
    """The variable that set it."""
    ask_password: CredentialsCallable | None = None
    """Returns the password, or user and password, for each connection."""

    @property
    def needs_writes(self) -> bool:
        """True if a server that accepts no writes is the wrong one."""
        return self.address.target_session_attrs not in _READER_ATTRIBUTES


_CLIENT_GRACE = 5.0
"""Seconds after the server's limit on a statement at which the driver gives up on the server."""


_POOLED_GRACE = 1.0
"""The same behind a pooler in transaction mode."""
_CACHED_STATEMENTS = 100
"""The driver's default."""
_OF_SESSIONS = {"application_name", "plan_cache_mode"}
"""Settings without use in a transaction: statements without a name have no cached plan."""
CLIENT_CHECK: Final = "client_connection_check_interval"
"""With this setting the server ends a statement whose client is gone, and releases its locks."""
_CLIENT_CHECK_MILLISECONDS = "1000"
_INVALID_SETTING = (asyncpg.UndefinedObjectError, asyncpg.InvalidParameterValueError)


class Connector:
    """Opens connections to the server that the configuration names.

    One connector serves all connections of a database, also those of other event loops and threads.
    """

    def __init__(self, config: PostgresConfig) -> None:
        """Load the certificates; raises :class:`CertificateError` if they cannot be used."""
        missing_abilities()
        self.config = config
        self._tls = TlsContexts(config.settings, config.address)
        self._servers = ServerSearch()
        self._logins = Logins(
            config.address,
            url=config.url,
            variable=config.url_variable,
            password=config.settings.password,
            ask_password=config.ask_password,
        )
        self._checks_clients = True

    async def connect(
        self,
        *,
        purpose: str = "",
        **settings: str,
    ) -> ServerConnection:
        """Open one connection on the running event loop, within ``DB_CONNECTION_TIMEOUT``.

        ``purpose`` is appended to the application name that the server shows. ``settings`` change
        those of the session; the driver's limit on a statement follows ``statement_timeout``.
        ``DB_POOLER`` decides how they are applied: at the login; after it; or in each transaction,
        so that a single statement has only the driver's limit.

        Credentials, certificates and addresses of names are those of the moment. If the server
        refuses the login, and there are new credentials by then, it is tried once more.
        With ``DB_TLS_MODE=prefer``, falls back to plain text if the server does not support TLS.
        Raises the driver's errors; with several hosts, :class:`NoServerError` if none can be used,
        and :class:`CredentialsError` if the application gives no password. Each of them is marked
        by :func:`mark_login`, so that it says nothing about a statement of a caller.
        """
        try:
            return await self._log_in(purpose, settings)
        except Exception as error:
            mark_login(error)
            raise

    async def _log_in(self, purpose: str, settings: Mapping[str, str]) -> ServerConnection:
        wanted = self.session_settings(purpose, **settings)
        loop, limit = asyncio.get_running_loop(), self.config.settings.connection_timeout
        deadline = loop.time() + limit
        login = await self._logins.current(limit)
        try:
            return await self._connect(login, wanted, deadline)
        except (OSError, asyncpg.PostgresError) as error:
            left = deadline - loop.time()
            if left <= 0 or not is_login_refused(error):
                raise
            self._logins.refused()
            renewed = await self._logins.current(left)
            if renewed == login:
                raise
            return await self._connect(renewed, wanted, deadline)

    async def _connect(
        self, login: Login, wanted: dict[str, str], deadline: float
    ) -> ServerConnection:
        arguments = self._arguments(wanted)

        async def open_(server: Server, place: str) -> ServerConnection:
            name, port = server
            own = {
                **arguments,
                "host": place,
                "port": port,
                "user": login.user,
                "password": login.password_for(name, port),
                "ssl": self._tls.for_host(name),
            }
            connection: CheckedConnection | None = None
            while connection is None:
                try:
                    connection = await asyncpg.connect(**own)
                except (OSError, asyncpg.PostgresError) as error:
                    own = self._alternative(own, error)
            try:
                keep_alive(connection, login.address)
                await self._adopt(connection, wanted)
            except BaseException:
                connection.terminate()
                raise
            return connection

        return await self._servers.connect(login.address, open_, deadline)

    async def _adopt(self, connection: CheckedConnection, wanted: Mapping[str, str]) -> None:
        """Apply the settings of a session that a pooler would refuse at the login."""
        pooler = self.config.settings.pooler
        if pooler == "session":
            await connection.keep_settings(wanted)
        elif pooler == "transaction":
            connection.limit_transactions(
                {name: value for name, value in wanted.items() if name not in _OF_SESSIONS}
            )

    def _alternative(self, arguments: dict[str, Any], error: Exception) -> dict[str, Any]:
        """Return the arguments for another try at once; without a reason for one, raise.

        There is a reason for each of two changes, and a server may need both of them.
        """
        prefers_tls = self.config.settings.tls_mode == "prefer"
        if prefers_tls and arguments["ssl"] is not False and refuses_tls(error):
            return {**arguments, "ssl": False}
        settings: dict[str, str] = arguments["server_settings"]
        refuses_setting = isinstance(error, _INVALID_SETTING) and CLIENT_CHECK in str(error)
        if refuses_setting and CLIENT_CHECK in settings:
            # A server before Postgres 14, or on a system that does not report a lost client.
            self._checks_clients = False
            others = {name: value for name, value in settings.items() if name != CLIENT_CHECK}
            return {**arguments, "server_settings": others}
        raise error

    def session_settings(self, purpose: str = "", **more: str) -> dict[str, str]:
        """Return the server settings of a session for ``purpose``, with ``more`` changed."""
        address, limit = self.config.address, self.config.settings.statement_timeout
        name = address.application_name
        settings = {
            **address.server_settings,
            "application_name": f"{name}-{purpose}" if purpose else name,
            # A cached plan that was made while a table was empty would scan the grown table.
            "plan_cache_mode": "force_custom_plan",
        }
        if limit:
            settings["statement_timeout"] = str(milliseconds(limit))
        if self.config.settings.pooler == "none":
            settings |= keepalive_settings(address)
            if self._checks_clients:
                settings[CLIENT_CHECK] = _CLIENT_CHECK_MILLISECONDS
            if address.options is not None:
                settings["options"] = address.options
        return {**settings, **address.server_settings, **more}

    def _arguments(self, server_settings: dict[str, str]) -> dict[str, Any]:
        pooler, grace = self.config.settings.pooler, _CLIENT_GRACE
        limit = int(server_settings.get("statement_timeout", "0")) / 1000
        if pooler != "none":
            # A pooler passes this one on, and refuses others.
            server_settings = {"application_name": server_settings["application_name"]}
        if options := self.config.address.options:
            # A proxy chooses the server by them.
            server_settings = {**server_settings, "options": options}
        if pooler == "transaction":
            # The only limit on a statement outside a transaction.
            grace = _POOLED_GRACE
        return {
            "database": self.config.address.database,
            "timeout": None,  # the search for a server has one
            # The server ends a slow statement; this limit is for a server that hangs.
            "command_timeout": limit + grace if limit else None,
            "server_settings": server_settings,
            "connection_class": CheckedConnection,
            # A prepared statement with a name belongs to one server process.
            "statement_cache_size": 0 if pooler == "transaction" else _CACHED_STATEMENTS,
            # Explicit values, so that the driver does not read its environment variables.
            "direct_tls": False,
            "target_session_attrs": "any",
        }


_PID: Final = "SELECT pg_catalog.pg_backend_pid()"
_PROBES = 3


async def is_process_shared(
    connector: Connector, connection: "asyncpg.Connection[Any]", limit: float
) -> bool:
    """Return True if a second connection reaches the server process of the first.

    That proves a pooler in transaction mode. The opposite proves nothing: the pooler may have
    several processes, or take no second client within ``limit`` seconds.
    """
    other: ServerConnection | None = None
    try:
        async with asyncio.timeout(limit):
            other = await connector.connect(purpose="pooler")
            for _ in range(_PROBES):
                first = await run_query(connection, connection.fetchval(_PID))
                if first == await run_query(other, other.fetchval(_PID)):
                    return True
    except DATABASE_ERRORS as error:
        # A statement that another process has prepared is a proof, too.
        return explain(error).code == POOLER_REFUSAL
    finally:
        if other is not None:
            other.terminate()
    return False


CANCEL_SECONDS = 1.0
"""Seconds in which a request to cancel a statement must reach the server."""
_cancelling: "set[asyncio.Task[None]]" = set()


def cut(connection: "asyncpg.Connection[Any]") -> "asyncio.Task[None] | None":
    """Close a connection at once, and let the server cancel its statement in the background.

    Otherwise the statement would go on and keep its locks. Returns the task of the request, which
    ends within ``CANCEL_SECONDS`` and never raises; None if the connection was closed already, or
    the driver cannot send it.
    """
    if connection.is_closed():
        return None
    if CANCELS in missing_abilities():
        connection.terminate()
        return None
    driver: Any = connection  # which has no public way to send the request alone
    target = {
        "addr": driver._addr,  # noqa: SLF001 - as said
        "params": driver._params,  # noqa: SLF001 - as said
        "backend_pid": driver._protocol.backend_pid,  # noqa: SLF001 - as said
        "backend_secret": driver._protocol.backend_secret,  # noqa: SLF001 - as said
    }
    connection.terminate()
    task = asyncio.create_task(_cancel(target), name="postgres-cancel")
    _cancelling.add(task)
    task.add_done_callback(_cancelling.discard)
    return task


async def _cancel(target: dict[str, Any]) -> None:
    # Every kind of error: the server may be gone.
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CANCEL_SECONDS):
            send: Any = connect_utils._cancel  # type: ignore[attr-defined]  # noqa: SLF001 - see cut
            await send(loop=asyncio.get_running_loop(), **target)


async def run_query(connection: "asyncpg.Connection[Any]", query: Any) -> Any:
    """Await the result of a query; on cancellation, cut the connection at once.

    Cancelling the driver's call instead would wait for the server, even if it does not respond.
    """
    running = asyncio.ensure_future(query)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        cut(connection)
        with contextlib.suppress(Exception):
            await running
        raise


async def run_limited(
    connection: "asyncpg.Connection[Any]", query: Callable[[], Awaitable[T]]
) -> T:
    """Await the result of a query under the limits of the session, as :func:`run_query` does.

    Behind a pooler in transaction mode this takes a transaction.
    """

    async def run() -> T:
        if not isinstance(connection, CheckedConnection) or connection.owns_session:
            return await query()
        async with connection.transaction():
            return await query()

    result: T = await run_query(connection, run())
    return result
