"""The health check against a real Redis and against other servers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.integration.leaks import LeakCheck
from tests.integration.redis_clients import QUICK, check_of, opened, within
from tests.servers.fault_proxy import BLACKHOLE, PASS, RESET, FaultProxy
from tests.servers.fixtures import FaultProxies
from tests.servers.redis import RedisServer, redis_server
from tests.servers.waiting import until, wait_for_code
from tests.soak import cycles

from viralfx.adapters.redis import RedisHealthCheck
from viralfx.core.clock import SystemClock
from viralfx.domain.health.model import CheckPolicy, Status
from viralfx.domain.health.monitor import HealthMonitor

pytestmark = pytest.mark.timeout(60)


def commands(server: RedisServer) -> dict[str, int]:
    """Return how often each command was called."""
    lines = server.command("INFO", "commandstats")
    return {name.removeprefix("cmdstat_"): stats["calls"] for name, stats in lines.items()}


async def test_each_check_is_one_round_trip_on_one_connection(own_redis: RedisServer) -> None:
    """Ten checks are nine pings and one memory query, each with a greeting and a test of writes."""
    async with opened(own_redis) as client:
        check = check_of(client)
        await check.check()
        before, connections = commands(own_redis), own_redis.command("INFO", "clients")
        for _ in range(10):
            assert (await check.check()).status is Status.PASS
        after = commands(own_redis)

    more = {name: count - before.get(name, 0) for name, count in after.items()}
    del more["client|setinfo"]  # of the questions of this test, which are two by ``INFO``
    more["info"] -= 2
    assert {name: count for name, count in more.items() if count} == {
        "ping": 9,
        "info": 1,
        "hello": 10,
        "set": 10,
    }
    assert connections["connected_clients"] == 2


async def test_memory_usage_is_that_of_redis(own_redis: RedisServer) -> None:
    """It is queried after a successful ping; with the limit if there is one."""
    async with opened(own_redis) as client:
        check = check_of(client)
        await check.check()
        before = client.memory.usage
        own_redis.command("CONFIG", "SET", "maxmemory", 100_000_000)
        await check.check()

    assert before is None
    assert client.memory.usage is not None
    assert 100_000 < client.memory.usage.used < 100_000_000
    assert client.memory.usage.limit == 100_000_000


@pytest.mark.parametrize("how", ["renamed", "forbidden"])
async def test_forbidden_memory_query_falls_back_to_ping(how: str) -> None:
    """Missing permissions or a renamed command do not fail the check."""
    arguments = ["--rename-command", "INFO", ""] if how == "renamed" else []
    user: dict[str, Any] = {"username": "bob", "password": "pw"} if how == "forbidden" else {}
    with redis_server(arguments=arguments, users=["bob on >pw ~* +@all -info"]) as server:
        async with opened(server, **user) as client:
            check = check_of(client)
            seen_again = [(await check.check()).status for _ in range(4)]

            assert seen_again == [Status.PASS] * 4
            assert client.memory.usage is None


async def test_pings_are_not_counted_as_requests(redis: RedisServer) -> None:
    """The counters are those of the application."""
    async with opened(redis) as client:
        check = check_of(client)
        await check.check()
        details: Any = (await check.check()).details

    assert details["stats"]["totalRequests"] == 0


async def test_check_does_not_wait_for_the_pool(redis: RedisServer) -> None:
    """A busy application does not hide a healthy server."""
    async with opened(redis, pool_size=1) as client:
        slow = asyncio.ensure_future(client.redis.blpop(["none"], 1))
        await until(lambda: client.active)

        assert (await within(0.5, check_of(client).check())).status is Status.PASS
        slow.cancel()


async def test_broken_connection_is_reopened_within_the_check(
    own_redis: RedisServer,
) -> None:
    """A restart between two checks is not reported as a failure."""
    async with opened(own_redis) as client:
        check = check_of(client)
        await check.check()
        await asyncio.to_thread(own_redis.restart)

        assert (await check.check()).status is Status.PASS


async def test_check_reconnects_at_most_once(redis: RedisServer, fault_proxy: FaultProxies) -> None:
    """The next check is the retry."""
    proxy = fault_proxy(redis.port)
    async with opened(proxy) as client:
        check = check_of(client)
        await check.check()
        proxy.mode = RESET
        before = proxy.accepted
        observation = await within(1.0, check.check())

        assert (observation.status, observation.code) == (Status.FAIL, "lost")
        assert observation.message == "Redis connection lost"
        assert proxy.accepted - before == 1


async def test_failure_has_documented_details_and_the_error(
    own_redis: RedisServer,
) -> None:
    """Live counters, and no secret."""
    async with opened(own_redis, password="hush", **QUICK) as client:
        check = check_of(client)
        await asyncio.to_thread(own_redis.kill)
        for attempts in (1, 2, 3):
            observation = await within(1.0, check.check())
            details: Any = observation.details

            assert (observation.status, observation.code) == (Status.FAIL, "refused")
            assert observation.message == "Redis refuses connections"
            assert observation.error is not None
            assert details["isConnected"] is details["stats"]["isConnected"] is False
            assert details["stats"]["failedAttempts"] == attempts
            assert details["config"] == {"host": "127.0.0.1", "port": own_redis.port, "db": 0}
            assert "hush" not in repr(observation)
        await asyncio.to_thread(own_redis.start)
        recovered: Any = (await wait_for_code(check, None)).details

        assert recovered["isConnected"] is True
        assert recovered["stats"]["failedAttempts"] == 0


@pytest.mark.parametrize("password", ["wrong", None])
async def test_wrong_credentials_have_their_own_code(password: str | None) -> None:
    """The message contains no password."""
    with redis_server(password="hush") as server:
        async with opened(server, password=password) as client:
            observation = await check_of(client).check()

            assert (observation.code, observation.message) == (
                "auth",
                "Redis refuses the credentials",
            )
            assert "wrong" not in observation.message
            assert not client.available


async def test_missing_permission_to_ping_is_an_auth_failure() -> None:
    """It is not reported as a network problem."""
    with redis_server(users=["bob on >pw ~* -@all +hello +auth +client +get"]) as server:
        async with opened(server, username="bob", password="pw") as client:
            assert (await check_of(client).check()).code == "auth"


async def test_a_server_that_cannot_save_is_a_warning() -> None:
    """It serves reads and refuses writes; an operator should look at it."""
    arguments = ["--save", "3600 100000", "--enable-protected-configs", "yes"]
    with redis_server(arguments=arguments) as server:
        _, folder = server.command("CONFIG", "GET", "dir")
        async with opened(server) as client:
            check = check_of(client)
            server.command("CONFIG", "SET", "dir", "/proc")  # not writable
            server.command("BGSAVE")
            observation = await wait_for_code(check, "writes_refused")

            assert observation.status is Status.WARN
            assert client.available
            server.command("CONFIG", "SET", "dir", folder)
            server.command("BGSAVE")
            await wait_for_code(check, None)


@asynccontextmanager
async def watched(check: RedisHealthCheck) -> AsyncIterator[HealthMonitor]:
    """Run the check as the service does, but more often."""
    monitor = HealthMonitor(clock=SystemClock())
    monitor.register("redis", check, CheckPolicy(interval=0.05, timeout=0.2))
    monitor.start()
    try:
        yield monitor
    finally:
        await monitor.stop()


async def test_failed_request_triggers_a_check(own_redis: RedisServer) -> None:
    """The monitor notices the outage before its interval ends, and detects the recovery."""
    monitor = HealthMonitor(clock=SystemClock())
    doubt = lambda: monitor.request_check("redis")  # noqa: E731 - as bootstrap wires it
    async with opened(own_redis, on_suspected_outage=doubt, **QUICK) as client:
        policy = CheckPolicy(interval=3600.0, retry_interval=0.05, timeout=0.5, max_age=1e6)
        monitor.register("redis", check_of(client), policy)
        monitor.start()
        await until(lambda: monitor.report().started)
        await asyncio.to_thread(own_redis.kill)
        await client.get_with_graceful_degradation(lambda: client.redis.get("key"), None)
        await until(lambda: monitor.report().checks["redis"].code == "refused")
        await asyncio.to_thread(own_redis.start)
        await until(lambda: monitor.report().checks["redis"].status is Status.PASS)

        assert client.available
        await monitor.stop()


@pytest.mark.soak
@pytest.mark.parametrize("how", ["server", "network"])
async def test_repeated_freezes_under_the_monitor_leave_no_resources(
    own_redis: RedisServer, fault_proxy: FaultProxies, how: str
) -> None:
    """Each is a timeout and a recovery; nothing is left open."""
    proxy = fault_proxy(own_redis.port)
    async with (
        opened(proxy, **QUICK) as client,
        watched(check_of(client)) as monitor,
    ):

        def code() -> str | None:
            return monitor.report().checks["redis"].code

        await until(lambda: monitor.report().started)
        leaks, connections = LeakCheck(), proxy.open
        for _ in cycles(50):
            freeze(own_redis, proxy, how)
            await until(lambda: code() == "timeout")
            thaw(own_redis, proxy, how)
            await until(lambda: code() is None)
        await monitor.stop()
        await until(lambda: proxy.open <= connections)
        await leaks.assert_none()

        # The start, and two changes in each cycle; the history holds 100.
        assert len(monitor.history) == min(100, 1 + 2 * len(cycles(50)))


def freeze(server: RedisServer, proxy: FaultProxy, how: str) -> None:
    """Stop the server from responding."""
    if how == "server":
        server.freeze()
    else:
        proxy.mode = BLACKHOLE


def thaw(server: RedisServer, proxy: FaultProxy, how: str) -> None:
    """Let the server respond again."""
    if how == "server":
        server.thaw()
    else:
        proxy.mode = PASS


@pytest.mark.parametrize("turns", [*range(40)])
async def test_cancellation_at_any_await_is_safe(redis: RedisServer, turns: int) -> None:
    """While connecting, greeting or pinging; the next check works."""
    leaks = LeakCheck()
    async with opened(redis) as client:
        check = check_of(client)
        cut = asyncio.create_task(check.check())
        for _ in range(turns):
            await asyncio.sleep(0)
        cut.cancel()
        await asyncio.wait({cut})

        assert (await within(5.0, check.check())).status is Status.PASS
        assert client.available
    await leaks.assert_none()
