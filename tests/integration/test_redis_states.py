"""Redis that answers and cannot work: replicas, full memory, cluster nodes, Sentinels."""

import asyncio
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from redis import Redis, exceptions
from tests.integration.redis_clients import check_of, opened, within
from tests.servers.fault_proxy import DROP
from tests.servers.fixtures import FaultProxies
from tests.servers.redis import RedisServer, cluster_node, redis_server
from tests.servers.sentinel import SentinelSetup
from tests.servers.waiting import wait_for_code

from viralfx.adapters.redis import RedisCacheStore, RedisHealthCheck
from viralfx.adapters.redis.errors import WrongServerError
from viralfx.adapters.taskiq import StreamNotifier
from viralfx.core.clock import SystemClock
from viralfx.domain.health.model import Status
from viralfx.jobs.notifier import JobNotification

pytestmark = pytest.mark.timeout(60)

MINIMAL_USER = "bob on >pw ~viralfx:* -@all +hello +client +ping +get +set +del"
"""A user that may use the cache, and may not ask the server about itself."""
BOB: dict[str, Any] = {"username": "bob", "password": "pw"}
FAST = 0.5
"""Seconds within which a refused write ends; with retries it would take 3.5."""
WAIT = 20.0
"""Seconds between two attempts of a request that is to need one."""


def demote(server: RedisServer) -> None:
    """Make it a replica of a server that does not exist."""
    server.command("REPLICAOF", "127.0.0.1", 1)


def promote(server: RedisServer) -> None:
    """Make it a primary again."""
    server.command("REPLICAOF", "NO", "ONE")


def need_replicas(server: RedisServer) -> None:
    """Refuse writes while there are too few replicas."""
    server.command("CONFIG", "SET", "min-replicas-to-write", 1)


def need_none(server: RedisServer) -> None:
    """Accept writes without replicas."""
    server.command("CONFIG", "SET", "min-replicas-to-write", 0)


STATES: dict[str, tuple[Callable[[RedisServer], None], Callable[[RedisServer], None], str]] = {
    "replica": (demote, promote, "set REDIS_HOST to the primary"),
    "full": (RedisServer.fill, RedisServer.unfill, "raise maxmemory"),
    "too few replicas": (need_replicas, need_none, "too few replicas"),
}
CODES = {"replica": "read_only", "full": "memory_full", "too few replicas": "writes_refused"}


@pytest.mark.parametrize("state", STATES)
async def test_server_that_refuses_writes_is_a_warning(state: str) -> None:
    """With the least rights; reads go on, writes fail at once, and it recovers by itself."""
    begin, end, remedy = STATES[state]
    with redis_server(users=[MINIMAL_USER]) as server:
        server.command("SET", "viralfx:cache:planted", "here")
        async with opened(server, **BOB) as client:
            check, cache = check_of(client), RedisCacheStore(client)
            assert (await check.check()).code is None
            await cache.set("key", b"value", 60.0)
            begin(server)
            observation = await check.check()
            began = time.monotonic()
            for _ in range(20):
                await cache.set("key", b"other", 60.0)
            with pytest.raises(exceptions.ResponseError):
                await client.redis.set("viralfx:key", "value")
            took = time.monotonic() - began

            assert (observation.status, observation.code) == (Status.WARN, CODES[state])
            assert remedy in observation.message
            assert took < 20 * FAST
            assert client.available
            assert await cache.get("planted") == b"here"
            assert await cache.get("key") == b"value"
            end(server)
            await wait_for_code(check, None)
            assert await within(10.0, client.redis.set("viralfx:key", "value")) is True


async def test_full_memory_is_seen_without_permission_to_write() -> None:
    """INFO tells it then."""
    with redis_server(users=["bob on >pw ~* -@all +hello +client +ping +info"]) as server:
        server.fill()
        async with opened(server, **BOB) as client:
            check = check_of(client)
            codes = [(await check.check()).code for _ in range(3)]

            assert codes[-1] == "memory_full"


async def test_test_of_writes_changes_nothing(own_redis: RedisServer) -> None:
    """No key appears, and nothing would be replicated or saved."""
    async with opened(own_redis) as client:
        check = check_of(client)
        for _ in range(3):
            assert (await check.check()).code is None

    assert own_redis.command("DBSIZE") == 0
    assert own_redis.command("INFO", "persistence")["rdb_changes_since_last_save"] == 0


async def test_first_refused_write_asks_for_a_check(own_redis: RedisServer) -> None:
    """Once, not for each write."""
    asked: list[None] = []
    async with opened(own_redis, on_suspected_outage=lambda: asked.append(None)) as client:
        own_redis.fill()
        for _ in range(5):
            with pytest.raises(exceptions.OutOfMemoryError):
                await client.redis.set("key", "value")
        first = len(asked)
        assert (await check_of(client).check()).code == "memory_full"
        own_redis.unfill()
        assert (await check_of(client).check()).code is None
        own_redis.fill()
        with pytest.raises(exceptions.OutOfMemoryError):
            await client.redis.set("key", "value")

        assert (first, len(asked)) == (1, 2)


