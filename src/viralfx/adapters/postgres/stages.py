"""How Postgres is left."""

import asyncio
import logging

from viralfx.adapters.postgres.database import PostgresDatabase
from viralfx.adapters.postgres.health import PostgresHealthCheck
from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.errors import WorkLostError

_logger = logging.getLogger("viralfx.database")


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
            if await finished_within(closing, budget, self._clock):
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
