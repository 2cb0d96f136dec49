"""Saved state in Postgres: one row for each instance."""

import asyncio
import logging

import asyncpg
import msgspec

from viralfx.domain.operations import SavedState
from viralfx.postgres.database import Lease, PostgresDatabase
from viralfx.postgres.errors import DATABASE_ERRORS
from viralfx.postgres.migrations import qualified

_logger = logging.getLogger("viralfx.state")

_LOAD = """
SELECT state FROM viralfx_state ORDER BY (instance = $1) DESC, saved_at DESC LIMIT 1
"""
_SAVE = """
INSERT INTO viralfx_state (instance, saved_at, state) VALUES ($1, now(), $2::json)
ON CONFLICT (instance) DO UPDATE SET saved_at = excluded.saved_at, state = excluded.state
"""
_LOAD_TIMEOUT = 5.0
"""Seconds that a start waits for the saved state."""
_PRUNE = "DELETE FROM viralfx_state WHERE saved_at < now() - interval '30 days'"


class PostgresStateStore:
    """Keeps each instance's state; a new instance loads the state that was saved last.

    Pods get new names with every roll-out, so state by instance alone would never be loaded.
    """

    def __init__(self, database: PostgresDatabase, instance: str) -> None:
        self._database = database
        self._instance = instance
        schema = database.config.settings.schema
        self._load = qualified(_LOAD, schema)
        self._save, self._prune = qualified(_SAVE, schema), qualified(_PRUNE, schema)

    async def load(self) -> SavedState | None:
        """Load the state; an unavailable or invalid one is logged and counts as None."""
        try:
            async with asyncio.timeout(_LOAD_TIMEOUT), self._database.acquire() as connection:
                content = await connection.fetchval(self._load, self._instance)
        except asyncpg.UndefinedTableError:
            return None  # before the first migration; the health check reports that
        except DATABASE_ERRORS as error:
            # Starting without the saved state is better than not starting.
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
        """Replace this instance's row; raises the driver's errors."""
        content = msgspec.json.encode(state).decode()

        async def write(connection: Lease) -> None:
            await connection.execute(self._save, self._instance, content)
            await connection.execute(self._prune)

        try:
            await self._database.execute_with_retry(write, idempotent=True)
        except asyncpg.UndefinedTableError:
            _logger.warning("State is not saved: the database has not been migrated")
