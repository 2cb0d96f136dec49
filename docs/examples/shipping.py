"""An application whose work is done by jobs: what it accepted is shipped, whatever dies meanwhile.

viralfx serve --app docs.examples.shipping:app
"""

from dataclasses import dataclass

from litestar import Litestar, post

from viralfx import JobContext, OperationsConfig, OperationsPlugin, task


@dataclass
class Parcel:
    order: str
    weight: float


@task("shipping.ship", timeout=30.0)
async def ship(parcel: Parcel, context: JobContext) -> str:
    # It may run twice when a worker dies: the job's id tells the carrier that it is the same one.
    print("shipped", parcel.order, "attempt", context.attempt, flush=True)
    return f"{parcel.order} weighs {parcel.weight:g} kg"


@post("/orders", status_code=202)
async def order(data: Parcel) -> dict[str, str]:
    accepted = await plugin.jobs.submit("shipping.ship", data, key=f"order-{data.order}")
    return {"job": accepted.job.id}


plugin = OperationsPlugin(OperationsConfig(tasks=[ship]))
app = Litestar([order], plugins=[plugin])
