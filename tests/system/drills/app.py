"""An application with common mistakes, for the drills."""

import asyncio
import os
import time

from litestar import Litestar, get, post
from litestar.params import FromPath

from viralfx import OperationsPlugin

plugin = OperationsPlugin()
_kept: list[object] = []
_RELEASE = os.environ.get("RELEASE", "1")


@get("/orders/{number:int}")
async def order(number: FromPath[int]) -> dict[str, int]:
    """Change a row that another transaction may have locked."""
    async with plugin.database.acquire() as connection:
        seen = "UPDATE orders SET seen = seen + 1 WHERE number = $1 RETURNING seen"
        return {"seen": await connection.fetchval(seen, number)}


@get("/reports/{seconds:float}")
async def report(seconds: FromPath[float]) -> dict[str, bool]:
    """Run a query that takes ``seconds``."""
    async with plugin.database.acquire() as connection:
        await connection.execute("SELECT pg_sleep($1)", seconds)
    return {"done": True}


@get("/cached")
async def cached() -> dict[str, bool]:
    """Read from Redis, with a fallback for an outage."""
    read = await plugin.redis.get_with_graceful_degradation(
        lambda: plugin.redis.redis.get("planted"), b"fallback"
    )
    return {"fallback": read == b"fallback"}


@post("/uploads/{mebibytes:int}")
async def upload(mebibytes: FromPath[int]) -> None:
    """Allocate memory and never release it."""
    for _ in range(mebibytes):
        _kept.append(bytearray(b"x" * 2**20))
        await asyncio.sleep(0)


@get("/login")
async def login() -> dict[str, str]:
    """Check a password; the second release computes on the event loop."""
    if _RELEASE == "2":
        hash_password()
    return {"user": "example"}


def hash_password() -> None:
    """Use the processor for a while."""
    time.sleep(0.7)


app = Litestar([order, report, cached, upload, login], plugins=[plugin])
