"""An application whose orders fail at times, for the pictures of the operations console."""

import asyncio
from typing import Annotated

from litestar import Litestar, get
from litestar.params import QueryParameter

from viralfx import CircuitBreaker, OperationsConfig, OperationsPlugin, task


@task("orders.bill")
async def bill(order: int) -> str:
    """Fail for most orders."""
    if order % 4:
        raise ConnectionError("the printer does not answer")
    return f"order {order} is billed"


@task("orders.ship")
async def ship(seconds: float) -> None:
    """Take a time."""
    await asyncio.sleep(seconds)


@get("/report")
async def report(seconds: Annotated[float, QueryParameter()]) -> None:
    """Respond after a time."""
    await asyncio.sleep(seconds)


plugin = OperationsPlugin(
    OperationsConfig(jobs_api=True, tasks=[bill, ship], breakers=[CircuitBreaker(name="carrier")])
)
app = Litestar([report], plugins=[plugin])
