"""Checks the database before a deployment; it changes nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import asyncpg
import msgspec

from viralfx.domain.doctor import Area, Finding, failed, passed, skipped, warned
from viralfx.postgres.connections import (
    Connector,
    PostgresConfig,
    is_process_shared,
    run_limited,
)
from viralfx.postgres.credentials import CertificateError
from viralfx.postgres.errors import DATABASE_ERRORS, ErrorExplanation, explain
from viralfx.postgres.migrations import (
    VERSION_TABLE,
    SchemaInfo,
    judge_schema,
    query_schema,
    unreadable,
)
from viralfx.postgres.servers import ServerConnection
from viralfx.settings import CredentialsCallable, milliseconds

MIN_MAJOR_VERSION = 14
"""The oldest major version that still gets security fixes."""

RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")

# Every user may read these. Durations are milliseconds; -1 (limits) and 0 (times) mean none. Limits
# count no parallel workers and no senders of replication; the type of another user's may be hidden.
_SERVER = """
WITH clients AS MATERIALIZED (
    SELECT usename, datname FROM pg_stat_activity
     WHERE usename IS NOT NULL AND datname IS NOT NULL AND pid <> pg_backend_pid()
       AND coalesce(backend_type, 'client backend') = 'client backend'
)
SELECT current_setting('server_version') AS version,
       current_setting('server_version_num')::int / 10000 AS major,
       current_setting('server_encoding') AS encoding,
       pg_is_in_recovery() AS replica,
       current_setting('default_transaction_read_only')::bool AS read_only,
       pg_backend_pid() AS pid,
       current_setting('max_connections')::int AS max_connections,
       current_setting('superuser_reserved_connections')::int
         + coalesce(current_setting('reserved_connections', true)::int, 0) AS reserved,
       (SELECT count(*)::int FROM clients) AS in_use,
       (SELECT count(*)::int FROM clients WHERE usename = current_user) AS in_use_by_user,
       (SELECT count(*)::int FROM clients WHERE datname = current_database())
         AS in_use_of_database,
       rolsuper AS superuser,
       rolconnlimit AS user_limit,
       (SELECT datconnlimit FROM pg_database WHERE datname = current_database())
         AS database_limit,
       (SELECT setting::bigint FROM pg_settings WHERE name = 'statement_timeout')
         AS statement_timeout,
       (SELECT setting::bigint FROM pg_settings WHERE name = 'transaction_timeout')
         AS transaction_timeout,
       (SELECT setting::bigint FROM pg_settings WHERE name = 'idle_session_timeout')
         AS idle_session_timeout
  FROM pg_roles WHERE rolname = current_user
