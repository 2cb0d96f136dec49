"""The transports that the contract of ``JobTransport`` is run against.

A new adapter adds a row to ``TRANSPORTS``.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import pytest
from tests.servers.redis import RedisServer

from viralfx.adapters.memory import MemoryBell
from viralfx.adapters.redis import RedisClient, RedisConfig
from viralfx.adapters.taskiq import StreamTransport
from viralfx.domain.jobs.transport import Bell, JobTransport


@dataclass(frozen=True)
class Line:
    """Two ends of one line, as two processes have them; what one rings, either may hear."""

    here: JobTransport
    there: JobTransport


Make = Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[Line]]


@asynccontextmanager
async def _memory(_: pytest.FixtureRequest) -> AsyncIterator[Line]:
    # It is of one process, so that both ends are one.
    bell = MemoryBell()
    yield Line(bell, bell)
    await bell.close()


@asynccontextmanager
async def _streams(request: pytest.FixtureRequest) -> AsyncIterator[Line]:
    server: RedisServer = request.getfixturevalue("redis")
    config = RedisConfig(host=server.host, port=server.port)
    clients = RedisClient(config), RedisClient(config)
    here, there = map(StreamTransport, clients)
    try:
        yield Line(here, there)
    finally:
        for transport in (here, there):
            await transport.close()
        for client in clients:
            await client.close()


TRANSPORTS: dict[str, Make] = {"memory": _memory, "streams": _streams}


async def until(look: Callable[[], object], *, seconds: float = 10.0) -> None:
    """Wait until what is looked at is true; fail when it is not in time."""
    async with asyncio.timeout(seconds):
        while True:
            if look():
                return
            await asyncio.sleep(0.005)


@asynccontextmanager
async def listening(
    transport: JobTransport,
    hear: Callable[[Bell], Awaitable[None]],
    *,
    queue: str = "default",
    slots: int = 10,
) -> AsyncIterator["asyncio.Task[None]"]:
    """Listen until the end; the task must run until it is cancelled."""
    task = asyncio.create_task(transport.listen(queue, hear, slots))
    try:
        await until(lambda: transport.hears(queue))
        yield task
        assert task.cancelled() or not task.done()
    finally:
        task.cancel()
        async with asyncio.timeout(10.0):
            await asyncio.wait({task})


class Hearing:
    """Keeps the ids of the bells it hears; each call lasts until :meth:`release`, when asked to."""

    def __init__(self, *, lasts: bool = False) -> None:
        self.ids: list[str] = []
        self.bells: list[Bell] = []
        self.running = 0
        self.most = 0
        self.cancelled = 0
        self._lasts = lasts
        self._released = asyncio.Event()

    async def __call__(self, bell: Bell) -> None:
        """Hear a bell."""
        self.bells.append(bell)
        self.ids.extend(bell.ids)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self._lasts:
                await self._released.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def release(self) -> None:
        """Let all calls end, those to come too."""
        self._released.set()
