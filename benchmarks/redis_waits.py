"""Cases of ``just bench-waits``: callers of Redis while it fails, and jobs without it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial

from benchmarks.durations import Case, Times, on_a_loop, refused, require, seconds_of
from redis import exceptions
from tests.integration.notifications import QUEUE, Received, listening, notifier_to, notify
from tests.integration.redis_clients import addresses_of, check_of, config_of, opened, opened_with
from tests.servers.fault_proxy import DROP, FaultProxy
from tests.servers.postgres import Database, postgres_server
from tests.servers.redis import redis_server
from tests.servers.sentinel import sentinel_setup
from tests.servers.waiting import until, wait_until
from tests.system.jobs import accept
from tests.system.jobs import until as until_state
from tests.system.service import Service
from tests.system.workers import api, environment_of, worker

from viralfx.adapters.redis import RedisClient, connections
from viralfx.jobs.notifier import NotificationNotSentError

NOT_SENT = (NotificationNotSentError, OSError)
"""The errors of a notification that is not sent."""


async def _refused() -> Times:
    with redis_server() as server:
        server.stop()
        async with opened(server) as client:
            began = time.monotonic()
            with refused(exceptions.ConnectionError):
                await client.redis.get("key")
            took = time.monotonic() - began
            require(client.traffic.failed_attempts == 4, "four attempts")
            require(took >= 3.5, "waits of 0.5, 1 and 2 s")
    return {"Redis stopped: four attempts": took}


async def _fallback(loss: str) -> Times:
    with redis_server() as server:
        async with opened(server) as client:

            async def read() -> None:
                value = await client.get_with_graceful_degradation(
                    partial(client.redis.get, "key"), b"else"
                )
                require(value == b"else", "the fallback")

            await client.redis.set("key", "value")
            await asyncio.to_thread(server.freeze if loss == "frozen" else server.kill)
            first = await seconds_of(read())
            later = [await seconds_of(read()) for _ in range(100)]
            if loss == "frozen":
                server.thaw()
    return {
        f"Redis {loss}: the first fallback of a read": first,
        f"Redis {loss}: each of 100 later ones": max(later),
    }


async def _dropped_redis(*, known: bool) -> Times:
    name = "that the check has seen" if known else "that was not seen"
    with redis_server() as server, FaultProxy(server.port, host=server.host) as proxy:
        async with opened(proxy) as client:
            check = check_of(client)
            await asyncio.gather(*(client.redis.set(f"key{n}", n) for n in range(5)))
            await check.check()
            proxy.mode = DROP
            await asyncio.sleep(connections.IDLE_SECONDS + 0.1)
            if known:
                await check.check()
            first = await seconds_of(client.redis.get("key1"))
            next_five = await seconds_of(
                asyncio.gather(*(client.redis.get(f"key{n}") for n in range(5)))
            )
    return {
        f"Redis, a silent drop {name}: the first read": first,
        f"Redis, a silent drop {name}: the next five": next_five,
    }


async def _demoted() -> Times:
    with (
        redis_server() as old,
        redis_server() as new,
        FaultProxy(old.port, host=old.host) as proxy,
    ):
        async with opened(proxy) as client:
            check = check_of(client)
            await asyncio.gather(*(client.redis.set("key", n) for n in range(10)))
            await check.check()
            old.command("REPLICAOF", "127.0.0.1", 1)
            proxy.upstream = (new.host, new.port)
            await check.check()
            took = await seconds_of(
                asyncio.gather(*(client.redis.set(f"key{n}", n) for n in range(10)))
            )
    return {"Redis, a demoted primary that the check has seen: ten writes at once": took}


async def _notifications() -> Times:
    received = Received()
    with redis_server() as server:
        async with notifier_to(server) as notifier, listening(notifier, received):
            await notify(notifier, "before")
            await until(lambda: received)
            server.flush()
            began = time.monotonic()
            await notify(notifier, "after")
            await until(lambda: "after" in received)
            emptied = time.monotonic() - began
            server.freeze()
            first = await _not_sent(notify(notifier, "first"))
            later = sum([await _not_sent(notify(notifier, "later")) for _ in range(100)])
            server.thaw()
            await until(lambda: notifier.is_connected(QUEUE))
            server.kill()
            await until(lambda: not notifier.is_connected(QUEUE))
            killed = await _not_sent(notify(notifier, "into nothing"))
    return {
        "Redis emptied: until a notification is received": emptied,
        "Redis frozen: the first notification": first,
        "Redis frozen: a hundred later ones": later,
        "Redis killed: a notification": killed,
    }


async def _not_sent(sending: Awaitable[object]) -> float:
    began = time.monotonic()
    with refused(*NOT_SENT):
        await sending
    return time.monotonic() - began


async def _closed_while_frozen() -> Times:
    with redis_server() as server:
        async with notifier_to(server) as notifier:
            async with listening(notifier, Received()):
                server.freeze()
                began = time.monotonic()
            await notifier.close()
            took = time.monotonic() - began
        server.thaw()
    return {"Redis frozen: the end of a listener and of its notifier": took}


async def _failover(how: str) -> Times:
    with sentinel_setup() as setup:
        config = partial(
            config_of,
            sentinel_enabled=True,
            sentinels=addresses_of(setup.sentinels),
            sentinel_name=setup.name,
        )
        async with opened_with(config()) as patient, opened_with(config(attempts=1)) as impatient:
            await patient.redis.set("key", "before")
            await impatient.redis.set("key", "before")
            old = setup.primary_server()
            await asyncio.to_thread(old.kill if how == "killed" else old.freeze)
            began = time.monotonic()
            promoted, without, retried = await asyncio.gather(
                seconds_of(asyncio.to_thread(setup.wait_failover, old)),
                _first_write(impatient, began),
                seconds_of(patient.redis.set("key", "after")),
            )
        if how == "frozen":
            old.thaw()
    name = f"Sentinel, the primary {how}"
    return {
        f"{name}: promotion": promoted,
        f"{name}: the first write without retries": without,
        f"{name}: a write with retries": retried,
    }


async def _first_write(client: RedisClient, since: float) -> float:
    """Write each 20 ms, and return the seconds until the end of the first accepted write."""
    ended = asyncio.get_running_loop().create_future()

    async def write() -> None:
        try:
            await client.redis.set("other", "after")
        except exceptions.RedisError:
            return
        if not ended.done():
            ended.set_result(time.monotonic() - since)

    writes = set()
    while not ended.done():
        writes.add(asyncio.create_task(write()))
        await asyncio.wait({ended}, timeout=0.02)
        require(time.monotonic() - since < 60, "a write is accepted")
    await asyncio.wait(writes)
    return float(await ended)


def _jobs() -> Times:
    with postgres_server() as postgres, redis_server() as server:
        database = Database(postgres, postgres.create_database())
        environment = environment_of(
            database,
            TASK_MODULES="tests.system.fault_tasks",
            REDIS_HOST=server.host,
            REDIS_PORT=str(server.port),
            JOB_LEASE="30000",
            JOB_SWEEP_INTERVAL="30000",
            JOB_POLL_INTERVAL="1000",
        )
        server.stop()
        with api(environment, fresh=True) as service, worker(environment, fresh=True) as process:
            never = _longest(service)
            server.start()
            wait_until(
                lambda: (
                    {"pass"}
                    == {
                        get("/health/redis").json()["status"]
                        for get in (service.get, process.manage)
                    }
                ),
                what="both have Redis",
            )
            emptied = _longest(service, then=server.flush)
            server.stop()
            gone = _longest(service)
    return {
        "Redis not there: the longest wait of 8 jobs": never,
        "Redis emptied: the longest wait of 8 jobs": emptied,
        "Redis stopped: the longest wait of 8 jobs": gone,
    }


def _longest(service: Service, *, then: Callable[[], object] = lambda: None) -> float:
    """Run 8 jobs, one after the other; return the longest time from when it is due to its start."""
    waits = []
    for _ in range(8):
        job_id = accept(service, "faults.work", 0)
        then()
        done = until_state(service, job_id, "completed")
        begun, due = (datetime.fromisoformat(done[name]) for name in ("startedAt", "runAt"))
        waits.append((begun - due).total_seconds())
    return max(waits)


def _failover_limits(how: str) -> Times:
    name = f"Sentinel, the primary {how}"
    # A connection to a frozen server fails after the two seconds of the socket's limit.
    return {
        f"{name}: promotion": 3.0,
        f"{name}: the first write without retries": 3.0 + 2.0,
        f"{name}: a write with retries": 6.0,
    }


CASES = {
    "Redis stopped": on_a_loop({"Redis stopped: four attempts": 5.0}, _refused),
    **{
        f"Redis {loss}": on_a_loop(
            {
                f"Redis {loss}: the first fallback of a read": 1.5,
                f"Redis {loss}: each of 100 later ones": 0.1,
            },
            partial(_fallback, loss),
        )
        for loss in ("frozen", "killed")
    },
    "Redis dropped silently, known": on_a_loop(
        {
            "Redis, a silent drop that the check has seen: the first read": 0.5,
            "Redis, a silent drop that the check has seen: the next five": 0.5,
        },
        partial(_dropped_redis, known=True),
    ),
    "Redis dropped silently, unknown": on_a_loop(
        {
            "Redis, a silent drop that was not seen: the first read": 3.0,
            "Redis, a silent drop that was not seen: the next five": 0.5,
        },
        partial(_dropped_redis, known=False),
    ),
    "Redis demoted": on_a_loop(
        {"Redis, a demoted primary that the check has seen: ten writes at once": 0.5}, _demoted
    ),
    "Redis notifications": on_a_loop(
        {
            "Redis emptied: until a notification is received": 3.0,
            "Redis frozen: the first notification": 2.2,
            "Redis frozen: a hundred later ones": 0.5,
            "Redis killed: a notification": 0.5,
        },
        _notifications,
    ),
    "Redis jobs": Case(
        {
            f"Redis {state}: the longest wait of 8 jobs": 2.0
            for state in ("not there", "emptied", "stopped")
        },
        _jobs,
    ),
    "Redis listener frozen": on_a_loop(
        {"Redis frozen: the end of a listener and of its notifier": 0.5}, _closed_while_frozen
    ),
    "Sentinel killed": on_a_loop(_failover_limits("killed"), partial(_failover, "killed")),
    "Sentinel frozen": on_a_loop(_failover_limits("frozen"), partial(_failover, "frozen")),
}
