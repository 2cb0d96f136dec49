"""The database of the embedded default: none, and it says so."""

from viralfx.domain.clock import Clock, timestamp
from viralfx.domain.health import Observation, Status


class MemoryDatabase:
    """Health check of a database that is this process's memory.

    There is nothing to lose contact with and no pool, so every count is a truthful zero.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def check(self) -> Observation:
        """Pass, with the fields a pooled database has."""
        return Observation(
            status=Status.PASS,
            message="Database is in memory: its data ends with this process",
            details={
                "adapter": "memory",
                "isConnected": True,
                "stats": {
                    "totalConnections": 0,
                    "activeConnections": 0,
                    "idleConnections": 0,
                    "failedConnections": 0,
                    "lastHealthCheck": timestamp(self._clock.now()),
                },
                "poolConfig": {"min": 0, "max": 0, "timeout": 0},
            },
        )
