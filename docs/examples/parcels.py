"""An application of FastAPI with probes, an ordered stop, a retry and a durable job.

viralfx serve --app docs.examples.parcels:app
"""

import httpx
from fastapi import FastAPI

from viralfx import retry, task
from viralfx.asgi import OperationsMiddleware

api = FastAPI()


@task("parcels.label")
@retry(attempts=3, base_delay=0.1)
async def label(order: str) -> None:
    async with httpx.AsyncClient() as client:
        (await client.post("http://labels.example/", json={"order": order})).raise_for_status()


@api.post("/orders/{order}", status_code=202)
async def place(order: str) -> dict[str, str]:
    return {"job": (await app.jobs.submit(label, order)).job.id}


app = OperationsMiddleware(api)