"""
# Of a view, only SELECT is needed. The views read their tables with the rights of their owner.
_WITHOUT_RIGHTS = r"""
SELECT $3 || '.' || relname, array_agg(lacking ORDER BY lacking)
  FROM pg_class, unnest($1::text[]) AS lacking
 WHERE (relkind IN ('r', 'p') OR relkind = 'v' AND lacking = 'SELECT') AND relname <> $2
   AND relname LIKE 'viralfx\_%' AND relnamespace = to_regnamespace(quote_ident($3))
   AND NOT has_table_privilege(pg_class.oid, lacking)
 GROUP BY relname ORDER BY relname
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """State of a server. Durations are milliseconds, as in Postgres; 0 or None: no limit."""

    version: str
    major: int
    encoding: str = "UTF8"
    replica: bool = False
    read_only: bool = False
    """True if transactions are read-only by default."""
    tls: str | None = None
    """The TLS version of this end of the connection; None: plain text."""
    pid: int = 0
    """The server process of the query."""
    pooled: bool = False
    """True if the greeting named another process: a pooler sent it, with a number of its own."""
    shared: bool = False
    """True if two open connections reached the same server process, one after the other."""
    max_connections: int = 100
    reserved: int = 3
    """Connections that are reserved for superusers."""
    in_use: int = 0
    """Connections of all clients, without that of the doctor."""
    in_use_by_user: int = 0
    in_use_of_database: int = 0
    superuser: bool = False
    user_limit: int = -1
    database_limit: int = -1
    statement_timeout: int = 0
    transaction_timeout: int | None = None
    idle_session_timeout: int | None = None
    schema: SchemaInfo = field(default_factory=SchemaInfo)
    lacking: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Tables of the service, each with the rights that the user lacks."""

    @property
    def _limits(self) -> list[tuple[int, int]]:
        """Each limit of connections, and how many of it are in use."""
        optional = (
            (self.user_limit, self.in_use_by_user),
            (self.database_limit, self.in_use_of_database),
        )
        server = (max(0, self.max_connections - self.reserved), self.in_use)
        return [server, *((limit, used) for limit, used in optional if limit >= 0)]

    @property
    def usable(self) -> int:
        """Maximum number of connections of this user."""
        return min(limit for limit, _ in self._limits)

    @property
    def tightest(self) -> tuple[int, int]:
        """The limit with the fewest free connections, and how many of it are in use."""
        return min(self._limits, key=lambda each: each[0] - each[1])


async def query_server(connection: ServerConnection, schema: str) -> ServerInfo:
    """Query the server about the tables in ``schema`` too; raises the driver's errors."""
    server = await connection.fetchrow(_SERVER)
    assert server is not None  # noqa: S101 - the current user exists
    lacking = await connection.fetch(_WITHOUT_RIGHTS, list(RIGHTS), VERSION_TABLE, schema)
    transport = connection.transport
    tls = None if transport is None else transport.get_extra_info("ssl_object")
    return ServerInfo(
        **dict(server),
        # Not that of pg_stat_ssl: a pooler has another connection to the server.
        tls=None if tls is None else tls.version(),
        pooled=connection.get_server_pid() != server["pid"],
        schema=await query_schema(connection, schema),
        lacking=tuple((table, tuple(rights)) for table, rights in lacking),
    )


def judge(info: ServerInfo, config: PostgresConfig, *, production: bool) -> Iterator[Finding]:
    """Yield the findings on a server for this configuration."""
    yield from _server(info, config)
    yield from _pooler(info, config)
    yield from _rights(info, production=production)
    yield from _timeouts(info, config)
    yield from _pool(info, config)


def _server(info: ServerInfo, config: PostgresConfig) -> Iterator[Finding]:
    area = Area.DATABASE
    how = f"over {info.tls}" if info.tls else "in plain text"
    how += " as far as a pooler in front of it" * info.pooled
    yield passed(area, f"PostgreSQL {info.version} at {config.address} answers {how}")
    if info.major < MIN_MAJOR_VERSION:
        yield failed(
            area,
            f"PostgreSQL {info.version} is too old",
            f"upgrade the server to version {MIN_MAJOR_VERSION} or later",
        )
    if info.replica:
        yield failed(
            area,
            f"the database at {config.address} is a replica that accepts no writes",
            "name the primary in DATABASE_URL",
        )
    elif info.read_only:
        yield failed(
            area,
            "default_transaction_read_only is on: nothing can be written",
            "turn it off for the user or database of DATABASE_URL",
        )
    if info.encoding != "UTF8":
        yield warned(
            area,
            f"the database is encoded in {info.encoding}: it refuses other characters",
            "create it with ENCODING 'UTF8'",
        )


def _pooler(info: ServerInfo, config: PostgresConfig) -> Iterator[Finding]:
    area, mode = Area.DATABASE, config.settings.pooler
    if info.shared and mode != "transaction":
        yield failed(
            area,
            "the pooler gives a server process to another client after each transaction, and"
            f" DB_POOLER={mode}",
            "set DB_POOLER=transaction",
        )
    elif info.pooled and mode == "none":
        yield warned(
            area,
            "a pooler answers in place of the server, and DB_POOLER=none",
            "set DB_POOLER to the pooler's mode: session or transaction",
        )
    elif mode != "none" and not info.pooled:
        yield warned(
            area,
            f"no pooler answers, and DB_POOLER={mode} does without features of a server",
            "set DB_POOLER=none, or name the pooler in DATABASE_URL",
        )


