"""Transports of bells over real Redis servers, and who listens to them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.integration.redis_clients import Address, until

from viralfx.adapters.redis import RedisClient, RedisConfig
from viralfx.adapters.taskiq import StreamTransport
from viralfx.domain.jobs.transport import Bell

QUEUE = "default"
STREAM = f"viralfx:bells:{QUEUE}"


class Heard(list[str]):
    """The ids of the bells that were heard, in order."""

    async def __call__(self, bell: Bell) -> None:
        """Hear one."""
        self += bell.ids


@asynccontextmanager
async def transport_with(config: RedisConfig, **more: Any) -> AsyncIterator[StreamTransport]:
    """Return a transport with a client of its own, both closed at the end."""
    client = RedisClient(config)
    transport = StreamTransport(client, **more)
    try:
        yield transport
    finally:
        await transport.close()
        await client.close()


@asynccontextmanager
async def transport_to(server: Address, **more: Any) -> AsyncIterator[StreamTransport]:
    """Return a transport over a server, closed at the end."""
    async with transport_with(RedisConfig(host=server.host, port=server.port), **more) as transport:
        yield transport


@asynccontextmanager
async def listening(
    transport: StreamTransport,
    hear: Callable[[Bell], Awaitable[None]],
    *,
    slots: int = 10,
    at_once: bool = True,
) -> AsyncIterator[asyncio.Task[None]]:
    """Listen, from when bells are heard (unless not ``at_once``) to the end."""
    task = asyncio.create_task(transport.listen(QUEUE, hear, slots))
    try:
        if at_once:
            await until(lambda: transport.hears(QUEUE))
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled(), task


async def ring(transport: StreamTransport, *ids: str) -> None:
    """Ring one bell for each id."""
    for job in ids:
        await transport.ring(Bell(QUEUE, (job,)))


async def ring_until_sent(transport: StreamTransport, job: str, *, seconds: float = 20.0) -> None:
    """Ring until it can be sent, as whoever relays does."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                await ring(transport, job)
            except Exception:  # noqa: BLE001 - the port's OSError and ViralFXError
                await asyncio.sleep(0.02)
            else:
                return


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged about bells, and by taskiq."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith(("viralfx.queues", "taskiq")) and record.levelno > logging.DEBUG
    ]
