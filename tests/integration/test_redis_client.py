"""Requests to a real Redis that is frozen, killed, restarted, loading, slow or unreachable."""

import asyncio
import functools
import socket
import time
from typing import Any, cast

import pytest
from redis import exceptions
from redis.asyncio.client import Pipeline
from tests.integration.leaks import LeakCheck
from tests.integration.names import MANY, silent_names
from tests.integration.redis_clients import QUICK, check_of, config_of, opened, opened_with, within
from tests.servers.fault_proxy import BLACKHOLE, PASS, REFUSE, RESET, CutAfter
from tests.servers.fixtures import FaultProxies
from tests.servers.redis import RedisServer, redis_server
from tests.servers.waiting import until, wait_for_code
from tests.soak import cycles

from viralfx.adapters.redis import RedisClient, close_redis
from viralfx.adapters.redis.errors import ClientClosedError
from viralfx.core.loops import HomeLoop

pytestmark = pytest.mark.timeout(60)


def reader(client: RedisClient, key: str = "key") -> Any:
    """Return an operation that reads."""
    return functools.partial(client.redis.get, key)


def queue(pipeline: Pipeline, *commands: tuple[str, ...]) -> None:
    """Put commands into a pipeline; redis-py types them as if they were sent at once."""
    for command in commands:
        pipeline.pipeline_execute_command(*command)  # type: ignore[no-untyped-call]


# -- requests --------------------------------------------------------------------------------


async def test_client_connects_at_the_first_request(redis: RedisServer) -> None:
    """Creating a client opens nothing and raises nothing."""
    leaks = LeakCheck()
    async with opened(redis) as client:
        await leaks.assert_none()
        await client.redis.set("key", b"\xff")

        assert await client.redis.get("key") == b"\xff"
    await leaks.assert_none()


