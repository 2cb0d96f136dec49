"""An application of somebody else: its own check, its own stage, the operations layer around it.

viralfx serve --app docs.examples.orders:app
"""

import asyncio

from litestar import Litestar, get, post

from viralfx import Observation, OperationsConfig, OperationsPlugin, Status

orders: asyncio.Queue[str] = asyncio.Queue(maxsize=100)


class RoomForOrders:
    """Warns when the backlog is nearly full: an instance that cannot take more should say so."""

    async def check(self) -> Observation:
        details = {"waiting": orders.qsize(), "limit": orders.maxsize}
        if orders.qsize() >= orders.maxsize * 0.8:
            return Observation(
                status=Status.WARN, message="Few places left", details=details, code="backlog"
            )
        return Observation(status=Status.PASS, message="Room for orders", details=details)


class ShipWhatWaits:
    """Ships the orders that still wait, before the process stops."""

    async def run(self, budget: float) -> None:
        while not orders.empty():
            print("shipped", orders.get_nowait(), flush=True)


@post("/orders/{name:str}", status_code=202)
async def take(name: str) -> dict[str, int]:
    await orders.put(name)
    return {"waiting": orders.qsize()}


@get("/")
async def index() -> dict[str, int]:
    return {"waiting": orders.qsize()}


config = OperationsConfig(
    checks={"orders": RoomForOrders()}, drain_stages={"orders": ShipWhatWaits()}
)
app = Litestar([take, index], plugins=[OperationsPlugin(config)])