def _rights(info: ServerInfo, *, production: bool) -> Iterator[Finding]:
    area = Area.DATABASE
    for table, rights in info.lacking:
        yield failed(
            area,
            f"the user may not {', '.join(rights)} on the table {table}",
            f"grant {', '.join(rights)} on {table} to the user of DATABASE_URL",
        )
    if production and info.superuser:
        yield warned(
            area,
            "the user is a superuser with access to all data on the server",
            "create a user for this service, and name it in DATABASE_URL",
        )


def _timeouts(info: ServerInfo, config: PostgresConfig) -> Iterator[Finding]:
    area, own = Area.DATABASE, milliseconds(config.settings.statement_timeout)
    if info.statement_timeout != own and info.pooled and config.settings.pooler == "none":
        yield warned(
            area,
            f"DB_STATEMENT_TIMEOUT={own} is not in force: the pooler drops the settings of a"
            " session",
            "set DB_POOLER to the pooler's mode: session or transaction",
        )
    elif info.statement_timeout != own:
        yield warned(
            area,
            f"the server cancels statements after {info.statement_timeout} ms, by a"
            f" statement_timeout of its own, and not after DB_STATEMENT_TIMEOUT={own}",
            "set DB_STATEMENT_TIMEOUT to the intended value",
        )
    if info.transaction_timeout and (not own or info.transaction_timeout < own):
        yield warned(
            area,
            f"the server's transaction_timeout ends connections after"
            f" {info.transaction_timeout} ms, before DB_STATEMENT_TIMEOUT={own} can",
            "lower DB_STATEMENT_TIMEOUT, or raise transaction_timeout for this user",
        )
    if info.idle_session_timeout:
        yield warned(
            area,
            f"the server's idle_session_timeout ends the pool's idle connections after"
            f" {info.idle_session_timeout} ms",
            "set idle_session_timeout to 0 for the user of DATABASE_URL",
        )


def _pool(info: ServerInfo, config: PostgresConfig) -> Iterator[Finding]:
    # Outside the pool: one for health checks, and one for heartbeats of a worker.
    settings = config.settings
    area, needed, usable = Area.POOL, settings.pool_max + 2, info.usable
    limit, in_use = info.tightest
    pool = f"DB_POOL_MAX={settings.pool_max} and two connections for health and heartbeats"
    remedy = "lower DB_POOL_MAX, or raise max_connections or the user's or database's limit"
    if info.pooled:
        yield passed(
            area,
            f"{settings.pool_min} to {settings.pool_max} connections and two for health and"
            f" heartbeats, to a pooler; its pool size decides how many of the {usable} that the"
            f" server allows it opens; {in_use} of {limit} are in use",
        )
    elif needed > usable:
        yield failed(area, f"{pool} are more than the {usable} that the server allows", remedy)
    elif 2 * needed > usable:
        yield warned(
            area,
            f"{pool} are more than half of the {usable} that the server allows: a second instance"
            " does not fit, as while a new version is rolled out",
            remedy,
        )
    elif in_use + needed > limit:
        yield warned(
            area,
            f"{pool} exceed the free ones: {in_use} of {limit} are in use",
            "count the instances and other clients of this server, then " + remedy,
        )
    else:
        yield passed(
            area,
            f"{settings.pool_min} to {settings.pool_max} connections and two for health and"
            f" heartbeats, of {usable} that the server allows; {in_use} of {limit} are in use",
        )


MAX_QUERY_SECONDS = 5.0
"""Limit for connecting and for each step of the queries, below that of the configuration."""

_VARIABLES = {
    "auth": "DATABASE_URL, DB_PASSWORD",
    "too_many_connections": "",  # these two remedies name their variables
    "tls": "",
    "pooler_mode": "",
}