async def test_another_event_loop_may_close_the_connections(redis: RedisServer) -> None:
    """They close on the loop that they belong to, and the next request opens one."""
    home = HomeLoop()
    home.settle()
    client = RedisClient(*config_of(port=redis.port), home=home)
    await client.redis.ping()
    (connection,) = client.redis.connection_pool._available_connections
    closing: list[object] = []
    disconnect = connection.disconnect

    async def note(*arguments: Any, **options: Any) -> None:
        closing.append(asyncio.get_running_loop())
        await disconnect(*arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(connection, "disconnect", note)
        await asyncio.to_thread(lambda: asyncio.run(client.redis.aclose()))

    assert closing == [asyncio.get_running_loop()]
    assert not connection.is_connected
    assert await client.redis.ping()
    await client.close()


async def test_connections_have_a_name_and_keep_alive(redis: RedisServer) -> None:
    """The server shows name and database; the kernel probes after 30 s of silence."""
    async with opened(redis, db=3) as client:
        await client.redis.ping()
        listed = redis.command("CLIENT", "LIST")
        pool = client.redis.connection_pool
        (connection,) = pool._available_connections
        writer = cast("asyncio.StreamWriter", connection._writer)
        sock = writer.get_extra_info("socket")
        mine = [line for line in str(listed).splitlines() if "name=viralfx" in line]

        assert len(mine) == 1
        assert " db=3 " in mine[0]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30


async def test_requests_are_counted_under_documented_names(redis: RedisServer) -> None:
    """Commands, pipelines and transactions; an error reply counts as failed."""
    async with opened(redis) as client:
        await client.redis.set("key", "text")
        async with client.redis.pipeline(transaction=False) as pipeline:
            queue(pipeline, ("GET", "key"), ("GET", "key"))
            await pipeline.execute()
        async with client.redis.pipeline() as pipeline:
            queue(pipeline, ("INCR", "n"), ("INCR", "n"))
            await pipeline.execute()
            assert await pipeline.execute() == []
        async with client.redis.pipeline() as pipeline:
            await pipeline.watch("n")
            await pipeline.get("n")
            pipeline.multi()  # type: ignore[no-untyped-call]
            queue(pipeline, ("INCR", "n"))
            await pipeline.execute()
        with pytest.raises(exceptions.ResponseError):
            await client.redis.lpush("key", "x")
        async with client.redis.pipeline() as pipeline:
            queue(pipeline, ("LPUSH", "key", "x"))
            with pytest.raises(exceptions.ResponseError):
                await pipeline.execute()
        details: Any = (await check_of(client).check()).details

    # set, pipeline, transaction, watch, get, transaction; lpush, transaction
    assert details["stats"]["successfulRequests"] == 6
    assert details["stats"]["failedRequests"] == 2
    assert details["stats"]["totalRequests"] == 8


async def test_cancelled_request_is_not_counted(own_redis: RedisServer) -> None:
    """It says nothing about Redis."""
    async with opened(own_redis) as client:
        await client.redis.ping()
        own_redis.freeze()
        with pytest.raises(TimeoutError):
            await within(0.05, client.redis.get("key"))
        own_redis.thaw()

        assert (client.traffic.successful, client.traffic.failed) == (1, 0)
        assert client.available


async def test_refused_request_has_four_attempts_in_three_and_a_half_seconds(
    own_redis: RedisServer,
) -> None:
    """The waits are 0.5, 1 and 2 s; no second retry multiplies them."""
    own_redis.stop()
    async with opened(own_redis) as client:
        began = time.monotonic()
        with pytest.raises(exceptions.ConnectionError):
            await within(60.0, client.redis.get("key"))
        took = time.monotonic() - began

        assert client.traffic.failed_attempts == 4
        assert took >= 3.5


@pytest.mark.parametrize("opened_before", [False, True], ids=["first request", "open connection"])
async def test_request_makes_four_attempts_on_the_wire(
    redis: RedisServer, fault_proxy: FaultProxies, *, opened_before: bool
) -> None:
    """An existing connection may be one of them."""
    proxy = fault_proxy(redis.port)
    async with opened(proxy, **QUICK) as client:
        if opened_before:
            await client.redis.ping()
        before = proxy.accepted
        proxy.mode = RESET
        with pytest.raises(exceptions.ConnectionError):
            await client.redis.get("key")

        assert proxy.accepted - before in ({3, 4} if opened_before else {4})


async def test_wrong_credentials_are_sent_once(fault_proxy: FaultProxies) -> None:
    """Repeating them cannot help and may lock the account."""
    with redis_server(password="hush") as server:
        proxy = fault_proxy(server.port)
        for password in ("wrong", None):
            async with opened(proxy, password=password) as client:
                before = proxy.accepted
                with pytest.raises(exceptions.AuthenticationError):
                    await client.redis.get("key")

                assert proxy.accepted - before == 1


async def test_acl_user_is_limited_to_its_permissions() -> None:
    """A missing permission is an error and not an outage, so there is no fallback."""
    with redis_server(users=["alice on >secret ~* -@all +@connection +acl|whoami +get"]) as server:
        async with opened(server, username="alice", password="secret") as client:
            assert await client.redis.acl_whoami() == "alice"
            assert await client.redis.get("key") is None
            with pytest.raises(exceptions.NoPermissionError):
                await client.get_with_graceful_degradation(
                    lambda: client.redis.set("key", "value"), None
                )
            assert client.available
            assert (await check_of(client).check()).message == "Redis is healthy"


async def test_request_after_a_restart_succeeds(own_redis: RedisServer) -> None:
    """A connection that was closed while idle is replaced before its use."""
    async with opened(own_redis) as client:
        await asyncio.gather(*(client.redis.ping() for _ in range(10)))
        await asyncio.to_thread(own_redis.restart)

        assert await asyncio.gather(*(client.redis.ping() for _ in range(10))) == [True] * 10
        assert client.traffic.failed == 0


async def test_request_survives_a_killed_server(own_redis: RedisServer) -> None:
    """The server that starts afterwards answers it."""
    async with opened(own_redis) as client:
        await client.redis.ping()
        own_redis.freeze()
        request = asyncio.ensure_future(client.redis.set("key", "value"))
        await until(lambda: client.active)
        await asyncio.to_thread(own_redis.kill)
        await asyncio.to_thread(own_redis.start)

        assert await within(10.0, request) is True
        assert client.traffic.failed == 0


async def test_request_waits_for_a_loading_server(own_redis: RedisServer) -> None:
    """The request is retried, and the check reports the code."""
    async with opened(own_redis) as client:
        await client.redis.set("key", "value")
        await asyncio.to_thread(own_redis.loading, 2.0)
        observation = await check_of(client).check()

        assert (str(observation.status), observation.code) == ("fail", "loading")
        assert observation.message == "Redis is loading its data"
        assert await within(10.0, client.redis.get("key")) == b"value"
        assert client.traffic.failed == 0


async def test_server_that_loads_too_long_is_unavailable(own_redis: RedisServer) -> None:
    """The error is the server's, and the fallback is used."""
    # A loading server responds slowly, between two chunks of its data.
    async with opened(own_redis, attempts=1) as client:
        await asyncio.to_thread(own_redis.loading, 5.0)
        with pytest.raises(exceptions.BusyLoadingError):
            await client.redis.get("key")

        assert not client.available
        assert await client.get_with_graceful_degradation(reader(client), b"else") == b"else"


@pytest.mark.parametrize("count", range(0, 150, 10))
async def test_truncated_reply_is_never_returned(
    redis: RedisServer, fault_proxy: FaultProxies, count: int
) -> None:
    """The connection is cut in the greeting, in the reply, or in the next one."""
    proxy = fault_proxy(redis.port)
    redis.command("SET", "a", "a" * 30)
    redis.command("SET", "b", "b" * 30)
    leaks = LeakCheck()
    async with opened(proxy, **QUICK) as client:
        proxy.mode = CutAfter(count)
        for key in ("a", "b", "a", "b"):
            try:
                answer = await within(5.0, client.redis.get(key))
            except (exceptions.ConnectionError, exceptions.TimeoutError):
                continue
            assert answer == key.encode() * 30
        proxy.mode = PASS

        assert await client.redis.get("b") == b"b" * 30
    await leaks.assert_none()


async def test_frozen_server_fails_a_request_within_its_limit(own_redis: RedisServer) -> None:
    """Each attempt ends after the socket timeout; then the request fails."""
    async with opened(own_redis, **QUICK) as client:
        await client.redis.ping()
        own_redis.freeze()
        with pytest.raises(exceptions.TimeoutError):
            await within(5.0, client.redis.get("key"))

        assert not client.available


async def test_unsent_data_does_not_delay_closing(own_redis: RedisServer) -> None:
    """A graceful close would wait until the frozen server reads it."""
    leaks = LeakCheck()
    async with opened(own_redis, **QUICK) as client:
        await client.redis.ping()
        own_redis.freeze()
        with pytest.raises(exceptions.TimeoutError):
            await within(20.0, client.redis.set("key", b"x" * 30_000_000))
    await leaks.assert_none()


@pytest.mark.parametrize("turns", [*range(12), 15, 20, 30])
@pytest.mark.parametrize("opened_before", [False, True], ids=["first request", "open connection"])
async def test_cancellation_at_any_await_is_safe(
    redis: RedisServer, turns: int, *, opened_before: bool
) -> None:
    """No slot of the pool leaks, no reply goes to another caller, and nothing is left."""
    redis.command("MSET", "a", "a", "b", "b")
    leaks = LeakCheck()
    async with opened(redis, pool_size=1, pool_timeout=2.0) as client:
        if opened_before:
            await client.redis.ping()
        cut = asyncio.ensure_future(client.redis.get("a"))
        line = [asyncio.ensure_future(client.redis.get("a")) for _ in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        cut.cancel()
        line[1].cancel()

        assert await client.redis.get("b") == b"b"
        assert await line[0] == await line[2] == b"a"
        assert (client.active, client.waiting) == (0, 0)
    await leaks.assert_none()


# -- the pool --------------------------------------------------------------------------------


async def test_requests_wait_for_a_free_connection(redis: RedisServer) -> None:
    """The check warns with the number of waiting requests."""
    async with opened(redis, pool_size=2) as client:
        check = check_of(client)
        slow = [asyncio.ensure_future(client.redis.blpop(["none"], 1)) for _ in range(2)]
        await until(lambda: client.active == 2)
        line = [asyncio.ensure_future(client.redis.ping()) for _ in range(3)]
        await until(lambda: client.waiting == 3)
        observation = await check.check()

        assert (str(observation.status), observation.code) == ("warn", "pool_exhausted")
        assert observation.message == "Redis is healthy, but 3 requests wait for a connection"
        assert await asyncio.gather(*line) == [True] * 3
        assert await asyncio.gather(*slow) == [None] * 2
        assert (await check.check()).code is None


async def test_wait_for_a_connection_is_limited(redis: RedisServer) -> None:
    """A timeout is no outage, but results in the fallback."""
    async with opened(redis, pool_size=1, pool_timeout=0.05) as client:
        slow = asyncio.ensure_future(client.redis.blpop(["none"], 1))
        await until(lambda: client.active)
        with pytest.raises(exceptions.MaxConnectionsError, match="all 1 connections were in use"):
            await client.redis.ping()

        assert await client.get_with_graceful_degradation(reader(client), b"else") == b"else"
        assert client.available
        slow.cancel()


# -- graceful degradation --------------------------------------------------------------------


async def test_documented_example(own_redis: RedisServer) -> None:
    """The value if Redis is available, the fallback during an outage."""
    async with opened(own_redis) as client:
        await client.redis.set("user:123", "a user")
        operation = reader(client, "user:123")

        assert await client.get_with_graceful_degradation(operation, None) == b"a user"
        await asyncio.to_thread(own_redis.kill)
        assert await client.get_with_graceful_degradation(operation, None) is None


@pytest.mark.each_python
@pytest.mark.parametrize("loss", ["frozen", "killed"])
async def test_fallback_is_immediate_during_a_known_outage(
    own_redis: RedisServer, loss: str
) -> None:
    """The first call is limited, later ones take no time, and one outage is reported."""
    suspicions: list[None] = []
    async with opened(own_redis, on_suspected_outage=lambda: suspicions.append(None)) as client:
        await client.redis.set("key", "value")
        await asyncio.to_thread(own_redis.freeze if loss == "frozen" else own_redis.kill)
        began = time.monotonic()
        first = await client.get_with_graceful_degradation(reader(client), b"else")
        bounded = time.monotonic() - began
        times = []
        for _ in range(100):
            began = time.monotonic()
            assert await client.get_with_graceful_degradation(reader(client), b"else") == b"else"
            times.append(time.monotonic() - began)

        assert first == b"else"
        # A request that waits gives up after 11.5 s, and a limited one after a second.
        assert bounded < 8
        assert sorted(times)[50] < 0.5
        assert len(suspicions) == 1


@pytest.mark.parametrize("loss", ["frozen", "killed", "flushed", "restarted"])
async def test_cached_reads_recover(own_redis: RedisServer, loss: str) -> None:
    """The check detects that Redis is back."""
    async with opened(own_redis, **QUICK) as client:
        check = check_of(client)
        await client.redis.set("key", "value")
        match loss:
            case "frozen":
                own_redis.freeze()
                assert await client.get_with_graceful_degradation(reader(client), None) is None
                own_redis.thaw()
            case "killed":
                await asyncio.to_thread(own_redis.kill)
                assert await client.get_with_graceful_degradation(reader(client), None) is None
                await asyncio.to_thread(own_redis.start)
            case "restarted":
                await asyncio.to_thread(own_redis.restart)
            case _:
                own_redis.flush()
                assert await client.get_with_graceful_degradation(reader(client), None) is None
        await wait_for_code(check, None)

        assert client.available
        await client.get_with_graceful_degradation(lambda: client.redis.set("key", "new"), None)
        assert await client.get_with_graceful_degradation(reader(client), None) == b"new"


async def test_check_detects_an_outage_without_requests(own_redis: RedisServer) -> None:
    """An idle client knows the outage too."""
    suspicions: list[None] = []
    async with opened(own_redis, on_suspected_outage=lambda: suspicions.append(None)) as client:
        check = check_of(client)
        await check.check()
        own_redis.freeze()
        with pytest.raises(TimeoutError):
            await within(0.2, check.check())
        known = not client.available
        own_redis.thaw()

        assert known
        assert suspicions == []


async def test_other_errors_are_raised(redis: RedisServer) -> None:
    """A key of another type, or a mistake in the operation."""
    async with opened(redis) as client:
        await client.redis.set("key", "text")

        async def fails() -> None:
            raise KeyError("bug")

        async def takes_long_elsewhere() -> None:
            raise TimeoutError

        with pytest.raises(exceptions.ResponseError):
            await client.get_with_graceful_degradation(lambda: client.redis.lpop("key"), None)
        with pytest.raises(KeyError):
            await client.get_with_graceful_degradation(fails, None)
        with pytest.raises(TimeoutError):
            await client.get_with_graceful_degradation(takes_long_elsewhere, None)
        with pytest.raises(TypeError):
            await client.get_with_graceful_degradation(cast("Any", 3), None)
        assert client.available


async def test_slow_operation_is_no_outage_while_redis_responds(redis: RedisServer) -> None:
    """Only the slow caller gets the fallback."""
    suspicions: list[None] = []
    async with opened(
        redis, on_suspected_outage=lambda: suspicions.append(None), **QUICK
    ) as client:

        async def slow() -> bytes:
            while True:
                await client.redis.ping()
                await asyncio.sleep(0.001)

        assert await client.get_with_graceful_degradation(slow, b"else") == b"else"
        assert client.available
        assert len(suspicions) == 1


async def test_cancellation_is_propagated(own_redis: RedisServer) -> None:
    """A cancelled caller gets no fallback."""
    async with opened(own_redis) as client:
        await client.redis.ping()
        own_redis.freeze()
        call = asyncio.create_task(client.get_with_graceful_degradation(reader(client), None))
        await until(lambda: client.active)
        call.cancel()
        await asyncio.wait({call})

        assert call.cancelled()
        assert client.available


@pytest.mark.soak
async def test_repeated_freezes_leave_no_resources(own_redis: RedisServer) -> None:
    """No task, connection or file; and each time everything works again afterwards."""
    async with opened(own_redis, degrade_after=0.1, **QUICK) as client:
        check = check_of(client)
        await asyncio.gather(*(client.redis.ping() for _ in range(5)))
        await check.check()
        leaks = LeakCheck()
        for cycle in cycles(50, usual=3):
            own_redis.freeze()
            cut = asyncio.create_task(check.check())
            reads = [
                asyncio.create_task(client.get_with_graceful_degradation(reader(client), b"else"))
                for _ in range(5)
            ]
            for _ in range(cycle):
                await asyncio.sleep(0)
            cut.cancel()
            assert await asyncio.gather(*reads) == [b"else"] * 5
            own_redis.thaw()
            await wait_for_code(check, None)
            assert await client.redis.set("key", cycle) is True
            assert await client.redis.get("key") == b"%d" % cycle
            assert await client.redis.delete("key") == 1
        await leaks.assert_none()
        clients = str(own_redis.command("CLIENT", "LIST")).count("name=viralfx")

    assert clients <= 6


# -- closing ---------------------------------------------------------------------------------


async def test_close_waits_for_running_requests_and_refuses_new_ones(redis: RedisServer) -> None:
    """New requests fail at once and open nothing."""
    leaks = LeakCheck()
    async with opened(redis) as client:
        check = check_of(client)
        await check.check()
        slow = asyncio.ensure_future(client.redis.blpop(["none"], 0.3))
        await until(lambda: client.active)
        await within(5.0, close_redis(client, 10.0))

        assert await slow is None
        with pytest.raises(ClientClosedError):
            await within(0.5, client.redis.get("key"))
        assert (await check.check()).code == "lost"
        await leaks.assert_none()


async def test_close_cuts_hanging_requests(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Within its budget, and with a log line."""
    leaks = LeakCheck()
    async with opened(own_redis) as client:
        await client.redis.ping()
        own_redis.freeze()
        hanging = asyncio.ensure_future(client.redis.get("key"))
        await until(lambda: client.active)
        await within(1.0, close_redis(client, 0.4))

        with pytest.raises(exceptions.ConnectionError):
            await within(2.0, hanging)
        assert [record.message for record in caplog.records] == ["Redis requests were cut"]
    await leaks.assert_none()


# -- where it is -----------------------------------------------------------------------------


async def test_refusal_by_all_addresses_of_a_name_is_refused(
    own_redis: RedisServer,
) -> None:
    """For example localhost with IPv6."""
    port = own_redis.port
    own_redis.stop()
    async with opened_with(config_of(host="localhost", port=port)) as client:
        assert (await check_of(client).check()).code == "refused"


async def test_unknown_host_is_unreachable() -> None:
    """Creating the client raises nothing."""
    async with opened_with(config_of(host="redis.invalid", **QUICK)) as client:
        observation = await within(20.0, check_of(client).check())

        assert observation.code == "unreachable"
        assert "redis.invalid" not in observation.message


async def test_lookups_that_hang_leave_the_threads_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Redis is optional: without its name server, all other code of the process goes on."""
    config = config_of(host="redis.silent.test", connect_timeout=0.03, attempts=1)
    with silent_names(monkeypatch):
        async with opened_with(config) as client:
            for _ in range(MANY):
                with pytest.raises(exceptions.TimeoutError):
                    await client.redis.ping()
            await within(20.0, asyncio.to_thread(time.monotonic))


async def test_dropped_packets_are_a_timeout(redis: RedisServer, fault_proxy: FaultProxies) -> None:
    """As behind a firewall; the check also detects the end of it."""
    proxy = fault_proxy(redis.port)
    async with opened(proxy, **QUICK) as client:
        proxy.mode = BLACKHOLE
        check = check_of(client)
        assert (await within(5.0, check.check())).code == "timeout"
        proxy.mode = REFUSE
        assert (await within(5.0, check.check())).code == "refused"
        proxy.mode = PASS
        assert (await within(5.0, check.check())).code is None
