"""An application that does everything that the dashboard shows, when it is asked to."""

import asyncio
import os
from typing import Any

from litestar import Litestar, get, post
from litestar.exceptions import ServiceUnavailableException

from viralfx import CircuitBreaker, CircuitOpenError, OperationsConfig, OperationsPlugin, retry
from viralfx.domain.resilience.budget import RetryBudget


class _AwayError(Exception):
    """The supplier does not answer."""


class _Supplier:
    away = False

    async def price(self) -> int:
        await asyncio.sleep(0.005)
        if self.away:
            raise _AwayError
        return 42


supplier = _Supplier()
breaker = CircuitBreaker(name="supplier", failure_threshold=6, open_for=3.0)
persistence = retry(
    attempts=3, base_delay=0.05, name="supplier", budget=RetryBudget(ratio=0.2, per_second=1)
)
plugin = OperationsPlugin(OperationsConfig(breakers=[breaker], retriers=[persistence]))


@get("/orders/{order:int}")
async def order(order: int) -> dict[str, int]:
    """Look into Redis and Postgres."""
    await plugin.redis.get_with_graceful_degradation(
        lambda: plugin.redis.redis.get(f"order:{order}"), None
    )
    async with plugin.database.acquire() as connection:
        return {"order": await connection.fetchval("SELECT $1::int", order)}


@get("/reports/{seconds:float}")
async def report(seconds: float) -> dict[str, float]:
    """Hold a connection of the pool for as long as asked."""
    async with plugin.database.acquire() as connection:
        await connection.execute("SELECT pg_sleep($1)", seconds)
    return {"took": seconds}


@post("/mistakes", status_code=200)
async def mistake() -> dict[str, int]:
    """Send a statement that Postgres refuses."""
    async with plugin.database.acquire() as connection:
        return {"answer": await connection.fetchval("SELECT 1 / 0")}


@post("/counter", status_code=200)
async def counter() -> dict[str, int]:
    """Count in Redis, which fails without it."""
    return {"count": await plugin.redis.redis.incr("counter")}


@get("/prices")
async def price() -> dict[str, int]:
    """Ask a supplier, behind a circuit and with retries."""
    try:
        return {"price": await persistence(breaker(supplier.price))()}
    except (CircuitOpenError, _AwayError) as error:
        raise ServiceUnavailableException from error


@post("/supplier/{place:str}", status_code=200)
async def change(place: str) -> None:
    """Let the supplier go ``away``, or be ``back``."""
    supplier.away = place == "away"


@post("/jobs", status_code=202)
async def ask(data: dict[str, Any]) -> dict[str, str]:
    """Have a job accepted."""
    accepted = await plugin.jobs.submit(data["task"], data["payload"])
    return {"id": accepted.job.id}


async def close() -> None:
    """Take as long to close as the environment says."""
    await asyncio.sleep(float(os.environ.get("SHOP_CLOSING_SECONDS", "0")))


app = Litestar(
    [order, report, mistake, counter, price, change, ask], plugins=[plugin], on_shutdown=[close]
)
