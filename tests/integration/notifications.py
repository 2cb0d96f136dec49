"""Stream notifiers over real Redis servers, and listeners that record notifications."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.integration.redis_clients import Address, RedisConfig, config_of
from tests.servers.waiting import until

from viralfx.adapters.redis import RedisClient
from viralfx.adapters.taskiq import StreamNotifier
from viralfx.jobs.notifier import JobNotification

QUEUE = "default"
STREAM = f"viralfx:notifications:{QUEUE}"


class Received(list[str]):
    """The ids of the received notifications, in order."""

    async def __call__(self, notification: JobNotification) -> None:
        """Record a notification."""
        self += notification.ids


@asynccontextmanager
async def notifier_with(config: RedisConfig, **more: Any) -> AsyncIterator[StreamNotifier]:
    """Return a notifier with its own client; both are closed at the end."""
    client = RedisClient(*config)
    notifier = StreamNotifier(client, **more)
    try:
        yield notifier
    finally:
        await notifier.close()
        await client.close()


@asynccontextmanager
async def notifier_to(server: Address, **more: Any) -> AsyncIterator[StreamNotifier]:
    """Return a notifier for a server, closed at the end."""
    async with notifier_with(config_of(host=server.host, port=server.port), **more) as notifier:
        yield notifier


@asynccontextmanager
async def listening(
    notifier: StreamNotifier,
    on_notification: Callable[[JobNotification], Awaitable[None]],
    *,
    slots: int = 10,
    at_once: bool = True,
) -> AsyncIterator[asyncio.Task[None]]:
    """Listen until the block ends; ``at_once``: first wait until the listener is connected."""
    task = asyncio.create_task(notifier.listen(QUEUE, on_notification, slots))
    try:
        if at_once:
            await until(lambda: notifier.is_connected(QUEUE))
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled(), task


async def notify(notifier: StreamNotifier, *ids: str) -> None:
    """Send one notification for each id."""
    for job in ids:
        await notifier.notify(JobNotification(QUEUE, (job,)))


async def notify_until_sent(notifier: StreamNotifier, job: str, *, seconds: float = 20.0) -> None:
    """Send a notification again until it succeeds."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                await notify(notifier, job)
            except Exception:  # noqa: BLE001 - the port's OSError and ViralFXError
                await asyncio.sleep(0.02)
            else:
                return


def messages_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages about notifications, and those of taskiq."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith(("viralfx.queues", "taskiq")) and record.levelno > logging.DEBUG
    ]
