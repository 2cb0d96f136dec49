"""The contract of ``CacheStore``, run against every adapter.

A new adapter adds a row to ``ADAPTERS``.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import pytest
from tests.manual_clock import ManualClock
from tests.servers.fixtures import or_skip
from tests.servers.redis import redis_server

from viralfx.adapters.memory import MemoryCacheStore
from viralfx.adapters.redis import RedisCacheStore, RedisClient
from viralfx.domain.cache import Cache, CacheStore
from viralfx.settings import RedisSettings


@dataclass(frozen=True)
class Stored:
    """An empty store, and a function that lets its time pass."""

    store: CacheStore
    wait: Callable[[float], Awaitable[None]]


Make = Callable[[], AbstractAsyncContextManager[Stored]]


@asynccontextmanager
async def _memory() -> AsyncIterator[Stored]:
    clock = ManualClock()
    yield Stored(MemoryCacheStore(clock), clock.advance)


@asynccontextmanager
async def _redis() -> AsyncIterator[Stored]:
    with or_skip(), redis_server() as server:
        client = RedisClient(RedisSettings(host=server.host, port=server.port))
        try:
            # It uses the server's clock, which the test cannot move.
            yield Stored(RedisCacheStore(client), asyncio.sleep)
        finally:
            await client.close()


ADAPTERS: dict[str, Make] = {"memory": _memory, "redis": _redis}


@pytest.fixture(params=list(ADAPTERS.values()), ids=list(ADAPTERS))
async def stored(request: pytest.FixtureRequest) -> AsyncIterator[Stored]:
    """Return each store in turn."""
    make: Make = request.param
    async with make() as stored:
        yield stored


@pytest.fixture
def store(stored: Stored) -> CacheStore:
    """Return each store in turn."""
    return stored.store


async def test_unknown_key_is_a_miss(store: CacheStore) -> None:
    """It is no error."""
    assert await store.get("nothing") is None


@pytest.mark.parametrize("value", [b"", b"value", bytes(range(256)), b"x" * 1_000_000])
async def test_stored_value_is_returned(store: CacheStore, value: bytes) -> None:
    """For any bytes; an empty value is not a miss."""
    await store.set("key", value, 60.0)

    assert await store.get("key") == value


@pytest.mark.parametrize("key", ["", "user:123", "größe\n\x00", "k" * 1000])
async def test_any_text_is_a_key(store: CacheStore, key: str) -> None:
    """Different keys have different values."""
    await store.set(key, b"mine", 60.0)
    await store.set(f"{key}:", b"other", 60.0)

    assert await store.get(key) == b"mine"


async def test_last_value_wins(store: CacheStore) -> None:
    """Storing replaces the value and its time to live."""
    await store.set("key", b"old", 60.0)
    await store.set("key", b"new", 60.0)

    assert await store.get("key") == b"new"


async def test_value_expires_after_its_ttl(stored: Stored) -> None:
    """Not earlier; reading does not prolong it."""
    await stored.store.set("short", b"value", 0.4)
    await stored.store.set("long", b"value", 60.0)
    before = await stored.store.get("short")
    await stored.wait(0.5)

    assert before == b"value"
    assert await stored.store.get("short") is None
    assert await stored.store.get("long") == b"value"


async def test_storing_starts_a_new_ttl(stored: Stored) -> None:
    """The old one no longer applies."""
    await stored.store.set("key", b"old", 0.2)
    await stored.store.set("key", b"new", 60.0)
    await stored.wait(0.3)

    assert await stored.store.get("key") == b"new"


async def test_deleted_key_is_a_miss(store: CacheStore) -> None:
    """Other keys stay; deleting an unknown key is no error."""
    await store.set("key", b"value", 60.0)
    await store.set("other", b"value", 60.0)
    await store.delete("key")
    await store.delete("key")

    assert await store.get("key") is None
    assert await store.get("other") == b"value"


@pytest.mark.parametrize("ttl", [0.0, -1.0, math.inf, math.nan])
async def test_invalid_ttl_is_refused(store: CacheStore, ttl: float) -> None:
    """The value is not stored."""
    with pytest.raises(ValueError, match="ttl must be more than zero and finite"):
        await store.set("key", b"value", ttl)

    assert await store.get("key") is None


@pytest.mark.parametrize("ttl", [0.0001, 1e9])
async def test_very_short_and_very_long_ttls_are_accepted(store: CacheStore, ttl: float) -> None:
    """Below the resolution of a store, and beyond any use."""
    await store.set("key", b"value", ttl)


async def test_cache_loads_a_value_once(store: CacheStore) -> None:
    """Concurrent and later callers share one call of the loader."""
    calls = 0

    async def load() -> bytes:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        return b"value"

    cache = Cache(store)
    async with asyncio.TaskGroup() as group:
        callers = [group.create_task(cache.get_or_load("key", 60.0, load)) for _ in range(100)]
    later = await cache.get_or_load("key", 60.0, load)

    assert {caller.result() for caller in callers} == {b"value"}
    assert (later, calls) == (b"value", 1)
