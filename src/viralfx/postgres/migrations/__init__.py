"""The migrations: the tables' schema, its version in this code, and its version in a database.

``NNNN_name.sql`` is a migration, and its first line says what it makes. It is plain SQL for the
default schema; ``migrate.py`` puts that of DB_SCHEMA in its place. A released file does not change:
databases have its bodies of functions as they are. ``down/NNNN_name.sql`` takes a migration back,
with the data that it held; no command runs it.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import asyncpg

from viralfx.domain.doctor import Area, Finding, failed, passed, warned

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007")
"""All migrations in order; a test compares them with the files of this folder."""

VERSION_TABLE = "viralfx_migrations"

LOCK_TIMEOUT_SECONDS = 60.0
"""Maximum wait of a migration run for another one."""


_RELATIONS = (
    *("state", "migrations", "jobs", "finished_jobs", "all_jobs", "unknown_tasks", "workers"),
    *("job_counters", "paused_queues", "schedules", "task_limits", "instances", "transitions"),
    "audit_events",
)
"""The tables and the view."""
_FUNCTIONS = (
    *("accept_jobs", "claim_jobs", "choose_by_key", "rate_left", "count_inserted_jobs"),
    *("count_updated_jobs", "count_deleted_jobs", "count_truncated_jobs"),
)
_UNIQUE_INDEXES = ("jobs_key", "jobs_unique")
OBJECTS = (
    *(f"viralfx_{name}" for name in (*_RELATIONS, *_FUNCTIONS, *_UNIQUE_INDEXES)),
    "enqueue",
)
"""Names of the objects that all migrations leave, and that the program needs."""

_NAMES = re.compile(rf"\bviralfx_(?:{'|'.join((*_RELATIONS, *_FUNCTIONS))})\b")
"""The tables, the view and the functions. Indexes and triggers are in the schema of their table."""


def qualified(statement: str, schema: str) -> str:
    """Return a statement with each table, view and function of the program in ``schema``.

    So no statement depends on the search path, which a pooler gives to the next client,
    and which belongs to the application that shares the database.
    """
    return _NAMES.sub(rf'"{schema}".\g<0>', statement)


_MAX_CHANNEL_BYTES = 63


def channel_of(schema: str) -> str:
    """Return the notification channel of the ledger in a schema; a database may have several."""
    channel = f"viralfx_jobs.{schema}"
    if len(channel.encode()) <= _MAX_CHANNEL_BYTES:
        return channel
    return f"viralfx_jobs:{hashlib.sha256(channel.encode()).hexdigest()[:32]}"


class Statements:
    """The statements that modules have as constants, as attributes, qualified for one schema."""

    def __init__(self, schema: str, *modules: ModuleType) -> None:
        for module in modules:
            for name, text in vars(module).items():
                if name.isupper() and not name.startswith("_") and isinstance(text, str):
                    setattr(self, name, qualified(text, schema))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> str: ...


class _Queryable(Protocol):
    async def fetchval(self, query: str, /) -> Any: ...

    async def fetchrow(self, query: str, schema: str, /) -> Any: ...

    async def fetch(self, query: str, names: list[str], schema: str, /) -> Any: ...


class LackingRight(NamedTuple):
    """A right that the user needs for the schema."""

    problem: str
    """A predicate of the user, such as ``may not use the schema``."""
    statement: str
    """The statement that permits it."""


# The catalogs may be read without a right on the schema.
_RIGHTS = """
SELECT quote_ident(current_user) AS role, namespace IS NOT NULL AS exists,
       has_schema_privilege(namespace, 'USAGE') AS usage,
       has_schema_privilege(namespace, 'CREATE') AS creation,
       has_database_privilege(current_database(), 'CREATE') AS may_create_it
  FROM to_regnamespace(quote_ident($1)) AS namespace
"""


async def lacking_right(
    connection: _Queryable, schema: str, *, migrating: bool
) -> LackingRight | None:
    """Return a right that the user lacks to use the tables in ``schema``, or to migrate them."""
    rights = await connection.fetchrow(_RIGHTS, schema)
    role = rights["role"]
    if not rights["exists"]:
        if not migrating or rights["may_create_it"]:
            return None
        statement = f'CREATE SCHEMA "{schema}" AUTHORIZATION {role}'
        return LackingRight(f"may not create the schema {schema}", statement)
    if rights["usage"] and (rights["creation"] or not migrating):
        return None
    needed = "USAGE, CREATE" if migrating else "USAGE"
    problem = "create tables in" if rights["usage"] else "use"
    statement = f'GRANT {needed} ON SCHEMA "{schema}" TO {role}'
    return LackingRight(f"may not {problem} the schema {schema}", statement)


async def current_revision(connection: _Queryable, schema: str) -> str | None:
    """Return the last applied migration of the tables in ``schema``; None if there is none."""
    table = qualified(VERSION_TABLE, schema)
    if await connection.fetchval(f"SELECT to_regclass('{table}')::text") is None:
        return None
    revision: str | None = await connection.fetchval(f"SELECT version_num FROM {table}")  # noqa: S608 - a constant
    return revision


# The catalogs may be read without a right on the schema, and without waiting for a lock.
_MISSING = """
SELECT name
  FROM unnest($1::text[]) WITH ORDINALITY AS object (name, place),
       to_regnamespace(quote_ident($2)) AS namespace
 WHERE NOT EXISTS (SELECT FROM pg_class WHERE relname = name AND relnamespace = namespace)
   AND NOT EXISTS (SELECT FROM pg_proc WHERE proname = name AND pronamespace = namespace)
 ORDER BY place
