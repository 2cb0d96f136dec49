"""The migrations: the tables' schema, its version in this code, and its version in a database."""

import hashlib
import re
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006")
"""All migrations in order; a test compares them with the files of this folder."""

VERSION_TABLE = "viralfx_migrations"

LOCK_TIMEOUT_SECONDS = 60.0
"""Maximum wait of a migration run for another one."""


_NAMES = re.compile(
    r"\bviralfx_(?:state|migrations|jobs|finished_jobs|all_jobs|unknown_tasks|workers|job_counters"
    r"|paused_queues|schedules|task_limits|instances|transitions"
    r"|accept_jobs|claim_jobs|choose_by_key|rate_left"
    r"|count_(?:inserted|updated|deleted|truncated)_jobs)\b"
)
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