async def test_demoted_primary_is_left(own_redis: RedisServer, fault_proxy: FaultProxies) -> None:
    """Old connections lead to it, new ones to the new primary: a write and a check find that."""
    with redis_server() as new:
        proxy = fault_proxy(own_redis.port)  # stands for a name, or a virtual address
        # A request on an old connection would wait for its second attempt.
        waiting = opened(proxy, retry_base=WAIT, retry_cap=WAIT)
        async with waiting as client, opened(proxy) as other:
            check = check_of(client)
            await asyncio.gather(*(client.redis.set("key", n) for n in range(10)))
            await other.redis.set("key", "value")
            await check.check()
            demote(own_redis)
            proxy.upstream = (new.host, new.port)
            assert await within(5.0, other.redis.set("key", "request")) is True
            assert other.traffic.failed == 0
            assert (await check.check()).code is None
            began = time.monotonic()
            await asyncio.gather(*(client.redis.set(f"key{n}", n) for n in range(10)))

            # The check has found out, so no request has to.
            assert time.monotonic() - began < WAIT
            assert new.command("DBSIZE") == 11


async def test_connection_to_a_replica_is_opened_again(
    own_redis: RedisServer, fault_proxy: FaultProxies
) -> None:
    """The name may lead to a primary a moment later."""
    with redis_server() as new:
        demote(own_redis)
        proxy = fault_proxy(own_redis.port)
        async with opened(proxy) as client:
            check = check_of(client)
            assert (await check.check()).code == "read_only"
            with pytest.raises(exceptions.ReadOnlyError):
                await within(FAST, client.redis.set("key", "value"))
            proxy.upstream = (new.host, new.port)
            await wait_for_code(check, None)

            async def written() -> bool:
                try:
                    return bool(await client.redis.set("key", "value"))
                except exceptions.ReadOnlyError:
                    return False

            async with asyncio.timeout(10.0):
                while not await written():  # noqa: ASYNC110 - it waits inside the request
                    await asyncio.sleep(0.05)
            assert new.command("GET", "key") == "value"


@pytest.mark.parametrize("rights", ["all", "least"])
async def test_cluster_node_is_refused(rights: str) -> None:
    """By name, at the check and at each request, so that no key gets lost silently."""
    user: dict[str, Any] = BOB if rights == "least" else {}
    with redis_server(arguments=cluster_node(), users=[MINIMAL_USER]) as server:
        async with opened(server, **user) as client:
            observation = await check_of(client).check()
            with pytest.raises(WrongServerError, match="Redis Cluster"):
                await within(1.0, client.redis.get("viralfx:key"))

            assert (observation.status, observation.code) == (Status.FAIL, "cluster")
            assert "use a server without cluster mode" in observation.message
            assert not client.available
            assert await RedisCacheStore(client).get("key") is None
            notifier = StreamNotifier(client)
            with pytest.raises(Exception, match="unavailable"):
                await notifier.notify(JobNotification(queue="q", ids=("1",)))


async def test_sentinel_as_host_is_refused(sentinel_setup: SentinelSetup) -> None:
    """The message has the variables for it."""
    sentinel = sentinel_setup.sentinel_servers[0]
    async with opened(sentinel, password=sentinel_setup.sentinel_password) as client:
        observation = await check_of(client).check()

        assert (observation.status, observation.code) == (Status.FAIL, "sentinel")
        assert "REDIS_SENTINEL_ENABLED=true" in observation.message


@pytest.mark.parametrize(
    ("known", "attempts"),
    [("by the check", 1), ("by nothing", 2)],
    ids=["by the check", "by nothing"],
)
async def test_silently_dropped_connections_are_left(
    own_redis: RedisServer,
    fault_proxy: FaultProxies,
    known: str,
    attempts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A firewall dropped all open connections: at most one of them costs an attempt."""
    monkeypatch.setattr("viralfx.adapters.redis.connections.IDLE_SECONDS", 0.2)
    proxy = fault_proxy(own_redis.port)
    async with opened(proxy, attempts=attempts, socket_timeout=2.0) as client:
        check = RedisHealthCheck(client, SystemClock(), timeout=1.0)
        await asyncio.gather(*(client.redis.set(f"key{n}", n) for n in range(5)))
        await check.check()
        proxy.mode = DROP
        await asyncio.sleep(0.3)
        if known == "by the check":
            assert (await check.check()).code is None
        assert await client.redis.get("key1") == b"1"
        # Over a dropped connection, an attempt would take the two seconds of its limit.
        await within(2.0, asyncio.gather(*(client.redis.get(f"key{n}") for n in range(5))))

        assert (await check.check()).code is None


async def test_full_server_takes_no_more_clients(own_redis: RedisServer) -> None:
    """The message names the limit; the next check after it was raised passes."""
    with closing(Redis(own_redis.host, own_redis.port)) as first:
        execute: Callable[..., Any] = first.execute_command
        execute("CONFIG", "SET", "maxclients", 1)
        async with opened(own_redis, attempts=1) as client:
            check = check_of(client)
            full = await check.check()
            with pytest.raises(exceptions.ConnectionError):
                await client.redis.ping()
            execute("CONFIG", "SET", "maxclients", 100)

            assert (full.status, full.code) == (Status.FAIL, "too_many_connections")
            assert "maxclients" in full.message
            assert (await check.check()).code is None
            assert await client.redis.ping() is True
