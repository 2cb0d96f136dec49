"""An application with a check and a stage of its own inside the operations layer.

viralfx serve --app docs.examples.orders:app
"""

import asyncio

from litestar import Litestar, get, post

from viralfx import Observation, OperationsConfig, OperationsPlugin, Status

orders: asyncio.Queue[str] = asyncio.Queue(maxsize=100)


class OrderBacklog:
    """Warns when the backlog is nearly full."""

    async def check(self) -> Observation:
        details = {"waiting": orders.qsize(), "limit": orders.maxsize}
        if orders.qsize() >= orders.maxsize * 0.8:
            return Observation(
                status=Status.WARN, message="Few places left", details=details, code="backlog"
            )
        return Observation(
            status=Status.PASS, message="The backlog has free places", details=details
        )


class ShipWaitingOrders:
    """Ships the waiting orders before the process stops."""

    async def run(self, budget: float) -> None:
        while not orders.empty():
            # One write, so that no log line of another thread divides it.
            print(f"shipped {orders.get_nowait()}\n", end="", flush=True)


@post("/orders/{name:str}", status_code=202)
async def accept(name: str) -> dict[str, int]:
    await orders.put(name)
    return {"waiting": orders.qsize()}


@get("/")
async def index() -> dict[str, int]:
    return {"waiting": orders.qsize()}


config = OperationsConfig(
    checks={"orders": OrderBacklog()}, drain_stages={"orders": ShipWaitingOrders()}
)
app = Litestar([accept, index], plugins=[OperationsPlugin(config)])
