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
from viralfx.adapters.redis import RedisCacheStore, RedisClient, RedisConfig
from viralfx.domain.cache import Cache, CacheStore


@dataclass(frozen=True)
class Stored:
    """A store, empty, and how its time passes."""

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
        client = RedisClient(RedisConfig(host=server.host, port=server.port))
        try:
            # Its time is the server's own; nothing here can move that.
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


async def test_what_is_not_there_is_a_miss(store: CacheStore) -> None:
    """And no error."""
    assert await store.get("nothing") is None


@pytest.mark.parametrize("value", [b"", b"value", bytes(range(256)), b"x" * 1_000_000])
async def test_what_was_set_comes_back(store: CacheStore, value: bytes) -> None:
    """Whatever the bytes are; an empty value is not a miss."""
    await store.set("key", value, 60.0)

    assert await store.get("key") == value


@pytest.mark.parametrize("key", ["", "user:123", "größe\n\x00", "k" * 1000])
async def test_any_text_is_a_key(store: CacheStore, key: str) -> None:
    """Keys that differ hold values that differ."""
    await store.set(key, b"mine", 60.0)
    await store.set(f"{key}:", b"other", 60.0)

    assert await store.get(key) == b"mine"


async def test_the_last_value_counts(store: CacheStore) -> None:
    """Setting replaces, the time to live included."""
    await store.set("key", b"old", 60.0)
    await store.set("key", b"new", 60.0)

    assert await store.get("key") == b"new"


async def test_a_value_ends_with_its_time(stored: Stored) -> None:
    """Not before, and its reading prolongs nothing."""
    await stored.store.set("short", b"value", 0.4)
    await stored.store.set("long", b"value", 60.0)
    before = await stored.store.get("short")
    await stored.wait(0.5)

    assert before == b"value"
    assert await stored.store.get("short") is None
    assert await stored.store.get("long") == b"value"


async def test_setting_begins_a_new_time(stored: Stored) -> None:
    """The time of the old value is not that of the new one."""
    await stored.store.set("key", b"old", 0.2)
    await stored.store.set("key", b"new", 60.0)
    await stored.wait(0.3)

    assert await stored.store.get("key") == b"new"


async def test_what_was_deleted_is_a_miss(store: CacheStore) -> None:
    """Others stay, and deleting what is not there is no error."""
    await store.set("key", b"value", 60.0)
    await store.set("other", b"value", 60.0)
    await store.delete("key")
    await store.delete("key")

    assert await store.get("key") is None
    assert await store.get("other") == b"value"


@pytest.mark.parametrize("ttl", [0.0, -1.0, math.inf, math.nan])
async def test_a_time_that_cannot_be_meant_is_refused(store: CacheStore, ttl: float) -> None:
    """And nothing is kept."""
    with pytest.raises(ValueError, match="ttl must be more than zero and finite"):
        await store.set("key", b"value", ttl)

    assert await store.get("key") is None


@pytest.mark.parametrize("ttl", [0.0001, 1e9])
async def test_the_shortest_and_the_longest_time_are_taken(store: CacheStore, ttl: float) -> None:
    """Less than a store can measure, and more than anybody waits."""
    await store.set("key", b"value", ttl)


async def test_a_cache_loads_once_what_it_then_has(store: CacheStore) -> None:
    """The service on top: concurrent and later callers share one call of the loader."""
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
