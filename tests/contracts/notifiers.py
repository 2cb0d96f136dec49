"""The notifiers that the contract suite of ``JobNotifier`` runs against.

To test a new adapter, add a row to ``SHARING`` or ``BROADCASTING``.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import pytest
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database
from tests.servers.redis import RedisServer
from tests.servers.waiting import until

from viralfx.adapters.redis import RedisClient
from viralfx.adapters.taskiq import StreamNotifier
from viralfx.jobs.memory import MemoryNotifier
from viralfx.jobs.notifier import JobNotification, JobNotifier
from viralfx.jobs.postgres import PostgresNotifier
from viralfx.settings import RedisSettings


@dataclass(frozen=True)
class NotifierPair:
    """Two notifiers of one system, as two processes have them."""

    here: JobNotifier
    there: JobNotifier


Make = Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[NotifierPair]]


@asynccontextmanager
async def _memory(_: pytest.FixtureRequest) -> AsyncIterator[NotifierPair]:
    # It is of one process, so that both ends are one.
    notification = MemoryNotifier()
    yield NotifierPair(notification, notification)
    await notification.close()


@asynccontextmanager
async def _streams(request: pytest.FixtureRequest) -> AsyncIterator[NotifierPair]:
    server: RedisServer = request.getfixturevalue("redis")
    config = RedisSettings(host=server.host, port=server.port)
    clients = RedisClient(config), RedisClient(config)
    here, there = map(StreamNotifier, clients)
    try:
        yield NotifierPair(here, there)
    finally:
        for notifier in (here, there):
            await notifier.close()
        for client in clients:
            await client.close()


@asynccontextmanager
async def _streams_without_taskiq(request: pytest.FixtureRequest) -> AsyncIterator[NotifierPair]:
    # One of two processes has a release of taskiq without the parts that the adapter uses.
    async with _streams(request) as pair:
        assert isinstance(pair.there, StreamNotifier)
        pair.there._do_without("a part")
        yield pair


@asynccontextmanager
async def _postgres(request: pytest.FixtureRequest) -> AsyncIterator[NotifierPair]:
    database: Database = request.getfixturevalue("database")
    async with opened(config_of(database)) as one, opened(config_of(database)) as other:
        here, there = PostgresNotifier(one), PostgresNotifier(other)
        try:
            yield NotifierPair(here, there)
        finally:
            for notifier in (here, there):
                await notifier.close()


SHARING: dict[str, Make] = {
    "memory": _memory,
    "streams": _streams,
    "streams without taskiq": _streams_without_taskiq,
}
"""Each notification goes to one listener."""
BROADCASTING: dict[str, Make] = {"postgres": _postgres}
"""Each notification goes to every listener."""
NOTIFIERS = SHARING | BROADCASTING


@asynccontextmanager
async def listening(
    notifier: JobNotifier,
    on_notification: Callable[[JobNotification], Awaitable[None]],
    *,
    queue: str = "default",
    slots: int = 10,
) -> AsyncIterator["asyncio.Task[None]"]:
    """Listen until the block ends; the task must run until it is cancelled."""
    task = asyncio.create_task(notifier.listen(queue, on_notification, slots))
    try:
        await until(lambda: notifier.is_connected(queue))
        yield task
        assert task.cancelled() or not task.done()
    finally:
        task.cancel()
        async with asyncio.timeout(10.0):
            await asyncio.wait({task})


class RecordingListener:
    """Records notifications; with ``lasts`` each call lasts until :meth:`release`."""

    def __init__(self, *, lasts: bool = False) -> None:
        self.ids: list[str] = []
        self.notifications: list[JobNotification] = []
        self.running = 0
        self.most = 0
        self.cancelled = 0
        self._lasts = lasts
        self._released = asyncio.Event()

    async def __call__(self, notification: JobNotification) -> None:
        """Record a notification."""
        self.notifications.append(notification)
        self.ids.extend(notification.ids)
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
        """Let all calls end, later calls included."""
        self._released.set()
