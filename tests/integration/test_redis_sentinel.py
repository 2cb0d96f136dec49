"""A real primary, replica and three Sentinels: failover during requests."""

import asyncio
import time
from collections import Counter
from typing import Any

import pytest
from redis import exceptions
from tests.integration.leaks import LeakCheck
from tests.integration.redis_clients import (
    QUICK,
    RedisConfig,
    addresses_of,
    check_of,
    config_of,
    opened_with,
    within,
)
from tests.servers.fault_proxy import BLACKHOLE
from tests.servers.fixtures import FaultProxies
from tests.servers.sentinel import SentinelSetup
from tests.servers.waiting import until, wait_for_code
from tests.soak import SOAK

from viralfx.adapters.redis import RedisClient, close_redis

pytestmark = pytest.mark.timeout(80)

RATE = 40
"""Reads and writes per second, one of each for every number."""
WAITS = 3.5
"""Seconds from the first attempt of a request to its last one, by :class:`RedisLimits`."""


def behind_sentinel(setup: SentinelSetup, **more: Any) -> RedisConfig:
    """Return the configuration of a client behind Sentinel."""
    return config_of(
        **{
            "sentinel_enabled": True,
            "sentinels": addresses_of(setup.sentinels),
            "sentinel_name": setup.name,
            "sentinel_password": setup.sentinel_password,
            "password": setup.password,
            **more,
        }
    )