"""


async def missing_objects(connection: _Queryable, schema: str) -> tuple[str, ...]:
    """Return the :data:`OBJECTS` that are not in ``schema``, which has the last migration."""
    rows = await connection.fetch(_MISSING, list(OBJECTS), schema)
    return tuple(str(name) for (name,) in rows)


def missing_after(revision: str | None) -> tuple[str, ...]:
    """Return the migrations that this code needs and a database at ``revision`` lacks.

    An unknown revision is a later one, made by a newer version of the service; the previous version
    can use its schema.
    """
    if revision is None:
        return REVISIONS
    if is_later(revision):
        return ()
    return REVISIONS[REVISIONS.index(revision) + 1 :]


def is_later(revision: str | None) -> bool:
    """Return True if a later version of the service made the revision."""
    return revision is not None and revision not in REVISIONS


# -- the diagnosis -------------------------------------------------------------------------------

_LOCK_MILLISECONDS = 2000
_VERSIONS = """
SELECT coalesce(has_table_privilege(to_regclass($1), 'SELECT'), true)
"""
_OTHER_OWNERS = r"""
SELECT DISTINCT pg_get_userbyid(relowner)
  FROM pg_class
 WHERE relname LIKE 'viralfx\_%' AND relnamespace = to_regnamespace(quote_ident($1))
   AND NOT pg_has_role(relowner, 'USAGE')
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfo:
    """The tables of a schema, as ``viralfx doctor`` sees them."""

    lacking_right: LackingRight | None = None
    """A right that the user lacks on the schema; for pending migrations, to apply them too."""
    other_owners: tuple[str, ...] = ()
    """Other users that own tables of the service, if migrations are pending."""
    may_read_versions: bool = True
    revision: str | None = None
    """The last migration; None if there is none, or it could not be read."""
    locked: bool = False
    """True if another session locks the table of the migrations."""
    missing: tuple[str, ...] = ()
    """Names of :data:`OBJECTS` that are missing although all migrations were applied."""


async def query_schema(connection: "asyncpg.Connection[Any]", schema: str) -> SchemaInfo:
    """Query the server about the tables in ``schema``; raises the driver's errors."""
    right = await lacking_right(connection, schema, migrating=False)
    version_table = qualified(VERSION_TABLE, schema)
    if right is not None or not await connection.fetchval(_VERSIONS, version_table):
        return SchemaInfo(lacking_right=right, may_read_versions=False)
    try:
        # A transaction, since a pooler would give a setting of the session to another client.
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = {_LOCK_MILLISECONDS}")
            revision = await current_revision(connection, schema)
    except asyncpg.LockNotAvailableError:
        return SchemaInfo(locked=True)
    if revision == REVISIONS[-1]:
        return SchemaInfo(revision=revision, missing=await missing_objects(connection, schema))
    if not missing_after(revision):
        return SchemaInfo(revision=revision)
    others = await connection.fetch(_OTHER_OWNERS, schema)
    return SchemaInfo(
        revision=revision,
        lacking_right=await lacking_right(connection, schema, migrating=True),
        other_owners=tuple(name for (name,) in others),
    )


def unreadable(info: SchemaInfo, schema: str) -> Iterator[Finding]:
    """Yield a failure if the user may not read which migrations were applied."""
    area, right = Area.MIGRATIONS, info.lacking_right
    if info.may_read_versions:
        return
    if right is not None:
        yield failed(area, f"the user {right.problem}", f"run `{right.statement}`")
    else:
        yield failed(
            area,
            f"the user may not read the table {schema}.{VERSION_TABLE}",
            f"grant SELECT on {schema}.{VERSION_TABLE} to the user of DATABASE_URL",
        )


def judge_schema(info: SchemaInfo, schema: str) -> Iterator[Finding]:
    """Yield the findings on the tables and on their migrations."""
    area, right, pending = Area.MIGRATIONS, info.lacking_right, missing_after(info.revision)
    if info.locked:
        yield warned(
            area,
            f"another session locks the table {schema}.{VERSION_TABLE}, as a migration does",
            "run this again when it has ended",
        )
    elif not info.may_read_versions:
        yield from unreadable(info, schema)
    elif info.missing:
        yield failed(
            area,
            f"the schema is at {info.revision}, but without {', '.join(info.missing)}",
            f"restore {schema} from a backup; or drop it with all jobs, and run `viralfx migrate`",
        )
    elif pending:
        names = ", ".join(pending)
        yield failed(area, f"the schema is behind: {names} pending", "run `viralfx migrate`")
        if right is not None:
            yield failed(
                area,
                f"the user {right.problem}, so `viralfx migrate` would fail",
                f"run `{right.statement}`, or migrate as another user",
            )
        for owner in info.other_owners:
            yield failed(
                area,
                f"tables of the service belong to {owner}, so `viralfx migrate` would fail",
                f"migrate as {owner}",
            )
    elif is_later(info.revision):
        yield warned(
            area,
            f"the schema is at {info.revision}, made by a later version of the service",
            "deploy that version or a later one; this version can use the schema",
        )
    else:
        yield passed(area, f"the schema is current at {info.revision}")
