"""What a server says about itself, and what follows from it for a service that is to use it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from asyncpg.connection import Connection

from viralfx.adapters.postgres.config import PostgresConfig
from viralfx.adapters.postgres.schema import VERSION_TABLE, current_revision
from viralfx.domain.diagnosis import Area, Finding, failed, passed, warned

OLDEST = 14
"""The first major version that is new enough: those before it get no corrections any more."""

RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")

# Every user may ask these. Durations are milliseconds; a limit of -1, and a time of 0, are none.
_SERVER = """
SELECT current_setting('server_version') AS version,
       current_setting('server_version_num')::int / 10000 AS major,
       current_setting('server_encoding') AS encoding,
       pg_is_in_recovery() AS replica,
       current_setting('default_transaction_read_only')::bool AS read_only,
       (SELECT version FROM pg_stat_ssl WHERE ssl AND pid = pg_backend_pid()) AS tls,
       current_setting('max_connections')::int AS max_connections,
       current_setting('superuser_reserved_connections')::int
         + coalesce(current_setting('reserved_connections', true)::int, 0) AS reserved,
       (SELECT sum(numbackends)::int - 1 FROM pg_stat_database) AS in_use,
       rolsuper AS superuser,
       rolconnlimit AS user_limit,
       (SELECT datconnlimit FROM pg_database WHERE datname = current_database())
         AS database_limit,
       (SELECT setting::bigint FROM pg_settings WHERE name = 'statement_timeout')
         AS statement_timeout,
       (SELECT setting::bigint FROM pg_settings WHERE name = 'transaction_timeout')
         AS transaction_timeout,
       (SELECT setting::bigint FROM pg_settings WHERE name = 'idle_session_timeout')
         AS idle_session_timeout,
       current_schema() AS schema,
       coalesce(has_schema_privilege(current_schema(), 'CREATE'), false) AS may_create
  FROM pg_roles WHERE rolname = current_user
"""
_VERSIONS = """
SELECT coalesce(has_table_privilege(to_regclass($1), 'SELECT'), true)
"""
_WITHOUT_RIGHTS = r"""
SELECT relname, array_agg(lacking ORDER BY lacking)
  FROM pg_class, unnest($1::text[]) AS lacking
 WHERE relkind IN ('r', 'p') AND relname LIKE 'viralfx\_%' AND relname <> $2
   AND pg_table_is_visible(pg_class.oid) AND NOT has_table_privilege(pg_class.oid, lacking)
 GROUP BY relname ORDER BY relname
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was asked. Durations are milliseconds as the server has them; 0 or None: no limit."""

    version: str
    major: int
    encoding: str = "UTF8"
    replica: bool = False
    read_only: bool = False
    """Whether transactions are read-only unless they say otherwise."""
    tls: str | None = None
    """The version of TLS that is spoken."""
    max_connections: int = 100
    reserved: int = 3
    """Connections of those that ordinary users do not get."""
    in_use: int = 0
    superuser: bool = False
    user_limit: int = -1
    database_limit: int = -1
    statement_timeout: int = 0
    transaction_timeout: int | None = None
    idle_session_timeout: int | None = None
    schema: str | None = "public"
    """Where new tables go."""
    may_create: bool = True
    may_read_versions: bool = True
    revision: str | None = None
    """The last migration; None where there was none, or where it may not be read."""
    lacking: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Tables of ours, and the rights that the user does not have on them."""

    @property
    def usable(self) -> int:
        """How many connections this user can have at most."""
        limits = [self.max_connections - self.reserved]
        limits += [n for n in (self.user_limit, self.database_limit) if n >= 0]
        return max(0, min(limits))


async def ask(connection: "Connection[Any]") -> Facts:
    """Ask the server; raises what the driver does."""
    server = await connection.fetchrow(_SERVER)
    assert server is not None  # noqa: S101 - the current user exists
    may_read = bool(await connection.fetchval(_VERSIONS, VERSION_TABLE))
    lacking = await connection.fetch(_WITHOUT_RIGHTS, list(RIGHTS), VERSION_TABLE)
    return Facts(
        **dict(server),
        may_read_versions=may_read,
        revision=await current_revision(connection) if may_read else None,
        lacking=tuple((table, tuple(rights)) for table, rights in lacking),
    )


