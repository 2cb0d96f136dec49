"""The Redis of the embedded default: none, and it says so."""

from viralfx.domain.clock import Clock, timestamp
from viralfx.domain.health import Observation, Status


class MemoryRedis:
    """Health check of a cache that is this process's memory; its only requests are these checks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._requests = 0

    async def check(self) -> Observation:
        """Pass, with the fields a Redis client has."""
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
