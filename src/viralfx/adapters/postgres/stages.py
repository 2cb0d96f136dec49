"""How Postgres is left."""

import asyncio
import logging

from viralfx.adapters.postgres.database import PostgresDatabase
from viralfx.adapters.postgres.health import PostgresHealthCheck
from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.errors import WorkLostError

_logger = logging.getLogger("viralfx.database")

_LEAVE = 1.0
"""Seconds for connections that nobody uses to be closed in order."""


class ClosePostgres:
    """Closes the pool when its connections were given back, and cuts it when they are not."""

    def __init__(
        self, database: PostgresDatabase, check: PostgresHealthCheck, clock: Clock
    ) -> None:
        self._database = database
        self._check = check
        self._clock = clock

    async def run(self, budget: float) -> None:
        """Close within the budget; raises :class:`WorkLostError` when somebody was cut."""
        await self._check.close()
        closing = asyncio.ensure_future(self._database.close())
        try:
            # Those who use a connection get the time there is. Idle ones only take their leave.
            patience = budget if self._database.in_use else min(budget, _LEAVE)
            if await finished_within(closing, patience, self._clock):
                await closing
                return
        except BaseException:
            self._database.terminate()
            closing.cancel()
            raise
        in_use = self._database.in_use
        self._database.terminate()
        closing.cancel()
        if in_use:
            raise WorkLostError(f"{in_use} database connections were still in use and were cut")
        # Nothing is lost with a server that does not take leave.
        _logger.warning("Database connections cut: the server does not answer")
