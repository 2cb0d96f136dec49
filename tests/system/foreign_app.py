"""An application whose plain functions use the plugin on event loops of their own."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from litestar import Litestar, get
from litestar.params import FromPath

from viralfx import OperationsConfig, OperationsPlugin, task


@task("foreign.note")
async def note(number: int) -> int:
    """Return the number."""
    return number


@task("foreign.plain")
def plain(number: int) -> int:
    """Use everything from a thread, and submit two jobs."""
    asyncio.run(use("jobs", number))
    plugin.jobs.submit_sync(note, number)
    for each in ("cache", "database", "redis"):
        asyncio.run(use(each, number))
    return number


@task("foreign.native")
async def native(number: int) -> int:
    """Submit a job from the event loop of the worker."""
    await plugin.jobs.submit(note, number)
    return number


async def use(service: str, number: int) -> str:
    """Call one of the services, and return a short answer."""
    calls: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "jobs": lambda: _submit(number),
        "cache": lambda: plugin.cache.get_or_load_value(f"n{number}", 60, _value(number), int),
        "database": lambda: plugin.database.execute_with_retry(
            lambda connection: connection.fetchval("SELECT $1::int", number)
        ),
        "redis": lambda: _redis(number),
    }
    return str(await calls[service]())


async def _submit(number: int) -> str:
    accepted = await plugin.jobs.submit(note, number)
    return (await plugin.jobs.get(accepted.job.id)).task


def _value(number: int) -> Callable[[], Coroutine[Any, Any, int]]:
    async def load() -> int:
        # The connection belongs to the event loop of the application, and so does the loader.
        async with plugin.database.acquire() as connection:
            value: int = await connection.fetchval("SELECT $1::int", number)
        return value

    return load


async def _redis(number: int) -> int:
    client = plugin.redis.redis
    await client.set(f"foreign{number}", number)
    async with client.pipeline() as pipeline:
        _ = pipeline.get(f"foreign{number}")
        await pipeline.execute()
    found = await plugin.redis.get_with_graceful_degradation(
        lambda: client.get(f"foreign{number}"), b"-1"
    )
    return int(found or 0)


@get("/plain/{service:str}/{number:int}", sync_to_thread=True)
def foreign(service: FromPath[str], number: FromPath[int]) -> str:
    """Call a service on a loop of this thread."""
    return asyncio.run(use(service, number))


@get("/blocking/{number:int}", sync_to_thread=True)
def blocking(number: FromPath[int]) -> str:
    """Submit without an event loop."""
    return plugin.jobs.submit_sync(note, number).job.task


@get("/native/{service:str}/{number:int}")
async def own(service: FromPath[str], number: FromPath[int]) -> str:
    """Call a service on the loop of the application."""
    return await use(service, number)


@get("/acquire", sync_to_thread=True)
def acquire() -> str:
    """Ask for a connection of another loop."""

    async def connect() -> None:
        async with plugin.database.acquire():
            raise AssertionError

    try:
        asyncio.run(connect())
    except RuntimeError as error:
        return str(error)
    return "acquired"


@get("/on-the-loop", sync_to_thread=False)
def on_the_loop() -> str:
    """Block the event loop of the application."""
    try:
        plugin.jobs.submit_sync(note, 1)
    except RuntimeError as error:
        return str(error)
    return "submitted"


plugin = OperationsPlugin(OperationsConfig(tasks=[note, plain, native]))
app = Litestar([foreign, blocking, own, acquire, on_the_loop], plugins=[plugin])
