"""The cache in a real Redis that becomes unavailable and returns."""

import asyncio
import time

import pytest
from redis import exceptions
from tests.integration.redis_clients import QUICK, check_of, opened
from tests.servers.redis import RedisServer
from tests.servers.waiting import wait_for_code

from viralfx.adapters.redis import RedisCacheStore
from viralfx.domain.cache import Cache

pytestmark = pytest.mark.timeout(60)


async def test_keys_have_a_prefix_and_an_expiry(redis: RedisServer) -> None:
    """Operators can identify them, and none stays forever."""
    async with opened(redis) as client:
        await RedisCacheStore(client).set("user:1", b"value", 1.5)

    assert redis.command("KEYS", "*") == ["viralfx:cache:user:1"]
    assert 0 < redis.command("PTTL", "viralfx:cache:user:1") <= 1500


@pytest.mark.parametrize("loss", ["frozen", "killed"])
async def test_reads_continue_without_redis(own_redis: RedisServer, loss: str) -> None:
    """The loader provides the value, without delay once the outage is known.

    Later the cache does.
    """
    calls = 0

    async def load() -> bytes:
        nonlocal calls
        calls += 1
        return b"%d" % calls

    async with opened(own_redis, **QUICK) as client:
        cache = Cache(RedisCacheStore(client))
        assert [await cache.get_or_load("k", 60.0, load) for _ in range(2)] == [b"1", b"1"]
        await asyncio.to_thread(own_redis.freeze if loss == "frozen" else own_redis.kill)
        assert await cache.get_or_load("k", 60.0, load) == b"2"
        took = []
        for number in range(3, 8):
            began = time.monotonic()
            assert await cache.get_or_load("k", 60.0, load) == b"%d" % number
            took.append(time.monotonic() - began)
        await asyncio.to_thread(own_redis.thaw if loss == "frozen" else own_redis.start)
        await wait_for_code(check_of(client), None)
        back = [await cache.get_or_load("k", 60.0, load) for _ in range(2)]

    assert min(took) < 0.1
    # Earlier values are available again after a freeze, but lost with a killed server.
    assert back == ([b"1", b"1"] if loss == "frozen" else [b"8", b"8"])


async def test_flushall_is_a_miss(redis: RedisServer) -> None:
    """No copy of a deleted value is kept."""
    async with opened(redis) as client:
        store = RedisCacheStore(client)
        await store.set("k", b"v", 60.0)
        redis.flush()

        assert await store.get("k") is None


async def test_failed_delete_raises(own_redis: RedisServer) -> None:
    """Otherwise Redis would return the value later."""
    async with opened(own_redis, **QUICK) as client:
        store = RedisCacheStore(client)
        await store.set("k", b"v", 60.0)
        await asyncio.to_thread(own_redis.kill)

        with pytest.raises(exceptions.ConnectionError):
            await store.delete("k")
