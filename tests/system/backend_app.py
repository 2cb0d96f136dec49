"""An application whose handlers use Postgres, Redis and the cache."""

import asyncio

from litestar import Litestar, get, post

from viralfx import OperationsPlugin

plugin = OperationsPlugin()


@get("/query")
async def query() -> dict[str, int]:
    """Run a cheap query."""
    async with plugin.database.acquire() as connection:
        return {"answer": await connection.fetchval("SELECT 42")}


@get("/slow-query/{seconds:float}")
async def slow_query(seconds: float) -> dict[str, bool]:
    """Hold a connection of the pool for ``seconds``."""
    async with plugin.database.acquire() as connection:
        await connection.execute(f"SELECT pg_sleep({seconds}), 'planted-literal'")
    return {"done": True}


@post("/retried", status_code=200)
async def retried() -> dict[str, bool]:
    """Write one row, with retry."""
    await plugin.database.execute_with_retry(
        lambda connection: connection.execute("INSERT INTO written DEFAULT VALUES"), attempts=5
    )
    return {"done": True}


@get("/cached")
async def cached() -> dict[str, str]:
    """Read a key as in docs/operations.md, with a fallback for an outage of Redis."""
    value = await plugin.redis.get_with_graceful_degradation(
        lambda: plugin.redis.redis.get("planted"), b"fallback"
    )
    if value is None:
        return {"value": "nothing"}
    return {"value": value if isinstance(value, str) else value.decode()}


@post("/counter", status_code=200)
async def counter() -> dict[str, int]:
    """Increment a counter in Redis, with the client's own retries."""
    return {"count": await plugin.redis.redis.incr("counter")}


@get("/tasks")
async def tasks() -> dict[str, int]:
    """Return the number of asyncio tasks, to find leaks."""
    return {"tasks": len(asyncio.all_tasks())}


app = Litestar([query, slow_query, retried, cached, counter, tasks], plugins=[plugin])