class PostgresDoctor:
    """Connects once, as the service would, and reports problems and risks.

    ``production`` adds findings that matter only there. ``migrator``, if it is given, has the
    address for migrations. ``find_callable`` returns the application's callable for the password.
    """

    def __init__(
        self,
        config: PostgresConfig,
        *,
        production: bool,
        migrator: PostgresConfig | None = None,
        find_callable: Callable[[], Awaitable[CredentialsCallable | None]] | None = None,
    ) -> None:
        self._config = config
        self._production = production
        self._migrator = migrator
        self._find_callable = find_callable

    async def check(self) -> Sequence[Finding]:
        """Connect and query the server once; return the findings."""
        config, migrator = self._config, self._migrator
        if self._find_callable is not None:
            config = replace(config, ask_password=await self._find_callable())
        # At the same time, because each may take all of the time that there is.
        configs = [config] if migrator is None else [config, migrator]
        others = asyncio.ensure_future(_each_host(config))
        results = await asyncio.gather(*map(self._query, configs), return_exceptions=True)
        hosts = await others
        if isinstance(results[0], BaseException):
            return self._unreachable(_explained(config, results[0]))
        findings = [*judge(results[0], config, production=self._production), *hosts]
        if isinstance(results[-1], BaseException):
            return [*findings, replace(_explained(configs[-1], results[-1]), area=Area.MIGRATIONS)]
        if migrator is not None:
            findings += unreadable(results[0].schema, config.settings.schema)
        if migrator is not None and results[-1].pooled:
            findings.append(_misdirected(migrator))
        return [*findings, *judge_schema(results[-1].schema, config.settings.schema)]

    async def _query(self, config: PostgresConfig) -> ServerInfo:
        limit = min(config.settings.connection_timeout, MAX_QUERY_SECONDS)
        limited = msgspec.structs.replace(config.settings, connection_timeout=limit)
        connector = Connector(replace(config, settings=limited))
        async with _connected(connector) as connection:
            async with asyncio.timeout(MAX_QUERY_SECONDS):
                info: ServerInfo = await run_limited(
                    connection, lambda: query_server(connection, limited.schema)
                )
            if info.pooled:
                info = replace(info, shared=await is_process_shared(connector, connection, limit))
            return info

    def _unreachable(self, finding: Finding) -> Sequence[Finding]:
        reason = "the database could not be queried"
        return [finding, skipped(Area.POOL, reason), skipped(Area.MIGRATIONS, reason)]


@contextlib.asynccontextmanager
async def _connected(connector: Connector) -> AsyncIterator[ServerConnection]:
    connection = await connector.connect(purpose="doctor")
    try:
        yield connection
    finally:
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await asyncio.shield(connection.close(timeout=1))


async def _each_host(config: PostgresConfig) -> Sequence[Finding]:
    """Return a warning for each of several hosts that could not take over."""
    address = config.address
    if len(address.hosts) == 1:
        return ()
    limit = min(config.settings.connection_timeout, MAX_QUERY_SECONDS)
    settings = msgspec.structs.replace(config.settings, connection_timeout=limit)

    async def one(host: tuple[str, int]) -> Finding | None:
        alone = replace(address, hosts=(host,), target_session_attrs="any")
        try:
            # Without the file of the address, which would bring all hosts back.
            connector = Connector(replace(config, address=alone, settings=settings, url=None))
            async with _connected(connector):
                return None
        except (*DATABASE_ERRORS, CertificateError) as error:
            explained = explain(error)
            found = f"the host {host[0]}:{host[1]} {explained.problem}"
            return warned(Area.DATABASE, found, _remedy(explained, config.url_variable))

    return [found for found in await asyncio.gather(*map(one, address.hosts)) if found is not None]


def _explained(config: PostgresConfig, error: BaseException) -> Finding:
    if isinstance(error, CertificateError):
        return failed(Area.DATABASE, str(error), f"correct the file of {error.variable}")
    explained = explain(error)
    problem, remedy = explained.problem, _remedy(explained, config.url_variable)
    if isinstance(error, TimeoutError):
        problem += f" within {min(config.settings.connection_timeout, MAX_QUERY_SECONDS):g} s"
        remedy = f"check the server, the network and how busy both are ({config.url_variable})"
    return failed(Area.DATABASE, f"the database at {config.address} {problem}", remedy)


def _misdirected(config: PostgresConfig) -> Finding:
    return warned(
        Area.MIGRATIONS,
        f"a pooler answers at {config.url_variable}, which should lead past it",
        "name the server",
    )


def _remedy(explained: ErrorExplanation, variable: str) -> str:
    if explained.code == "error":
        return "check the server's log"
    variables = _VARIABLES.get(explained.code, variable)
    return f"{explained.remedy} ({variables})" if variables else explained.remedy
