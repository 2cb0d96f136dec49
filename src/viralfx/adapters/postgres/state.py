"""Saved state in Postgres: one row for each instance."""

import asyncio
import logging

import asyncpg
import msgspec

from viralfx.adapters.postgres.cleaning import Lease
from viralfx.adapters.postgres.database import PostgresDatabase
from viralfx.domain.state import SavedState

_logger = logging.getLogger("viralfx.state")

_LOAD = """
SELECT state FROM viralfx_state ORDER BY (instance = $1) DESC, saved_at DESC LIMIT 1
"""
_SAVE = """
INSERT INTO viralfx_state (instance, saved_at, state) VALUES ($1, now(), $2::json)
ON CONFLICT (instance) DO UPDATE SET saved_at = excluded.saved_at, state = excluded.state
"""
_PATIENCE = 5.0
"""Seconds that a start waits for what was saved."""
_PRUNE = "DELETE FROM viralfx_state WHERE saved_at < now() - interval '30 days'"


class PostgresStateStore:
    """Keeps each instance's state; a new instance continues from the one that saved last.

    Pods get new names with every roll-out, so a store by name alone would never be read again.
    """

    def __init__(self, database: PostgresDatabase, instance: str) -> None:
        self._database = database
        self._instance = instance

    async def load(self) -> SavedState | None:
        """Read the state; one that cannot be had or understood is logged and counts as none."""
        try:
            async with asyncio.timeout(_PATIENCE), self._database.acquire() as connection:
                content = await connection.fetchval(_LOAD, self._instance)
        except asyncpg.UndefinedTableError:
            return None  # before the first migration, which the check tells of
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            # What was saved is worth less than a service that starts.
            _logger.warning("Saved state cannot be read", exc_info=error)
            return None
        if content is None:
            return None
        try:
            return msgspec.json.decode(content, type=SavedState)
        except msgspec.DecodeError:
            _logger.warning("Saved state is unreadable and is not used")
            return None

    async def save(self, state: SavedState) -> None:
        """Replace this instance's row; raises what the driver does when it cannot."""
        content = msgspec.json.encode(state).decode()

        async def write(connection: Lease) -> None:
            await connection.execute(_SAVE, self._instance, content)
            await connection.execute(_PRUNE)

        try:
            await self._database.execute_with_retry(write, idempotent=True)
        except asyncpg.UndefinedTableError:
            _logger.warning("State is not saved: the database has not been migrated")