def judge(facts: Facts, config: PostgresConfig, *, production: bool) -> Iterator[Finding]:
    """Say what is wrong with the server for this configuration, or that nothing is."""
    yield from _server(facts, config)
    yield from _rights(facts, production=production)
    yield from _limits_of_time(facts, config)
    yield from _pool(facts, config)


def _server(facts: Facts, config: PostgresConfig) -> Iterator[Finding]:
    area = Area.DATABASE
    how = f"over {facts.tls}" if facts.tls else "in plain text"
    yield passed(area, f"PostgreSQL {facts.version} at {config.address} answers {how}")
    if facts.major < OLDEST:
        yield failed(
            area,
            f"PostgreSQL {facts.version} is too old",
            f"upgrade the server to version {OLDEST} or later",
        )
    if facts.replica:
        yield failed(
            area,
            f"the database at {config.address} is a replica that accepts no writes",
            "name the primary in DATABASE_URL",
        )
    elif facts.read_only:
        yield failed(
            area,
            "default_transaction_read_only is on: nothing can be written",
            "turn it off for the user or database of DATABASE_URL",
        )
    if facts.encoding != "UTF8":
        yield warned(
            area,
            f"the database is encoded in {facts.encoding}: texts that it cannot hold are refused",
            "create it with ENCODING 'UTF8'",
        )


def _rights(facts: Facts, *, production: bool) -> Iterator[Finding]:
    area = Area.DATABASE
    if facts.schema is None:
        yield failed(
            area,
            "no schema of the search path exists that this user may use",
            "create it, or grant USAGE on it, or name another one by schema= in DATABASE_URL",
        )
    for table, rights in facts.lacking:
        yield failed(
            area,
            f"the user may not {', '.join(rights)} on the table {table}",
            f"grant {', '.join(rights)} on {table} to the user of DATABASE_URL",
        )
    if production and facts.superuser:
        yield warned(
            area,
            "the user is a superuser, and may do everything to everybody's data",
            "create a user for this service, and name it in DATABASE_URL",
        )


def _limits_of_time(facts: Facts, config: PostgresConfig) -> Iterator[Finding]:
    area, ours = Area.DATABASE, round(config.statement_timeout * 1000)
    if facts.statement_timeout != ours:
        yield warned(
            area,
            f"the server cancels statements after {facts.statement_timeout} ms, by a"
            f" statement_timeout of its own, and not after DB_STATEMENT_TIMEOUT={ours}",
            "set DB_STATEMENT_TIMEOUT to what is meant",
        )
    if facts.transaction_timeout and (not ours or facts.transaction_timeout < ours):
        yield warned(
            area,
            f"the server's transaction_timeout ends connections after"
            f" {facts.transaction_timeout} ms, before DB_STATEMENT_TIMEOUT={ours} can",
            "lower DB_STATEMENT_TIMEOUT, or raise transaction_timeout for this user",
        )
    if facts.idle_session_timeout:
        yield warned(
            area,
            f"the server's idle_session_timeout ends the pool's idle connections after"
            f" {facts.idle_session_timeout} ms",
            "set idle_session_timeout to 0 for the user of DATABASE_URL",
        )


def _pool(facts: Facts, config: PostgresConfig) -> Iterator[Finding]:
    # Beside the pool: one for health and, where jobs are worked on, one for heartbeats.
    area, needed, usable = Area.POOL, config.pool_max + 2, facts.usable
    pool = f"DB_POOL_MAX={config.pool_max} and two connections for health and heartbeats"
    remedy = "lower DB_POOL_MAX, or raise max_connections or the user's or database's limit"
    if needed > usable:
        yield failed(area, f"{pool} are more than the {usable} that the server allows", remedy)
    elif 2 * needed > usable:
        yield warned(
            area,
            f"{pool} are more than half of the {usable} that the server allows: a second instance"
            " does not fit, as while a new version is rolled out",
            remedy,
        )
    elif facts.in_use + needed > usable:
        yield warned(
            area,
            f"{pool} are more than what is left: {facts.in_use} of {usable} are in use",
            "count the instances and others who use this server, then " + remedy,
        )
    else:
        yield passed(
            area,
            f"{config.pool_min} to {config.pool_max} connections and two for health and heartbeats,"
            f" of {usable} that the server allows; {facts.in_use} are in use",
        )
