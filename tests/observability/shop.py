"""An application whose routes cause everything that the dashboard shows."""

import asyncio
import os
from typing import Any

from litestar import Litestar, get, post
from litestar.exceptions import ServiceUnavailableException

from viralfx import CircuitBreaker, CircuitOpenError, OperationsConfig, OperationsPlugin, retry
from viralfx.resilience.policy import RetryBudget


class _AwayError(Exception):
    """The supplier does not respond."""


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
    """Query Redis and Postgres."""
    await plugin.redis.get_with_graceful_degradation(
        lambda: plugin.redis.redis.get(f"order:{order}"), None
    )
    async with plugin.database.acquire() as connection:
        return {"order": await connection.fetchval("SELECT $1::int", order)}


@get("/reports/{seconds:float}")
async def report(seconds: float) -> dict[str, float]:
    """Hold a connection of the pool for the requested time."""
    async with plugin.database.acquire() as connection:
        await connection.execute("SELECT pg_sleep($1)", seconds)
    return {"took": seconds}


@post("/mistakes", status_code=200)
async def mistake() -> dict[str, int]:
    """Send a statement that Postgres rejects."""
    async with plugin.database.acquire() as connection:
        return {"answer": await connection.fetchval("SELECT 1 / 0")}


@post("/counter", status_code=200)
async def counter() -> dict[str, int]:
    """Increment a counter in Redis; fails without Redis."""
    return {"count": await plugin.redis.redis.incr("counter")}


@get("/prices")
async def price() -> dict[str, int]:
    """Call a supplier with a circuit breaker and retries."""
    try:
        return {"price": await persistence(breaker(supplier.price))()}
    except (CircuitOpenError, _AwayError) as error:
        raise ServiceUnavailableException from error


@post("/supplier/{place:str}", status_code=200)
async def change(place: str) -> None:
    """Switch the supplier to ``away`` or ``back``."""
    supplier.away = place == "away"


@post("/jobs", status_code=202)
async def ask(data: dict[str, Any]) -> dict[str, str]:
    """Submit a job."""
    accepted = await plugin.jobs.submit(data["task"], data["payload"])
    return {"id": accepted.job.id}


async def close() -> None:
    """Wait for the time that the environment sets."""
    await asyncio.sleep(float(os.environ.get("SHOP_CLOSING_SECONDS", "0")))


app = Litestar(
    [order, report, mistake, counter, price, change, ask], plugins=[plugin], on_shutdown=[close]
)
