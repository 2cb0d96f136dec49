"""Clients of the Redis servers of a test, and checks for leaks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

from viralfx.adapters.redis import RedisClient, RedisHealthCheck, RedisLimits
from viralfx.core.clock import SystemClock
from viralfx.settings import RedisSettings, Secret

T = TypeVar("T")

QUICK: dict[str, Any] = {"retry_base": 0.01, "socket_timeout": 0.2}
"""Short limits, for tests that do not measure time.

One attempt may be late where much else runs. Four are not, so nothing is cut before them.
"""


class Address(Protocol):
    """A server, or what stands in front of one."""

    @property
    def host(self) -> str:
        """Where it is."""
        ...

    @property
    def port(self) -> int:
        """And its port."""
        ...


def addresses_of(sentinels: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Return the addresses of Sentinels as ``REDIS_SENTINELS`` has them."""
    return tuple(f"{host}:{port}" for host, port in sentinels)


class RedisConfig(NamedTuple):
    """The first two arguments of :class:`RedisClient`."""

    settings: RedisSettings
    limits: RedisLimits


def config_of(**more: Any) -> RedisConfig:
    """Return settings and limits, each with its fields of ``more``; passwords are plain text."""
    limits = {name: more.pop(name) for name in tuple(more) if hasattr(RedisLimits(), name)}
    for name in ("password", "sentinel_password"):
        if more.get(name) is not None:
            more[name] = Secret(more[name])
    return RedisConfig(RedisSettings(**more), RedisLimits(**limits))


@asynccontextmanager
async def opened(
    server: Address, *, on_suspected_outage: Callable[[], object] = lambda: None, **more: Any
) -> AsyncIterator[RedisClient]:
    """Return a client of the server, closed at the end."""
    config = config_of(host=server.host, port=server.port, **more)
    async with opened_with(config, on_suspected_outage=on_suspected_outage) as client:
        yield client


@asynccontextmanager
async def opened_with(
    config: RedisConfig, *, on_suspected_outage: Callable[[], object] = lambda: None
) -> AsyncIterator[RedisClient]:
    """Return a client, closed at the end."""
    client = RedisClient(*config, on_suspected_outage=on_suspected_outage)
    try:
        yield client
    finally:
        await client.close()


def check_of(client: RedisClient) -> RedisHealthCheck:
    """Return the health check."""
    return RedisHealthCheck(client, SystemClock())


async def within(seconds: float, work: Awaitable[T]) -> T:
    """Return what is awaited; fail when it takes longer."""
    async with asyncio.timeout(seconds):
        return await work
