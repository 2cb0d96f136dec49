"""The cache in Redis: shared by all instances; a miss while Redis is unavailable."""

import functools
from typing import cast

from viralfx.adapters.redis.client import RedisClient
from viralfx.core.errors import require_positive

PREFIX = "viralfx:cache:"


class RedisCacheStore:
    """Keeps each value under a key of its own, which Redis expires."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client

    async def get(self, key: str) -> bytes | None:
        """Return the value; None if there is none or Redis is unavailable."""
        value = await self._client.get_with_graceful_degradation(
            functools.partial(self._client.redis.get, PREFIX + key), None
        )
        return cast("bytes | None", value)  # the client does not decode replies

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Store a value for ``ttl`` seconds; do nothing while Redis is unavailable."""
        require_positive("ttl", ttl)
        milliseconds = max(1, round(ttl * 1000))
        await self._client.get_with_graceful_degradation(
            functools.partial(self._client.redis.set, PREFIX + key, value, px=milliseconds), None
        )

    async def delete(self, key: str) -> None:
        """Delete a value; raises redis-py's error, after retries, if Redis is unavailable."""
        await self._client.redis.delete(PREFIX + key)
