"""The checks of the embedded default, which stand for those of Postgres and Redis."""

from viralfx.core.clock import Clock, timestamp
from viralfx.domain.health.model import Observation, Status


class MemoryDatabase:
    """Health check that stands for the database check; it always passes.

    Every count is zero, since there is neither a connection nor a pool.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def check(self) -> Observation:
        """Pass, with the same fields as the Postgres check."""
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
                    "waitingRequests": 0,
                    "slowQueries": 0,
                    "failedConnections": 0,
                    "lastHealthCheck": timestamp(self._clock.now()),
                },
                "poolConfig": {"min": 0, "max": 0, "timeout": 0},
            },
        )


class MemoryRedis:
    """Health check that stands for the Redis check; it always passes and counts its own calls."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._requests = 0

    async def check(self) -> Observation:
        """Pass, with the same fields as the Redis check."""
        self._requests += 1
        return Observation(
            status=Status.PASS,
            message="Redis is in memory: its data ends with this process",
            details={
                "adapter": "memory",
                "isConnected": True,
                "stats": {
                    "isConnected": True,
                    "lastHealthCheck": timestamp(self._clock.now()),
                    "failedAttempts": 0,
                    "totalRequests": self._requests,
                    "successfulRequests": self._requests,
                    "failedRequests": 0,
                },
                "config": {"host": "memory", "port": 0, "db": 0},
            },
        )
