"""Which version of the schema this code needs, and which the database has."""

from typing import Any, Protocol

REVISIONS = ("0001", "0002")
"""Every migration in order; a test holds it to the files in ``migrations/versions``."""

VERSION_TABLE = "viralfx_migrations"

LOCK_PATIENCE = 60.0
"""Seconds for which one run of the migrations waits for another."""


class _Queryable(Protocol):
    async def fetchval(self, query: str, /) -> Any: ...


async def current_revision(connection: _Queryable) -> str | None:
    """Return the last migration that was applied; None when there was none."""
    found: object = await connection.fetchval(f"SELECT to_regclass('{VERSION_TABLE}')::text")
    if found is None:
        return None
    revision: str | None = await connection.fetchval(f"SELECT version_num FROM {VERSION_TABLE}")  # noqa: S608 - a constant
    return revision


async def pending_migrations(connection: _Queryable) -> tuple[str, ...]:
    """Return the migrations that this code needs and the database lacks."""
    return missing_after(await current_revision(connection))


def missing_after(revision: str | None) -> tuple[str, ...]:
    """Return the migrations that this code needs, and a database at ``revision`` lacks.

    A revision that this code does not know is a later one: a newer version of the service made it,
    and migrations stay usable by the version before.
    """
    if revision is None:
        return REVISIONS
    if is_later(revision):
        return ()
    return REVISIONS[REVISIONS.index(revision) + 1 :]


def is_later(revision: str | None) -> bool:
    """Whether a later version of the service made it."""
    return revision is not None and revision not in REVISIONS
