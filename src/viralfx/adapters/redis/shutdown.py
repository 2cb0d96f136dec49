"""How Redis is left: after those who use it, without waiting for a server that hangs."""

from viralfx.adapters.redis.client import RedisClient

_PATIENCE = 2.0
"""Seconds that requests still under way get; a server that answers at all needs none of them."""


class CloseRedis:
    """Shutdown stage: closes every connection, the health check's and the sentinels' included."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client

    async def run(self, budget: float) -> None:
        """Close; what is still under way is cut after 2 s, or half the budget where that is less.

        Later requests fail at once, with an error that is not retried.
        """
        await self._client.close(min(_PATIENCE, budget / 2))