class Load:
    """Writes and reads back numbers at a fixed rate until it is stopped."""

    def __init__(self, client: RedisClient, name: str) -> None:
        self.done = 0
        self.in_a_row = 0
        """Requests since the last failed one."""
        self.failures: Counter[str] = Counter()
        self.failed_at: list[float] = []
        """When those requests were begun that failed."""
        self._client = client
        self._name = name
        self._requests: set[asyncio.Task[None]] = set()
        self._stopped = False
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Make no more requests, and wait for the running ones."""
        self._stopped = True
        await self._task
        if self._requests:
            await asyncio.wait(self._requests)

    async def _run(self) -> None:
        began = time.monotonic()
        number = 0
        while not self._stopped:
            number += 1
            request = asyncio.create_task(self._one(number))
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)
            # Open loop: slow requests do not delay later ones.
            await asyncio.sleep(max(0.0, began + number / RATE - time.monotonic()))

    async def _one(self, number: int) -> None:
        key, began = f"{self._name}:{number}", time.monotonic()
        try:
            await self._client.redis.set(key, number)
            value = await self._client.redis.get(key)
        except exceptions.RedisError as error:
            self.failures[type(error).__name__] += 1
            self.failed_at.append(began)
            self.in_a_row = 0
            return
        # A failover may lose accepted writes: replication is asynchronous.
        if value in {b"%d" % number, None}:
            self.done += 1
            self.in_a_row += 1
        else:
            self.failures["wrong answer"] += 1


@pytest.mark.soak
@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_no_request_fails_during_a_failover(sentinel_setup: SentinelSetup, how: str) -> None:
    """With retries; without them, only requests during the failover fail."""
    async with (
        opened_with(behind_sentinel(sentinel_setup)) as client,
        opened_with(behind_sentinel(sentinel_setup, attempts=1)) as impatient,
    ):
        check = check_of(client)
        assert (await check.check()).code is None
        old = sentinel_setup.primary_server()
        patient_load, impatient_load = Load(client, "a"), Load(impatient, "b")
        await until(lambda: patient_load.done > RATE and impatient_load.done > RATE)
        gone = time.monotonic()
        await asyncio.to_thread(old.kill if how == "killed" else old.freeze)
        new = await asyncio.to_thread(sentinel_setup.wait_failover, old)
        took = time.monotonic() - gone
        done = patient_load.done
        await until(lambda: patient_load.done > done + 2 * RATE, seconds=20.0)
        await until(lambda: impatient_load.in_a_row > RATE, seconds=20.0)
        await patient_load.stop()
        await impatient_load.stop()
        observation: Any = await wait_for_code(check, None)

        # A busy machine may delay the vote beyond the last attempt.
        if SOAK or took < WAITS:
            assert patient_load.failures == Counter()
            assert client.traffic.failed == 0
        assert impatient_load.failures.total() > 0
        assert min(impatient_load.failed_at) > gone - impatient.limits.socket_timeout
        assert observation.details["config"] == {"host": new.host, "port": new.port, "db": 0}
        assert client.address == (new.host, new.port)
        old.thaw()


async def test_former_primary_is_not_used_as_a_replica(
    sentinel_setup: SentinelSetup,
) -> None:
    """After a manual failover it gets neither reads nor writes."""
    async with opened_with(behind_sentinel(sentinel_setup)) as client:
        check = check_of(client)
        await check.check()
        await client.redis.set("key", "old")
        old = await asyncio.to_thread(sentinel_setup.fail_over)
        new = await asyncio.to_thread(sentinel_setup.wait_failover, old)
        # Until it notices the failover, the old primary accepts writes, which are lost by design.
        await asyncio.to_thread(sentinel_setup.wait_follows, old)
        assert await within(10.0, client.redis.set("key", "new")) is True
        observation: Any = await wait_for_code(check, None)

        assert observation.details["config"]["port"] == new.port
        assert new.command("GET", "key") == "new"
        assert client.traffic.failed == 0


async def test_unavailable_sentinel_is_skipped(
    sentinel_setup: SentinelSetup, fault_proxy: FaultProxies
) -> None:
    """The next one is asked, and the failed one moves to the end of the list."""
    first, second, third = sentinel_setup.sentinel_servers
    silent = fault_proxy(second.port)
    silent.mode = BLACKHOLE
    places = [(first.host, first.port), (silent.host, silent.port), (third.host, third.port)]
    await asyncio.to_thread(first.kill)
    async with opened_with(
        behind_sentinel(sentinel_setup, sentinels=addresses_of(places))
    ) as client:
        assert (await check_of(client).check()).code is None
        assert silent.accepted == 1
        # The pool has no connection yet, so it asks for the primary once more.
        assert await client.redis.ping() is True
        assert silent.accepted == 1


async def test_concurrent_connections_share_one_search(
    sentinel_setup: SentinelSetup, fault_proxy: FaultProxies
) -> None:
    """Fifty requests, one search, one connection to a sentinel."""
    server = sentinel_setup.sentinel_servers[0]
    proxy = fault_proxy(server.port)
    config = behind_sentinel(sentinel_setup, sentinels=addresses_of([(proxy.host, proxy.port)]))
    async with opened_with(config) as client:
        await asyncio.gather(*(client.redis.ping() for _ in range(50)))

        assert proxy.accepted == 1


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"sentinel_password": "wrong"}, "auth"),
        ({"password": "wrong"}, "auth"),
        ({"sentinel_name": "another"}, "unknown_primary"),
    ],
)
async def test_wrong_setting_is_reported_without_retries(
    sentinel_setup: SentinelSetup, more: dict[str, str], code: str
) -> None:
    """Of the sentinels or of the servers."""
    async with opened_with(behind_sentinel(sentinel_setup, **more)) as client:
        observation = await check_of(client).check()
        with pytest.raises(exceptions.RedisError):
            await within(1.0, client.redis.get("key"))

        assert observation.code == code
        assert "wrong" not in observation.message
        named = "no primary named 'another'; correct REDIS_SENTINEL_NAME"
        assert (named in observation.message) is (code == "unknown_primary")


async def test_failure_of_all_sentinels_is_reported(sentinel_setup: SentinelSetup) -> None:
    """The check reports their errors; an open connection stays in use."""
    leaks = LeakCheck()
    async with opened_with(behind_sentinel(sentinel_setup, **QUICK)) as client:
        await client.redis.ping()
        for sentinel in sentinel_setup.sentinel_servers:
            await asyncio.to_thread(sentinel.kill)
        assert await client.redis.ping() is True
        observation: Any = await check_of(client).check()

        assert observation.code == ("refused" if sentinel_setup.refuses else "lost")
        assert observation.details["config"]["port"] == client.address[1]
        await within(1.0, close_redis(client, 5.0))
    await leaks.assert_none()


async def test_missing_primary_is_a_lost_connection(sentinel_setup: SentinelSetup) -> None:
    """Both servers are down and the sentinels know it."""
    async with opened_with(behind_sentinel(sentinel_setup, **QUICK)) as client:
        check = check_of(client)
        assert client.address == (sentinel_setup.name, 0)
        await check.check()
        for server in sentinel_setup.servers:
            await asyncio.to_thread(server.kill)
        await wait_for_code(check, "lost")

        assert not client.available
        assert await client.get_with_graceful_degradation(client.redis.ping, False) is False
