"""An application that ships orders by jobs; each accepted order is shipped after any fault.

viralfx serve --app docs.examples.shipping:app
"""

import logging
from dataclasses import dataclass

from litestar import Litestar, post
from litestar.params import JSONBody

from viralfx import JobContext, OperationsPlugin, task

logger = logging.getLogger(__name__)


@dataclass
class Parcel:
    order: str
    weight: float


@task("shipping.ship", timeout=30.0)
async def ship(parcel: Parcel, context: JobContext) -> str:
    # It may run twice if a worker dies; pass the job's id to the carrier to detect the repetition.
    logger.info("Order shipped", extra={"order": parcel.order, "attempt": context.attempt})
    return f"{parcel.order} weighs {parcel.weight:g} kg"


@post("/orders", status_code=202)
async def order(data: JSONBody[Parcel]) -> dict[str, str]:
    accepted = await plugin.jobs.submit("shipping.ship", data, key=f"order-{data.order}")
    return {"job": accepted.job.id}


plugin = OperationsPlugin()
app = Litestar([order], plugins=[plugin])
