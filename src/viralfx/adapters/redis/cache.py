"""The cache in Redis: shared by all instances, and a miss while Redis is away."""

import functools
from typing import cast

from viralfx.adapters.redis.client import RedisClient
from viralfx.domain.resilience.quantities import require_positive

PREFIX = "viralfx:cache:"


class RedisCacheStore:
    """Keeps each value under a key of its own, which Redis itself lets expire."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client

    async def get(self, key: str) -> bytes | None:
        """Return the value; None while Redis is away."""
        value = await self._client.get_with_graceful_degradation(
            functools.partial(self._client.redis.get, PREFIX + key), None
        )
        return cast("bytes | None", value)  # nothing is decoded

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep a value, to the millisecond; do nothing while Redis is away."""
        require_positive("ttl", ttl)
        milliseconds = max(1, round(ttl * 1000))
        await self._client.get_with_graceful_degradation(
            functools.partial(self._client.redis.set, PREFIX + key, value, px=milliseconds), None
        )

    async def delete(self, key: str) -> None:
        """Forget a value; raises redis-py's error while Redis is away, after the retries."""
        await self._client.redis.delete(PREFIX + key)
