"""A Litestar application that decodes a job, keeps it by one INSERT, and answers 202.

This is the least that a durable job costs: no idempotency keys, no retries, no metrics. Its pool
has the sizes of the service's own pool.
"""

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import msgspec
from benchmarks.peers.bare_accept import Accepted, Draft
from litestar import Litestar, Request, post
from litestar.datastructures import State

from viralfx.settings import read_settings

TABLE = """
CREATE TABLE IF NOT EXISTS bare_jobs (
    id uuid PRIMARY KEY,
    task text NOT NULL,
    payload text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
)
"""
INSERT = "INSERT INTO bare_jobs (id, task, payload) VALUES ($1, $2, $3)"


@asynccontextmanager
async def pool(app: Litestar) -> AsyncIterator[None]:
    """Connect while the application runs."""
    sizes = read_settings(os.environ).db
    async with asyncpg.create_pool(
        os.environ["DATABASE_URL"], min_size=sizes.pool_min, max_size=sizes.pool_max
    ) as connections:
        await connections.execute(TABLE)
        app.state.pool = connections
        yield


@post("/api/v1/jobs", status_code=202)
async def accept(data: Draft, request: Request[object, object, State]) -> Accepted:
    """Keep the job, and answer."""
    job = uuid.uuid4()
    payload = msgspec.json.encode(data.payload).decode()
    await request.app.state.pool.execute(INSERT, job, data.task, payload)
    return Accepted(str(job), "default", "waiting", {"self": f"/api/v1/jobs/{job}"})


app = Litestar([accept], lifespan=[pool], logging_config=None)
