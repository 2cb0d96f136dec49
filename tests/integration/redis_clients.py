"""Clients of the Redis servers of a test, and what they must not leave behind."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import psutil

from viralfx.adapters.redis import RedisClient, RedisConfig, RedisHealthCheck
from viralfx.domain.clock import SystemClock
from viralfx.domain.health import Observation

T = TypeVar("T")

QUICK: dict[str, Any] = {"retry_base": 0.005, "socket_timeout": 0.2}
"""For tests that are about something else than how long it takes.

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


@asynccontextmanager
async def opened(
    server: Address, *, on_doubt: Callable[[], object] = lambda: None, **more: Any
) -> AsyncIterator[RedisClient]:
    """Return a client of the server, closed at the end."""
    config = RedisConfig(host=server.host, port=server.port, **more)
    async with opened_with(config, on_doubt=on_doubt) as client:
        yield client


@asynccontextmanager
async def opened_with(
    config: RedisConfig, *, on_doubt: Callable[[], object] = lambda: None
) -> AsyncIterator[RedisClient]:
    """Return a client, closed at the end."""
    client = RedisClient(config, on_doubt=on_doubt)
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


async def seen(check: RedisHealthCheck, code: str | None, *, seconds: float = 20.0) -> Observation:
    """Check until the code is seen."""
    async with asyncio.timeout(seconds):
        while True:
            if (observation := await check.check()).code == code:
                return observation
            await asyncio.sleep(0.01)


async def until(look: Callable[[], object], *, seconds: float = 5.0) -> None:
    """Wait until what is looked at is true; fail when it is not in time."""
    async with asyncio.timeout(seconds):
        while True:
            if look():
                return
            await asyncio.sleep(0.005)


class Possessions:
    """The open files and the tasks of this process, compared with those at the beginning."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._files, self._tasks = self._process.num_fds(), asyncio.all_tasks()

    async def as_before(self) -> None:
        """Wait until there is nothing more; fail when that does not come."""
        try:
            await until(lambda: not self._more())
        except TimeoutError:
            raise AssertionError(f"left behind: {self._more()}") from None

    def _more(self) -> str:
        files = self._process.num_fds() - self._files
        tasks = asyncio.all_tasks() - self._tasks
        return f"{files} files, {tasks}" if files > 0 or tasks else ""
