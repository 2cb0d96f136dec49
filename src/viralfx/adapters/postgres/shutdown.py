"""The shutdown stage of Postgres."""

import asyncio
import logging
from typing import Protocol

from viralfx.core.clock import Clock, finished_within
from viralfx.core.errors import WorkLostError
from viralfx.postgres.connections import CANCEL_SECONDS
from viralfx.postgres.database import PostgresDatabase

_logger = logging.getLogger("viralfx.database")


class Closable(Protocol):
    """A part that closes at once."""

    async def close(self) -> None:
        """Close it."""


MAX_IDLE_CLOSE_SECONDS = 1.0
"""Seconds for an orderly close of connections that are not in use."""


async def close_postgres(
    database: PostgresDatabase, check: Closable, clock: Clock, budget: float
) -> None:
    """Close the check's connection and the pool within ``budget`` seconds.

    Before their end, connections that are still in use are cut, and their statements cancelled in
    the server. Raises :class:`WorkLostError` if there were any.
    """
    # The server needs a moment of the budget for the cancel requests.
    cancelling = min(CANCEL_SECONDS, budget / 4)
    await check.close()
    closing = asyncio.ensure_future(database.close())
    try:
        # A connection in use gets the whole budget; idle ones only need an orderly close.
        limit = budget - cancelling if database.in_use else min(budget, MAX_IDLE_CLOSE_SECONDS)
        if await finished_within(closing, limit, clock):
            await closing
            return
    except BaseException:
        database.terminate()
        closing.cancel()
        raise
    in_use = database.in_use
    await database.cut(cancelling)
    closing.cancel()
    if in_use:
        raise WorkLostError(f"{in_use} database connections were still in use and were cut")
    # No work is lost when the server does not confirm the close.
    _logger.warning("Database connections cut: the server does not answer")
