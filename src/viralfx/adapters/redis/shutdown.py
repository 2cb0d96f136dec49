"""The shutdown stage of Redis."""

from viralfx.adapters.redis.client import RedisClient

MAX_WAIT_SECONDS = 2.0
"""Seconds that requests in flight get to finish; a server that answers needs less."""


async def close_redis(client: RedisClient, budget: float) -> None:
    """Close every connection, including those of the health check and the sentinels.

    Requests in flight get 2 s, or half the budget if that is less; then they are cut. Later
    requests fail at once, with an error that is not retried.
    """
    await client.close(min(MAX_WAIT_SECONDS, budget / 2))
